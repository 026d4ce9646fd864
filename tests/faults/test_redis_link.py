"""Redis goes away, loses replies or is slow while jobs stream: nothing is doubled, lost or counted against a job."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from millstream.events import Chunk
from tests.contract.consumers import Consumer
from tests.faults.report import Experiment
from tests.proxy import Proxy
from tests.tally import TALLY
from tests.upstream import Chunk as Part
from tests.upstream import Finish, Pause, Reset, Script, Text, WaitFor, answer, expected_text, seed_of
from tests.valkey import Valkey
from tests.worker_process import wait_until
from tests.world import World


@pytest.fixture
def durable() -> Iterator[Valkey]:
    """A server of the test's own, which writes everything down before it answers."""
    server = Valkey.start(appendfsync="always")
    yield server
    server.close()


@pytest.mark.experiment(25)
@pytest.mark.parametrize("outage", ["killed", "frozen", "deaf"])
def test_jobs_go_on_where_they_stood_when_redis_is_back(
    make_world: Callable[..., World], durable: Valkey, outage: str, soak: bool, experiment: Experiment
) -> None:
    """An outage of more than two leases: workers read on into their buffers, write on afterwards, lose no attempt.

    No sweep takes the living holders' jobs. Consumers that followed all the time see the whole log; a job submitted
    before and taken afterwards runs too. Deaf: the network swallows everything and ends no connection.
    """
    if outage != "killed" and not soak:
        pytest.skip("in the long round")
    away = {"killed": 30.0, "frozen": 12.0, "deaf": 30.0}[outage] if soak else 5.0
    with Proxy(durable.url) as proxy:
        world = make_world(proxy.url, MILLSTREAM_STREAMS="20")
        prompts = [f"outage {number}" for number in range(40)]
        for number, prompt in enumerate(prompts):
            pace = 0.01 + 0.001 * number
            world.upstream.on(
                answer(Text(10, pace, seed=1), WaitFor("away"), Text(200, pace, seed=seed_of(prompt))), prompt=prompt
            )
        workers = [world.worker(), world.worker()]
        jobs = [job.id for job in world.client.submit_many([{"prompt": prompt} for prompt in prompts])]
        waiting = world.submit("no slot is free yet")
        consumers = [Consumer(world.make_client, [job_id]) for job_id in jobs]
        world.held("away", 40)
        for consumer in consumers:
            consumer.wait_for(2)
        world.upstream.open_gate("away")
        _go_away(outage, durable, proxy, away)
        for job_id, prompt, consumer in zip(jobs, prompts, consumers, strict=True):
            world.check(job_id, [consumer.join(60)[job_id]])
            assert world.last_text(job_id) == expected_text(10, 1) + expected_text(200, seed_of(prompt))
            assert world.starts(job_id) == [(1, None)]
        world.check_text(waiting, "no slot is free yet")
        assert world.client.status(waiting).broken == 0
        assert len(world.upstream.journal) == 41
        for worker in workers:
            assert worker.said("redis.away")
            assert worker.said("redis.back")
            assert not worker.said("sweep.delivered_again", because="lost")
            worker.terminate()
            assert worker.wait() == 0
        world.check_left()
    TALLY.trials += 1
    experiment.note(f"Redis {outage} for {away:g} s under 40 live streams: all went on in their first attempt")


def _go_away(outage: str, server: Valkey, proxy: Proxy, seconds: float) -> None:
    """Away for so long, and back."""
    leave, come_back = {
        "killed": (server.kill, server.restart), "frozen": (server.freeze, server.thaw),
        "deaf": (proxy.go_deaf, proxy.hear),
    }[outage]  # fmt: skip
    leave()
    gone = time.monotonic()
    wait_until(lambda: time.monotonic() - gone >= seconds, "a long outage", 2 * seconds)
    come_back()


@pytest.mark.experiment(25)
def test_a_worker_that_starts_without_redis_ends_in_words(make_world: Callable[..., World], durable: Valkey) -> None:
    """It tries for some seconds, says what it found and ends with 5, so that a supervisor starts it again.

    A server that is there and takes nothing is told apart from one that is away.
    """
    world = make_world(durable.url)
    durable.kill()
    away = world.start()
    assert away.wait() == 5
    assert "cannot be reached" in away.log.read_text()
    durable.restart()
    redis = world.redis
    redis.config_set("maxmemory", 1)
    refused = world.start()
    assert refused.wait() == 5
    assert "is full" in refused.log.read_text()
    redis.config_set("maxmemory", 0)
    world.worker()
    world.check_text(world.submit("at last"), "at last")
    world.check_left()


