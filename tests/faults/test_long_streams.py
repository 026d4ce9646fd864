"""Many streams for a while in one worker: memory stays flat, and nobody falls behind."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Final

import pytest

from millstream import Event
from millstream.events import Chunk
from tests.contract.consumers import Consumer
from tests.faults.report import Experiment
from tests.oracle import check_log
from tests.tally import TALLY
from tests.upstream import expected_text, seed_of
from tests.upstream_process import an_upstream
from tests.worker_process import memory_of, wait_until
from tests.world import World

PACE: Final = 0.05
"""Seconds between two chunks of a stream: 20 a second."""

FLAT: Final = 8 * 2**20
"""Bytes the worker may grow by once every stream has filled its buffers."""

A_STREAM: Final = 100 * 1024
"""Bytes a stream may take of the worker, all its buffers included."""

LAG: Final = 0.5
"""Seconds by which the median chunk of the last third may come later, against its schedule, than that of the first."""

PROBES: Final = 5


class Probe:
    """Follows one job and notes how late each chunk comes against its schedule (s), the first chunk being on time."""

    def __init__(self, world: World, job_id: str) -> None:
        self.lags: list[float] = []
        self._count = 0
        self._began = 0.0
        self.consumer = Consumer(world.make_client, [job_id], on_event=self._take)

    def _take(self, event: Event) -> None:
        if isinstance(event, Chunk) and event.content:
            now = time.monotonic()
            self._began = self._began or now
            self._count += event.n
            self.lags.append(now - self._began - (self._count - 1) * PACE)


@pytest.mark.experiment(33)
def test_many_streams_keep_their_pace_and_the_worker_its_size(
    make_world: Callable[..., World], valkey_url: str, experiment: Experiment, request: pytest.FixtureRequest
) -> None:
    """200 streams of 20 chunks/s for some seconds; with --soak-minutes N, 1,000 streams for N minutes."""
    minutes: float = request.config.getoption("soak_minutes")
    streams, seconds = (1000, minutes * 60) if minutes else (200, 5.0)
    chunks = int(seconds / PACE)
    with an_upstream() as upstream:
        world = make_world(
            valkey_url, OPENAI_BASE_URL=upstream.base_url, MILLSTREAM_STREAMS=str(streams),
            MILLSTREAM_MODEL=f"scripted:chunks={chunks},pace={PACE}",
        )  # fmt: skip
        worker = world.worker()
        world.check_text(world.submit("warm", model="scripted:chunks=5"), "warm", 5)
        before = memory_of(worker.pid)
        prompts = [f"long {number}" for number in range(streams)]
        jobs = [job.id for job in world.client.submit_many([{"prompt": prompt} for prompt in prompts])]
        wait_until(lambda: upstream.open_streams() == streams, "all are open at the same time")
        probes = [Probe(world, job_id) for job_id in jobs[:: streams // PROBES]]
        sizes = [memory_of(worker.pid)]
        while upstream.open_streams():
            time.sleep(min(1.0, seconds / 30))
            sizes.append(memory_of(worker.pid))
        for job_id, prompt in zip(jobs, prompts, strict=True):
            assert world.outcome(job_id).text == expected_text(chunks, seed_of(prompt))
            TALLY.events += len(check_log(world.client, job_id))
            assert world.starts(job_id) == [(1, None)]
        for probe in probes:
            probe.consumer.join()
    world.check_left()
    TALLY.trials += streams
    third = len(sizes) // 3
    grown = statistics.median(sizes[-third:]) - statistics.median(sizes[third : 2 * third])
    lags = [_growth(probe.lags) for probe in probes]
    a_stream = (max(sizes) - before) / streams
    experiment.note(
        f"{streams} streams for {seconds:g} s: {a_stream / 1024:.0f} KB each, {grown / 2**20:+.1f} MB from the "
        f"middle third to the last, lag {max(lags):+.3f} s from the first third to the last"
    )
    assert a_stream < A_STREAM
    assert grown < FLAT
    assert max(lags) < LAG


def _growth(lags: list[float]) -> float:
    third = max(1, len(lags) // 3)
    return statistics.median(lags[-third:]) - statistics.median(lags[:third])
