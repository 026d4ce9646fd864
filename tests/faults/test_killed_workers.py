"""kill -9 and SIGSTOP of workers, while their streams run and at any other moment."""

from __future__ import annotations

import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from tests.contract.consumers import Consumer
from tests.faults.report import Experiment
from tests.tally import TALLY
from tests.upstream import Chunk as Part
from tests.upstream import Exchange, Stall, Text, WaitFor, answer, expected_text, seed_of
from tests.upstream.journal import Journal
from tests.worker_process import WorkerProcess, wait_until
from tests.world import LEASE, SHORTEST, World

RECOVERY: Final = LEASE + 2.0
"""Seconds from the kill of a worker within which all its jobs must run again, by the guarantee."""

STREAMS: Final = 50


@pytest.mark.experiment(16)
def test_50_live_streams_run_again_after_every_kill(world: World, experiment: Experiment, soak: bool) -> None:
    """kill -9 of the worker of the same 50 streams, again and again: each kill costs each of them one attempt, no more.

    All run again within the lease and 2 s; the consumers, who followed through all of it, saw the log.
    """
    kills = 20 if soak else 2
    prompts = [f"killed {number}" for number in range(STREAMS)]
    endless, whole = answer(Text(None, 0.1, seed=1)), answer(Text(40, 0.05, seed=2))
    for prompt in prompts:
        world.upstream.on(*[endless] * kills, whole, prompt=prompt)
    worker = world.worker()
    asked = [{"prompt": prompt, "max_attempts": kills + 1} for prompt in prompts]
    jobs = [job.id for job in world.client.submit_many(asked)]
    consumers = [Consumer(world.make_client, jobs[number::5]) for number in range(5)]
    took = []
    for attempt in range(1, kills + 1):
        for job_id in jobs:
            world.wait_until_shown(job_id, attempt)
        successor = world.worker()
        killed = time.monotonic()
        worker.kill()
        world.upstream.journal.wait_for(partial(has, STREAMS * (attempt + 1)), 30)
        again = [each.request.arrived_at - killed for each in list(world.upstream.journal)[STREAMS * attempt :]]
        took.append(max(again))
        TALLY.trials += 1
        assert max(again) < RECOVERY, sorted(again)
        worker = successor
    seen = {job_id: events for consumer in consumers for job_id, events in consumer.join().items()}
    for job_id in jobs:
        world.check(job_id, [seen[job_id]])
        assert world.last_text(job_id) == expected_text(40, 2)
        assert world.starts(job_id) == [(1, None), *((n, "worker_lost") for n in range(2, kills + 2))]
    experiment.note(
        f"all {STREAMS} streams ran again {statistics.median(took):.2f} s after a kill (median; all of them: "
        f"{' '.join(f'{each:.2f}' for each in sorted(took))}), at most {RECOVERY:g} s allowed"
    )


def has(count: int, journal: Journal) -> bool:
    return len(journal) == count


@pytest.mark.experiment(16)
def test_kills_at_random_moments_lose_nothing(world: World, experiment: Experiment, soak: bool, seed: int) -> None:
    """kill -9 whenever: between take and claim, before the first token, at the end; some jobs are cancelled meanwhile.

    Every job that nobody cancelled completes with its whole text, and was begun anew only where its worker was lost.
    """
    kills = 40 if soak else 4
    moments = random.Random(seed)
    experiment.note(f"kills at random moments: seed {seed}")
    workers = [world.start("--streams", "20"), world.start("--streams", "20")]
    jobs: dict[str, str] = {}
    consumers, cancelled = [], set()
    for number in range(kills):
        prompts = [f"seed {seed}, {number}, {each}" for each in range(6)]
        for prompt in prompts:
            said = Text(moments.randrange(1, 60), moments.uniform(0, 0.05), seed=seed_of(prompt))
            world.upstream.on(answer(said), prompt=prompt)
            jobs[world.submit(prompt, max_attempts=100)] = expected_text(said.n_chunks or 0, said.seed)
        consumers.append(Consumer(world.make_client, list(jobs)[-6:]))
        time.sleep(moments.uniform(0, 1.5))
        workers.pop(moments.randrange(2)).kill()
        workers.append(world.start("--streams", "20"))
        victim = list(jobs)[-1]
        if moments.random() < 0.5 and world.cancel(victim) == "cancelled":
            cancelled.add(victim)
        TALLY.trials += 1
    for consumer in consumers:
        for job_id, events in consumer.join().items():
            log = world.check(job_id, [events])
            text = world.last_text(job_id)
            assert log[-1].type == ("cancelled" if job_id in cancelled else "completed")
            assert jobs[job_id].startswith(text) if job_id in cancelled else jobs[job_id] == text
            assert {reason for _, reason in world.starts(job_id)} <= {None, "worker_lost"}
    world.upstream.journal.wait_for(lambda journal: journal.open_streams == 0)