@pytest.mark.experiment(25)
def test_a_worker_can_end_while_redis_is_away(make_world: Callable[..., World], durable: Valkey) -> None:
    """SIGTERM twice without Redis: it does not hang, and the job runs elsewhere once Redis is back."""
    world = make_world(durable.url, MILLSTREAM_GRACE="0")
    prompt = "left behind"
    world.upstream.on(answer(Text(5, seed=1), WaitFor("left")), answer(Text(20, seed=2)), prompt=prompt)
    worker = world.worker()
    job_id = world.submit(prompt)
    world.held("left")
    world.wait_for_seq(job_id, 2)
    durable.kill()
    worker.terminate()
    worker.wait_for("worker.stopping")
    worker.terminate()
    worker.wait(30)
    durable.restart()
    world.worker()
    assert world.outcome(job_id).text == expected_text(20, 2)
    world.check(job_id)


@pytest.mark.experiment(26)
@pytest.mark.parametrize("replies", ["lost", "torn"])
def test_lost_replies_double_and_lose_nothing(
    make_world: Callable[..., World], valkey_url: str, replies: str, soak: bool, say: Callable[[str], None]
) -> None:
    """Every 5th reply to worker, producer and consumers is lost after the command was carried out, or half of it is.

    Each job has one run upstream, its text is whole, no event is doubled, and no attempt is counted.
    """
    if replies == "torn" and not soak:
        pytest.skip("in the long round")
    with Proxy(valkey_url) as proxy:
        world, honest = make_world(proxy.url), make_world(valkey_url)
        lose = proxy.lose_every if replies == "lost" else proxy.tear_every
        worker = world.worker()
        prompts = [f"lost reply {number}" for number in range(30)]
        for prompt in prompts:
            world.upstream.on(answer(Text(200, 0.01, seed=seed_of(prompt))), prompt=prompt)
        lose(5)
        jobs = [world.submit(prompt) for prompt in prompts]
        consumers = [Consumer(world.make_client, [job_id]) for job_id in jobs]
        # A delivery whose taking was lost comes back by a sweep, after four leases: not every one under this loss.
        wait_until(lambda: honest.redis.xlen(honest.keys.ended) >= 20 and proxy.lost > 30, "most jobs end under loss")
        lost = proxy.lost
        lose(0)
        for job_id, prompt, consumer in zip(jobs, prompts, consumers, strict=True):
            log = honest.check(job_id, [consumer.join()[job_id]])
            assert honest.last_text(job_id) == expected_text(200, seed_of(prompt))
            assert sum(event.n for event in log if isinstance(event, Chunk)) == 200
            assert len(honest.upstream.requests_for(prompt)) == 1
            assert honest.starts(job_id) == [(1, None)]
        worker.terminate()
        assert worker.wait() == 0
        world.check_left()
    say(f"{lost} lost replies under 30 jobs: nothing doubled, nothing lost")


@pytest.mark.experiment(26)
def test_lost_replies_to_cancels_and_restarts(
    make_world: Callable[..., World], valkey_url: str, say: Callable[[str], None]
) -> None:
    """Under lost replies a cancel ends a job once, and a broken stream is asked for exactly once more.

    Whether that is a new attempt depends on whether anything of the first had been written when it broke.
    """
    with Proxy(valkey_url) as proxy:
        world, honest = make_world(proxy.url), make_world(valkey_url)
        world.worker()
        proxy.lose_every(5)
        broken = [f"broken under loss {number}" for number in range(20)]
        endless = [f"cancelled under loss {number}" for number in range(10)]
        for prompt in broken:
            world.upstream.on(Script(Text(7, 0.01, seed=1), Reset()), answer(Text(30, 0.005, seed=2)), prompt=prompt)
        for prompt in endless:
            world.upstream.on(answer(Text(None, 0.01, seed=3)), prompt=prompt)
        restarted = [world.submit(prompt) for prompt in broken]
        cancelled = [world.submit(prompt) for prompt in endless]
        for job_id in cancelled:
            honest.wait_for_seq(job_id, 5)
            assert world.client.cancel(job_id) == "cancelled"
        wait_until(lambda: honest.redis.xlen(honest.keys.ended) >= 20, "most jobs end under loss")
        lost = proxy.lost
        proxy.lose_every(0)
        for job_id in restarted:
            assert honest.outcome(job_id).text == expected_text(30, 2)
            honest.check(job_id)
            assert honest.starts(job_id) in ([(1, None)], [(1, None), (2, "stream_broken")])
        assert {len(honest.upstream.requests_for(prompt)) for prompt in broken} == {2}
        for job_id in cancelled:
            honest.check(job_id)
        world.upstream.journal.wait_for(lambda journal: journal.open_streams == 0)
    say(f"{lost} lost replies under 20 broken and 10 cancelled streams: one restart and one end each")


