"""The server has no memory left: nothing is accepted halfway, what runs ends, and expiry makes room again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final

import pytest
import redis
import redis.exceptions

from millstream import RedisUnavailable
from tests.faults.report import Experiment
from tests.tally import TALLY
from tests.upstream import Text, WaitFor, answer, expected_text
from tests.valkey import Valkey
from tests.worker_process import wait_until
from tests.world import World

MAXMEMORY: Final = 40_000_000


def memory(world: World) -> int:
    return int(world.redis.info("memory")["used_memory"])


@pytest.mark.experiment(28)
def test_a_full_server_refuses_early_and_ends_what_it_has(
    make_world: Callable[..., World], make_valkey: Callable[..., Valkey], experiment: Experiment
) -> None:
    """Submit refuses from nine tenths of maxmemory on. At maxmemory itself running jobs end, a cancel works, the worker
    lives on. When there is room again what waited runs, and after its retention submit accepts again.
    """
    server = make_valkey(options=["--maxmemory", str(MAXMEMORY)])
    world = make_world(server.url, MILLSTREAM_STREAMS="20")
    world.upstream.on(answer(Text(10, seed=1), WaitFor("full"), Text(200, 0.002, seed=2)), prompt="runs")
    worker = world.worker()
    running = [world.submit("runs") for _ in range(20)]
    world.held("full", 20)

    waiting = submit_until_refused(world)
    refused_at = memory(world)
    assert 0.8 * MAXMEMORY < refused_at < 0.9 * MAXMEMORY
    before = world.redis.dbsize()
    with pytest.raises(RedisUnavailable, match=r"Redis is full.*nothing was accepted"):
        world.submit("y" * 2_000_000)
    assert world.redis.dbsize() == before

    fill(world)
    for number in range(50):
        with pytest.raises(RedisUnavailable, match="is full"):
            world.submit(f"refused {number}")
    with pytest.raises(RedisUnavailable, match="is full"):
        world.client.submit_many([{"prompt": "refused"}] * 50)
    assert len(world.client.list(limit=1000)) == len(running) + len(waiting)
    assert world.cancel(waiting[-1]) == "cancelled"
    world.upstream.open_gate("full")
    for job_id in running:
        assert world.outcome(job_id).text == expected_text(10, 1) + expected_text(200, 2)
        world.check(job_id)
    worker.wait_for("rq.books_wait")
    assert worker.alive

    world.redis.delete("filler")
    for job_id in waiting[:-1]:
        wait_until(lambda: not world.redis.exists(world.keys.state(job_id)), f"{job_id} ran, ended and expired")  # noqa: B023
    wait_until(lambda: memory(world) < MAXMEMORY // 2, "expiry makes room")
    assert {exchange.outcome for exchange in world.upstream.journal} == {"finished"}
    assert len(world.upstream.journal) == len(running) + len(waiting) - 1
    world.check_text(world.submit("accepted again"), "accepted again")
    worker.terminate()
    assert worker.wait() == 0
    world.check_left()
    TALLY.trials += 1
    experiment.note(f"submit refused at {refused_at / MAXMEMORY:.0%} of maxmemory; 20 jobs ended at maxmemory")


def submit_until_refused(world: World) -> list[str]:
    """The jobs that were accepted, of 1.5 MB each."""
    accepted: list[str] = []
    with suppress(RedisUnavailable):
        while True:
            accepted += [world.submit(f"{len(accepted):08}" + "x" * 1_500_000, retention=1)]
    return accepted


def fill(world: World) -> None:
    """Somebody else takes all the memory there is, until the server refuses them."""
    with suppress(redis.exceptions.OutOfMemoryError):
        for number in range(1000):
            world.redis.rpush("filler", f"{number:08}" * 12_500)
