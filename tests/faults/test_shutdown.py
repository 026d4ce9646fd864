"""Workers that are told to end: nothing new is taken, what runs drains or is handed over at once."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from tests.contract.consumers import Consumer
from tests.tally import TALLY
from tests.upstream import Stall, Text, WaitFor, answer, expected_text
from tests.worker_process import PROGRAM
from tests.world import LEASE, World


def hold_then_answer(world: World, prompts: list[str], gate: str) -> None:
    """The first request for each prompt says 5 chunks and then nothing; every later one a whole answer of 20."""
    for prompt in prompts:
        world.upstream.on(answer(Text(5, seed=1), WaitFor(gate), Stall()), answer(Text(20, seed=2)), prompt=prompt)


@pytest.mark.experiment(18)
def test_sigterm_lets_running_jobs_end(world: World) -> None:
    """SIGTERM: nothing new is taken, what runs ends as if nothing had happened, the exit status is 0."""
    prompt = "drained"
    world.upstream.on(answer(Text(5, seed=1), WaitFor("drain"), Text(5, seed=2)), prompt=prompt)
    worker = world.worker()
    job_id = world.submit(prompt)
    world.held("drain")
    worker.terminate()
    worker.wait_for("worker.stopping")
    waiting = world.submit("for another worker")
    world.upstream.open_gate("drain")
    assert worker.wait() == 0
    world.check(job_id)
    assert world.last_text(job_id) == expected_text(5, 1) + expected_text(5, 2)
    assert world.starts(job_id) == [(1, None)]
    assert world.status(waiting) == "queued"
    assert world.redis.exists(f"rq:worker:{worker.name}") == 1
    assert world.redis.smembers("rq:workers") == set()
    world.worker("--burst").wait()
    world.check_text(waiting, "for another worker")


@pytest.mark.experiment(18)
def test_a_job_longer_than_the_grace_is_handed_over_at_once(world: World) -> None:
    """When the grace is over another worker goes on in less than the lease, and the deploy costs no attempt."""
    prompt = "longer than the grace"
    hold_then_answer(world, [prompt], "long")
    old = world.worker(MILLSTREAM_GRACE="0.2")
    job_id = world.submit(prompt, max_attempts=1)
    consumer = Consumer(world.make_client, [job_id])
    [exchange] = world.held("long")
    consumer.wait_for(2)
    replacement = world.worker()
    asked = world.now()
    old.terminate()
    seen = consumer.join()[job_id]
    assert world.began_at(job_id, attempt=2) - asked < 0.2 + LEASE
    world.check(job_id, [seen])
    assert world.last_text(job_id) == expected_text(20, 2)
    assert world.starts(job_id) == [(1, None), (2, "released")]
    assert world.client.status(job_id).broken == 0
    assert replacement.said("job.started", job=job_id)
    assert old.wait() == 0
    assert exchange.outcome == "client_closed"


@pytest.mark.experiment(18)
def test_a_second_sigterm_does_not_wait(world: World) -> None:
    """Asked twice, a worker hands over at once although its grace is long."""
    prompt = "asked twice"
    hold_then_answer(world, [prompt], "twice")
    worker = world.worker(MILLSTREAM_GRACE="600")
    job_id = world.submit(prompt)
    world.held("twice")
    world.wait_for_seq(job_id, 2)
    worker.terminate()
    worker.wait_for("worker.stopping")
    assert world.status(job_id) == "in_progress"
    worker.terminate()
    assert worker.wait() == 0
    assert world.status(job_id) == "queued"
    world.worker("--burst").wait()
    world.check(job_id)
    assert world.starts(job_id) == [(1, None), (2, "released")]


@pytest.mark.experiment(18)
def test_interrupt_is_a_shutdown_too(world: World) -> None:
    """Ctrl-C drains and ends in order, as RQ's shutdown command does, which arrives as the same signal."""
    worker = world.worker()
    os.kill(worker.pid, signal.SIGINT)
    assert worker.wait() == 0
    assert worker.said("worker.stopped")


@pytest.mark.experiment(18)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_worker_that_is_pid_1_ends_in_order(world: World, busy: bool) -> None:
    """As the first process of a container, where no signal has a default, it drains, hands over and ends."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a pid namespace of its own needs root and unshare")
    hold_then_answer(world, ["as pid 1"], "pid 1")
    enclosure = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    worker = world.worker(program=[*enclosure, *PROGRAM], MILLSTREAM_GRACE="0.2")
    [first] = map(int, Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split())
    assert Path(f"/proc/{first}/status").read_text().partition("NSpid:")[2].split()[:2] == [str(first), "1"]
    if busy:
        job_id = world.submit("as pid 1")
        world.held("pid 1")
        world.wait_for_seq(job_id, 2)
    TALLY.shutdowns += 1
    os.kill(first, signal.SIGTERM)
    assert worker.wait() == 0
    assert worker.said("worker.stopped")
    if busy:
        assert world.status(job_id) == "queued"
        world.worker("--burst").wait()
        world.check(job_id)
        assert world.starts(job_id) == [(1, None), (2, "released")]


@pytest.mark.experiment(18)
def test_a_container_that_is_stopped_while_it_starts_ends(world: World) -> None:
    """Pid 1 ignores what it has no handler for: the worker has one before it first talks to Redis."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a pid namespace of its own needs root and unshare")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        enclosure = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        worker = world.start(program=[*enclosure, *PROGRAM], REDIS_URL=url)
        silent.settimeout(30)
        connection, _ = silent.accept()
        with connection:
            [first] = map(int, Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split())
            TALLY.shutdowns += 1
            os.kill(first, signal.SIGTERM)
            assert worker.wait() == 128 + signal.SIGTERM