@pytest.mark.experiment(26)
def test_a_restart_survives_a_heartbeat_on_its_way(make_world: Callable[..., World], valkey_url: str) -> None:
    """On a slow line the heartbeat of the old attempt may arrive after the claim of the new one: it is no fence.

    100 streams break at moments spread over a second, two heartbeats, while every reply takes 50 ms.
    """
    with Proxy(valkey_url) as proxy:
        world, honest = make_world(proxy.url), make_world(valkey_url)
        world.worker()
        proxy.delay(0.05)
        prompts = [f"slow line {number}" for number in range(100)]
        for number, prompt in enumerate(prompts):
            world.upstream.on(
                Script(Text(3, seed=1), WaitFor("shown"), Pause(0.01 * number), Reset()), answer(Text(5, seed=2)),
                prompt=prompt,
            )  # fmt: skip
        jobs = [job.id for job in world.client.submit_many([{"prompt": prompt} for prompt in prompts])]
        for job_id in jobs:
            honest.wait_until_shown(job_id)
        world.upstream.open_gate("shown")
        for job_id in jobs:
            assert honest.outcome(job_id).text == expected_text(5, 2)
            assert honest.starts(job_id) == [(1, None), (2, "stream_broken")]
            honest.check(job_id)
        assert {len(honest.upstream.requests_for(prompt)) for prompt in prompts} == {2}


@pytest.mark.experiment(25)
def test_a_full_buffer_pauses_the_upstream_and_loses_nothing(make_world: Callable[..., World], durable: Valkey) -> None:
    """While Redis stands still a fast answer fills the job's buffer, then waits at the upstream's socket.

    The clocks stand still meanwhile: a paused stream is not a stalled one.
    """
    world = make_world(durable.url, MILLSTREAM_IDLE_TIMEOUT="1")
    prompt = "an answer that does not fit"
    pieces = [f"{number:08}" * 512 for number in range(6_000)]  # 24 MB: more than the sockets between hold
    world.upstream.on(Script(WaitFor("full"), *map(Part, pieces), Finish()), prompt=prompt)
    worker = world.worker()
    job_id = world.submit(prompt)
    world.held("full")
    world.wait_for_seq(job_id, 1)
    os.kill(durable.pid, signal.SIGSTOP)
    world.upstream.open_gate("full")
    gone = time.monotonic()
    [exchange] = world.upstream.requests_for(prompt)
    wait_until(lambda: time.monotonic() - gone >= 3.0, "three times the idle clock")
    assert exchange.outcome == "open", "the upstream was not held back"
    os.kill(durable.pid, signal.SIGCONT)
    result = world.outcome(job_id)
    assert (result.status, result.error) == ("completed", None)
    assert result.text == "".join(pieces)
    world.check(job_id)
    assert world.starts(job_id) == [(1, None)]
    assert worker.alive


@pytest.mark.experiment(25)
@pytest.mark.parametrize("after", [0.05, 1.5])
def test_a_shutdown_while_redis_stands_still_cuts_no_answer(
    make_world: Callable[..., World], durable: Valkey, after: float
) -> None:
    """The answer is whole and its end waits to be written: a hurried shutdown must not take text out of it.

    Redis is frozen before the second half of the answer; the worker is told to end twice; then Redis goes on.
    """
    world = make_world(durable.url)
    prompt = f"whole or not at all, {after}"
    world.upstream.on(answer(Text(10, seed=1), WaitFor("half"), Text(20, 0.01, seed=2)), prompt=prompt)
    hurried = world.worker()
    job_id = world.submit(prompt)
    world.held("half")
    world.wait_for_seq(job_id, 2)
    os.kill(durable.pid, signal.SIGSTOP)
    world.upstream.open_gate("half")
    [exchange] = world.upstream.requests_for(prompt)
    wait_until(lambda: exchange.outcome == "finished", "the upstream has said everything")
    hurried.terminate()
    hurried.wait_for("worker.stopping")
    hurried.terminate()
    told = time.monotonic()
    wait_until(lambda: time.monotonic() - told >= after, "the moment Redis goes on")
    os.kill(durable.pid, signal.SIGCONT)
    world.worker()
    result = world.outcome(job_id)
    assert (result.status, result.text) == ("completed", expected_text(10, 1) + expected_text(20, 2))
    world.check(job_id)
