"""What dies, stops or is asked to go while jobs stream, and what everybody sees of it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

import pytest

from millstream.events import Started
from tests.contract.consumers import Consumer
from tests.oracle import read_log
from tests.upstream import Stall, Text, WaitFor, answer, expected_text
from tests.worker_process import environment, wait_until
from tests.world import LEASE, SHORTEST, World

SWEEP: Final = 2.0
"""Seconds after the lapse of a lease within which the job must run again, by the guarantee a sweep of 1 s included."""


def hold_then_answer(world: World, prompts: list[str], gate: str) -> None:
    """The first request for each prompt says 5 chunks and then nothing; every later one a whole answer of 20."""
    for prompt in prompts:
        world.upstream.on(answer(Text(5, seed=1), WaitFor(gate), Stall()), answer(Text(20, seed=2)), prompt=prompt)


@pytest.mark.experiment(16)
def test_jobs_of_a_killed_worker_run_again_elsewhere(world: World, say: Callable[[str], None]) -> None:
    """kill -9 under 50 live streams: all run again on another worker within lease and sweep, one extra attempt each."""
    prompts = [f"killed {number}" for number in range(50)]
    hold_then_answer(world, prompts, "killed")
    first = world.worker()
    jobs = [job.id for job in world.client.submit_many([{"prompt": prompt} for prompt in prompts])]
    consumer = Consumer(world.make_client, jobs)
    world.held("killed", 50)
    for job_id in jobs:
        consumer.wait_for(2, job_id)
    second = world.worker()  # whose sweep brings them back
    killed = time.monotonic()
    first.kill()
    world.upstream.journal.wait_for(lambda journal: len(journal) == 100, 30)
    assert max(each.request.arrived_at for each in world.upstream.journal) - killed < LEASE + SWEEP
    seen = consumer.join()
    for job_id in jobs:
        world.check(job_id, [seen[job_id]])
        assert world.last_text(job_id) == expected_text(20, 2)
        assert world.starts(job_id) == [(1, None), (2, "worker_lost")]
    assert second.said("job.started", attempt=2)
    say("50 live streams under kill -9 of their worker: all whole after one more attempt")


@pytest.mark.experiment(27)
def test_a_killed_consumer_disturbs_nobody(shared: World) -> None:
    """kill -9 of a process that follows: the job goes on, and another consumer sees all of it."""
    prompt = "killed consumer"
    shared.upstream.on(answer(Text(20, seed=1), WaitFor("killed consumer"), Text(20, seed=2)), prompt=prompt)
    job_id = shared.submit(prompt)
    code = (
        "import sys; from millstream import Client\n"
        "for event in Client.from_env().follow(sys.argv[1]): print(event.seq, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, job_id], env=environment(shared.environ), stdout=subprocess.PIPE
    ) as follower:
        other = Consumer(shared.make_client, [job_id])
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"1\n"
        follower.kill()
    shared.upstream.open_gate("killed consumer")
    shared.check(job_id, [other.join()[job_id]])
    assert shared.last_text(job_id) == expected_text(20, 1) + expected_text(20, 2)


@pytest.mark.experiment(27)
def test_killed_subscriptions_lose_nothing(shared: World, say: Callable[[str], None]) -> None:
    """CLIENT KILL TYPE pubsub at 120 random moments under live streams: every consumer ends with the whole log."""
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    prompts = [f"subscriptions, seed {seed}, {number}" for number in range(10)]
    for prompt in prompts:
        shared.upstream.on(answer(Text(None, 0.004, seed=3)), prompt=prompt)
    jobs = [job.id for job in shared.client.submit_many([{"prompt": prompt} for prompt in prompts])]
    consumers = [Consumer(shared.make_client, [job_id]) for job_id in jobs for _ in range(2)]
    trials = killed = 0
    while trials < 120 or killed < 120:
        time.sleep(moments.uniform(0.001, 0.03))
        killed += shared.redis.client_kill_filter(_type="pubsub")
        trials += 1
    for job_id in jobs:
        assert shared.client.cancel(job_id) == "cancelled"
    lists = [(job_id, events) for consumer in consumers for job_id, events in consumer.join().items()]
    for job_id, events in lists:
        shared.check(job_id, [events])
    say(f"CLIENT KILL TYPE pubsub at {trials} moments, {killed} subscriptions killed, seed {seed}: nothing lost")


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
    asked = time.monotonic()
    old.terminate()
    seen = consumer.join()[job_id]
    assert time.monotonic() - asked < 0.2 + LEASE
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
    assert worker.wait(5) == 0
    assert world.status(job_id) == "queued"
    world.worker("--burst").wait()
    world.check(job_id)
    assert world.starts(job_id) == [(1, None), (2, "released")]


@pytest.mark.experiment(17)
def test_a_frozen_worker_is_fenced_when_it_wakes(world: World) -> None:
    """SIGSTOP for three leases, then SIGCONT: it writes nothing more, and lets its upstream go within a second."""
    prompt = "frozen"
    world.upstream.on(answer(Text(None, 0.01, seed=1)), answer(Text(20, seed=2)), prompt=prompt)
    frozen = world.worker()
    job_id = world.submit(prompt)
    consumer = Consumer(world.make_client, [job_id])
    consumer.wait_for(10)
    [exchange] = world.upstream.requests_for(prompt)
    frozen.freeze()
    asleep = time.monotonic()
    successor = world.worker()
    log = world.check(job_id, [consumer.join()[job_id]])
    wait_until(lambda: time.monotonic() - asleep >= 3 * LEASE, "three leases have passed")
    frozen.thaw()
    awake = time.monotonic()
    world.upstream.journal.wait_for(lambda journal: exchange.closed_at is not None)
    assert exchange.closed_at is not None
    assert exchange.closed_at - awake < 1.0
    frozen.wait_for("job.ended", job=job_id, status="fenced")
    assert successor.said("job.started", job=job_id, attempt=2)
    assert world.check(job_id) == log
    assert world.last_text(job_id) == expected_text(20, 2)
    # It is as good as new: alone, it runs the next job.
    successor.terminate()
    assert successor.wait() == 0
    after = world.submit("after the thaw")
    world.check_text(after, "after the thaw")


@pytest.mark.experiment(23)
def test_attempts_that_keep_dying_end_the_job(make_world: Callable[..., World], valkey_url: str) -> None:
    """A job that takes its worker down every time fails after `max_attempts`, with a code that says so."""
    world = make_world(valkey_url, MILLSTREAM_LEASE=f"{SHORTEST:g}")
    prompt = "kills its worker"
    world.upstream.on(answer(Text(3, seed=1), WaitFor("deadly"), Stall()), prompt=prompt)
    job_id = world.submit(prompt, max_attempts=2)

    def begun(attempt: int) -> None:
        world.upstream.journal.wait_for(lambda journal: len(journal.waiting_for("deadly")) == attempt, 30)
        wait_until(lambda: len(started_so_far(world, job_id)) == attempt, f"attempt {attempt} is written")

    for number in (1, 2):
        worker = world.worker()
        begun(number)
        worker.kill()
        world.upstream.journal.wait_for(lambda journal: journal.open_streams == 0)
    world.worker()
    result = world.outcome(job_id)
    assert result.status == "failed"
    assert result.error is not None
    assert result.error["code"] == "attempts_exhausted"
    world.check(job_id)
    assert len(world.upstream.requests_for(prompt)) == 2


def started_so_far(world: World, job_id: str) -> list[object]:
    return [event for event in read_log(world.redis, world.keys, job_id) if isinstance(event, Started)]


@pytest.mark.experiment(18)
def test_interrupt_is_a_shutdown_too(world: World) -> None:
    """Ctrl-C drains and ends in order, as RQ's shutdown command does, which arrives as the same signal."""
    worker = world.worker()
    os.kill(worker.pid, signal.SIGINT)
    assert worker.wait() == 0
    assert worker.said("worker.stopped")
