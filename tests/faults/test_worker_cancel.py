"""Cancelling in every state: one `cancelled`, last; the upstream let go within a second; what was written stays."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections import Counter
from typing import Final

import pytest

from millstream import JobCancelled
from millstream.events import Cancelled, Chunk
from tests.contract.consumers import Consumer
from tests.faults.report import Experiment
from tests.tally import TALLY
from tests.upstream import Exchange, Headers, Pause, Script, Stall, Text, WaitFor, answer, error, expected_text
from tests.worker_process import wait_until
from tests.world import World

TAKES_EFFECT: Final = 1.0
"""Seconds from a cancel to the upstream's closed socket: the guarantee."""


def cancel_and_time(world: World, job_id: str, exchange: Exchange) -> float:
    """Cancel, and say how many seconds later the upstream saw its socket closed."""
    asked = time.monotonic()
    assert world.cancel(job_id) == "cancelled"
    world.upstream.journal.wait_for(lambda journal: exchange.closed_at is not None)
    assert exchange.outcome == "client_closed"
    assert exchange.closed_at is not None
    return exchange.closed_at - asked


pytestmark = pytest.mark.experiment(31)


def test_a_queued_job_is_cancelled_without_a_worker(world: World) -> None:
    """Nobody runs it, now or later: a worker that finds its delivery asks nothing of the upstream."""
    job_id = world.submit("nobody asks this")
    assert world.cancel(job_id) == "cancelled"
    world.worker("--burst").wait()
    assert world.upstream.requests_for("nobody asks this") == []
    [end] = world.check(job_id)
    assert isinstance(end, Cancelled)
    with pytest.raises(JobCancelled):
        world.client.result(job_id)


@pytest.mark.parametrize("head", [False, True], ids=["before the head", "before the first token"])
def test_a_job_that_waits_for_its_first_token_is_cancelled(shared: World, head: bool) -> None:
    """A silent upstream, headers sent or not, is let go within a second."""
    prompt = f"silent, head {head}"
    shared.upstream.on(Script(*([Headers()] if head else []), WaitFor("never"), Stall()), prompt=prompt)
    job_id = shared.submit(prompt)
    exchange = shared.upstream.journal.wait_for(
        lambda journal: [each for each in journal.waiting_for("never") if each.request.prompt == prompt]
    )[0]
    shared.wait_for_seq(job_id, 1)
    assert cancel_and_time(shared, job_id, exchange) < TAKES_EFFECT
    assert [event.type for event in shared.check(job_id)] == ["started", "cancelled"]


def test_a_streaming_job_is_cancelled(shared: World) -> None:
    """Mid-stream: the socket is closed, consumers see one `cancelled`, text and usage so far stay readable."""
    prompt = "mid-stream"
    shared.upstream.on(answer(Text(None, 0.01, seed=4)), prompt=prompt)
    job_id = shared.submit(prompt)
    consumer = Consumer(shared.make_client, [job_id])
    consumer.wait_for(20)
    [exchange] = shared.upstream.requests_for(prompt)
    took = cancel_and_time(shared, job_id, exchange)
    assert took < TAKES_EFFECT
    log = shared.check(job_id, [consumer.join()[job_id]])
    written = sum(event.n for event in log if isinstance(event, Chunk))
    assert shared.last_text(job_id) == expected_text(written, 4)
    usage = shared.client.status(job_id).usage
    assert usage is not None
    assert usage["estimated"] is True
    assert 0 < usage["completion_tokens"] <= exchange.chunks_sent


def test_a_stalled_stream_is_cancelled(shared: World) -> None:
    """Without a word from the upstream the heartbeat alone brings the news."""
    prompt = "stalled and cancelled"
    shared.upstream.on(answer(Text(3, seed=4), WaitFor("stalled"), Stall()), prompt=prompt)
    job_id = shared.submit(prompt)
    [exchange] = shared.held("stalled")
    shared.wait_for_seq(job_id, 2)
    assert cancel_and_time(shared, job_id, exchange) < TAKES_EFFECT
    shared.check(job_id)
    assert shared.last_text(job_id) == expected_text(3, 4)


def test_a_job_that_waits_to_ask_again_is_cancelled(shared: World) -> None:
    """Between two tries of a busy upstream there is no socket to close, and no further request comes."""
    prompt = "asked to wait"
    shared.upstream.on(error(503, headers={"retry-after": "4"}), prompt=prompt)
    job_id = shared.submit(prompt, model="busy")
    consumer = Consumer(shared.make_client, [job_id])
    consumer.wait_for(2)
    assert consumer.events[job_id][1].type == "retrying"
    assert shared.cancel(job_id) == "cancelled"
    wait_until(lambda: shared.workers[0].said("job.ended", job=job_id), "the worker lets go", TAKES_EFFECT)
    shared.check(job_id, [consumer.join()[job_id]])
    assert len(shared.upstream.requests_for(prompt)) == 1


