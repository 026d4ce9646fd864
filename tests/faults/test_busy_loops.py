"""A worker whose loop is kept busy: by jobs that are costly to ask for, or by what nobody thought of."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Final

import pytest

from millstream.events import Chunk
from tests.contract.consumers import Consumer
from tests.faults.report import Experiment
from tests.tally import TALLY
from tests.upstream import Text, answer, expected_text
from tests.worker_process import WorkerProcess
from tests.world import LEASE, SHORTEST, World

COSTLY: Final[list[dict[str, Any]]] = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {f"p{n}": {"type": "string"} for n in range(60_000)}}},
    }
]
"""A request of 1.6 MB that takes a third of a second to make: its tool has 60,000 parameters."""


@pytest.mark.experiment(16)
def test_costly_requests_cost_nobody_a_lease(world: World, experiment: Experiment) -> None:
    """12 jobs that each keep the loop busy for up to a third of a second, all at once: no lease runs out."""
    world.upstream.on(answer(Text(100, 0.05, seed=1)), prompt="beside")
    beside = world.submit("beside", lane="batch")
    jobs = [world.submit(f"costly {number}", lane="batch", tools=COSTLY) for number in range(12)]
    consumer = Consumer(world.make_client, [beside])
    watching = world.worker("--lane", "interactive")  # has nothing to do but to sweep
    world.worker()
    for number, job_id in enumerate(jobs):
        world.check_text(job_id, f"costly {number}")
        assert world.starts(job_id) == [(1, None)]
    world.outcome(beside)
    world.check(beside, [consumer.join()[beside]])
    assert world.starts(beside) == [(1, None)]
    # A slow machine may need longer than the patience to read them all: what is delivered again then finds a lease.
    assert not watching.said("sweep.delivered_again", because="lost")
    ats = [event.at for event in world.client.follow(beside) if isinstance(event, Chunk)]
    pause = max(later - earlier for earlier, later in itertools.pairwise(ats))
    experiment.note(f"a stream beside 12 requests of 0.3 s each paused for {pause:.2f} s at most")
    TALLY.trials += len(jobs)


BUSY: Final = """
import os, signal, sys, time

def keep_busy(*_):
    time.sleep(float(os.environ["BUSY_FOR"]))

signal.signal(signal.SIGUSR1, keep_busy)  # in the loop's own thread
from worker.__main__ import main
sys.exit(main())
"""
PROGRAM: Final = (sys.executable, "-c", BUSY)


def keep_busy(worker: WorkerProcess) -> None:
    os.kill(worker.pid, signal.SIGUSR1)


@pytest.mark.experiment(16)
def test_a_loop_that_is_busy_for_two_leases_keeps_its_jobs(world: World) -> None:
    """Whatever stands in its way, a thread renews the leases meanwhile and says where the loop is; nothing is lost."""
    world.upstream.on(answer(Text(90, 0.05, seed=1)), prompt="beside a busy one")
    job_id = world.submit("beside a busy one")
    consumer = Consumer(world.make_client, [job_id])
    worker = world.worker(program=PROGRAM, BUSY_FOR=f"{2 * LEASE:g}")
    consumer.wait_for(5)
    other = world.worker()
    keep_busy(worker)
    said = worker.wait_for("loop.busy")
    assert any("keep_busy" in place for place in said["at"])
    worker.wait_for("loop.free")
    assert world.outcome(job_id).text == expected_text(90, 1)
    world.check(job_id, [consumer.join()[job_id]])
    assert world.starts(job_id) == [(1, None)]
    assert not other.said("sweep.delivered_again", because="lost")
    TALLY.trials += 1


@pytest.mark.experiment(16)
def test_a_loop_that_never_comes_back_ends_its_worker(make_world: Callable[..., World], valkey_url: str) -> None:
    """After four leases the process ends, with the place in its log and a status that is no success."""
    world = make_world(valkey_url, MILLSTREAM_LEASE=f"{SHORTEST:g}")
    world.upstream.on(answer(Text(None, 0.05, seed=1)), answer(Text(20, seed=2)), prompt="stuck")
    job_id = world.submit("stuck")
    worker = world.worker(program=PROGRAM, BUSY_FOR="3600")
    world.wait_for_seq(job_id, 5)
    keep_busy(worker)
    world.worker()
    assert worker.wait() == 1
    [said] = worker.said("loop.stuck")
    assert any("keep_busy" in place for place in said["at"])
    assert world.outcome(job_id).text == expected_text(20, 2)
    world.check(job_id)
    assert world.starts(job_id) == [(1, None), (2, "worker_lost")]
    world.check_left()
    TALLY.trials += 1