@pytest.mark.experiment(17)
def test_a_frozen_worker_is_fenced_when_it_wakes(world: World, experiment: Experiment, soak: bool) -> None:
    """SIGSTOP for three leases, then SIGCONT: it writes nothing more, and lets its upstream go within a second."""
    frozen = world.worker()
    let_go = []
    for trial in range(6 if soak else 1):
        prompts = [f"frozen {trial}, {number}" for number in range(10)]
        for prompt in prompts:
            world.upstream.on(answer(Text(None, 0.01, seed=1)), answer(Text(20, seed=2)), prompt=prompt)
        jobs = [world.submit(prompt) for prompt in prompts]
        consumer = Consumer(world.make_client, jobs)
        for job_id in jobs:
            consumer.wait_for(10, job_id)
        exchanges = [exchange for prompt in prompts for exchange in world.upstream.requests_for(prompt)]
        frozen.freeze()
        asleep = time.monotonic()
        successor = world.worker()
        seen = consumer.join()
        logs = {job_id: world.check(job_id, [seen[job_id]]) for job_id in jobs}
        wait_until(partial(passed, asleep, 3 * LEASE), "three leases have passed")
        frozen.thaw()
        awake = time.monotonic()
        wait_until(partial(all_closed, exchanges), "every connection of the frozen worker is closed")
        let_go += [each.closed_at - awake for each in exchanges if each.closed_at is not None]
        for job_id in jobs:
            frozen.wait_for("job.ended", job=job_id, status="fenced")
            assert successor.said("job.started", job=job_id, attempt=2)
            assert world.check(job_id) == logs[job_id]
            assert world.last_text(job_id) == expected_text(20, 2)
            TALLY.trials += 1
        # It is as good as new: alone, it runs the next jobs.
        successor.terminate()
        assert successor.wait() == 0
        world.check_text(world.submit(f"after the thaw {trial}"), f"after the thaw {trial}")
        assert len(let_go) == 10 * (trial + 1)
        assert max(let_go) < 1.0
    experiment.note(f"{len(let_go)} connections of frozen workers closed {max(let_go):.3f} s after SIGCONT at most")


def all_closed(exchanges: Sequence[Exchange]) -> bool:
    return all(each.closed_at is not None for each in exchanges)


def passed(since: float, seconds: float) -> bool:
    return time.monotonic() - since >= seconds


@pytest.mark.experiment(23)
def test_attempts_that_keep_dying_end_the_job(make_world: Callable[..., World], valkey_url: str, soak: bool) -> None:
    """A job that takes its worker down every time fails after `max_attempts`, with a code that says so."""
    world = make_world(valkey_url, MILLSTREAM_LEASE=f"{SHORTEST:g}")
    for trial in range(5 if soak else 1):
        prompt = gate = f"kills its worker {trial}"
        world.upstream.on(answer(Text(3, seed=1), WaitFor(gate), Stall()), prompt=prompt)
        job_id = world.submit(prompt, max_attempts=2)
        worker = world.worker()
        for number in (1, 2):
            world.held(gate, number)
            world.wait_until_shown(job_id, number)
            successor = world.worker()
            worker.kill()
            worker = successor
        result = world.outcome(job_id)
        assert result.status == "failed"
        assert result.error is not None
        assert result.error["code"] == "attempts_exhausted"
        assert "worker_lost" in result.error["message"]
        world.check(job_id)
        assert len(world.upstream.requests_for(prompt)) == 2
        worker.end()
        TALLY.trials += 1


@pytest.mark.experiment(23)
def test_a_worker_out_of_memory_ends_nobody_elses_job(make_world: Callable[..., World], valkey_url: str) -> None:
    """RLIMIT_AS below what an answer needs: its job fails with a code that says so, the one beside it completes."""
    world = make_world(valkey_url, MILLSTREAM_LEASE=f"{SHORTEST:g}", MILLSTREAM_RETRIES="1")
    large = [Part("x" * 3_900_000) for _ in range(20)]
    world.upstream.on(answer(Text(3, seed=1), WaitFor("memory"), *large), prompt="needs too much")
    world.upstream.on(answer(Text(3, seed=1), WaitFor("memory"), Text(60, 0.02, seed=2)), prompt="beside it")
    worker = world.worker()
    jobs = {name: world.submit(name, max_attempts=2) for name in ("needs too much", "beside it")}
    world.held("memory", 2)
    _limit_memory(worker, room=2 * 2**20)
    world.upstream.open_gate("memory")
    ended = [world.keys.state(job_id) for job_id in jobs.values()]
    wait_until(lambda: not worker.alive or all(world.redis.hget(each, "ended") for each in ended), "an end, of a kind")
    if not worker.alive:  # it met the limit elsewhere: whoever watches over it starts another
        world.worker()
    refused = world.outcome(jobs["needs too much"])
    assert refused.status == "failed"
    assert refused.error is not None
    assert refused.error["code"] == "attempts_exhausted"
    assert not worker.alive or "out_of_memory" in refused.error["message"]
    assert world.outcome(jobs["beside it"]).text == expected_text(3, 1) + expected_text(60, 2)
    for job_id in jobs.values():
        world.check(job_id)
    raised = [line for line in worker.log.read_text().splitlines() if line.endswith("Error")]
    assert set(raised) <= {"MemoryError"}
    TALLY.trials += 1


def _limit_memory(worker: WorkerProcess, room: int) -> None:
    """So many bytes more than the process has now, and not one beyond."""
    [line] = [line for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines() if line.startswith("VmSize")]
    limit = 1024 * int(line.split()[1]) + room
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (limit, limit))