def test_an_ended_job_stays_as_it_ended(shared: World) -> None:
    """A cancel after the end changes nothing, and says what the status is."""
    job_id = shared.submit("ended long ago")
    log_before = shared.check(shared.outcome(job_id).id)
    assert shared.cancel(job_id) == "completed"
    assert shared.check(job_id) == log_before


def test_cancelling_as_the_answer_ends_gives_one_end(shared: World) -> None:
    """50 answers end while their jobs are being cancelled: each has one terminal event, the same for everyone."""
    prompts = [f"last moment {number}" for number in range(50)]
    for prompt in prompts:
        shared.upstream.on(answer(Text(5, seed=1), WaitFor("last moment"), Text(1, seed=2)), prompt=prompt)
    jobs = [job.id for job in shared.client.submit_many([{"prompt": prompt} for prompt in prompts])]
    consumer = Consumer(shared.make_client, jobs)
    shared.held("last moment", 50)
    said = {}
    for number, job_id in enumerate(jobs):
        if number == 5:
            shared.upstream.open_gate("last moment")
        said[job_id] = shared.cancel(job_id)
    seen = consumer.join()
    assert {shared.check(job_id, [seen[job_id]])[-1].type for job_id in jobs[:5]} == {"cancelled"}
    for job_id in jobs:
        assert shared.check(job_id, [seen[job_id]])[-1].type == said[job_id]
    shared.upstream.journal.wait_for(lambda journal: journal.open_streams == 0)


def test_a_job_whose_worker_died_is_cancelled(world: World) -> None:
    """The worker is gone and its lease still runs: the cancel holds at once, and no other worker runs it again."""
    prompt = "its worker died"
    world.upstream.on(answer(Text(5, seed=9), WaitFor("dead"), Stall()), prompt=prompt)
    worker = world.worker()
    job_id = world.submit(prompt)
    world.held("dead")
    world.wait_for_seq(job_id, 2)
    worker.kill()
    assert world.cancel(job_id) == "cancelled"
    log = world.check(job_id)
    assert world.last_text(job_id) == expected_text(5, 9)
    second = world.worker()
    marker = world.submit("runs instead")
    world.check_text(marker, "runs instead")
    second.terminate()
    assert second.wait() == 0
    assert world.check(job_id) == log
    assert len(world.upstream.requests_for(prompt)) == 1


def test_cancels_at_random_moments(world: World, experiment: Experiment, soak: bool, seed: int) -> None:
    """Queued, waiting for the upstream, before the first token, in mid-stream, at the end: one terminal event each.

    Where a request was open, its socket is closed within a second.
    """
    rounds, crowd = (7, 50) if soak else (4, 50)
    moments = random.Random(seed)
    world.worker("--streams", "40")  # fewer slots than jobs: some are still queued
    took: list[tuple[float, Exchange]] = []
    found = Counter[str]()
    for number in itertools.count():
        if number >= rounds and len(took) > rounds * crowd / 4:  # a slow machine has fewer open when they are cancelled
            break
        jobs = [(world.submit(prompt), prompt) for prompt in crowd_of(world, moments, f"{seed} {number}", crowd)]
        consumer = Consumer(world.make_client, [job_id for job_id, _ in jobs])
        began = time.monotonic()
        due = sorted((began + moments.uniform(0, 1.2), *job) for job in jobs)
        for moment, job_id, prompt in due:
            time.sleep(max(0.0, moment - time.monotonic()))
            opened = [each for each in world.upstream.requests_for(prompt) if each.outcome == "open"]
            took += [
                (time.monotonic(), each) for each in opened
            ]  # before: its worker may learn of it within a millisecond
            found[world.cancel(job_id)] += 1
            TALLY.trials += 1
        for job_id, events in consumer.join().items():
            world.check(job_id, [events])
        world.upstream.journal.wait_for(lambda journal: journal.open_streams == 0)
    closed = [each.closed_at - asked for asked, each in took if each.outcome == "client_closed" and each.closed_at]
    assert max(closed) < TAKES_EFFECT
    assert found["cancelled"] > found.total() / 2
    experiment.note(
        f"{found.total()} cancels at random moments, seed {seed}: {dict(found)}; {len(closed)} open sockets closed "
        f"after {statistics.median(closed):.3f} s (median), {max(closed):.3f} s (most)"
    )


def crowd_of(world: World, moments: random.Random, name: str, size: int) -> list[str]:
    """Prompts whose answers come at once or late, fast or slow, or only after a busy upstream's 503."""
    prompts = [f"{name} {number}" for number in range(size)]
    for number, prompt in enumerate(prompts):
        text = Text(moments.randrange(1, 60), moments.uniform(0, 0.04), seed=number)
        late = Script(Pause(moments.uniform(0, 0.5)), *answer(text).steps)
        busy = error(503, headers={"retry-after": "0.3"})
        world.upstream.on(*moments.choice([[answer(text)], [late], [busy, answer(text)]]), prompt=prompt)
    return prompts
