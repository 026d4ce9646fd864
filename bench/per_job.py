"""What a job costs beside its chunks, as a slope: many jobs less few jobs, so that starting and ending cancel out.

The jobs are queued before the workers start (in burst mode, which ends when nothing is left), so neither the producer's
CPU nor its commands are counted.

- product: jobs of one chunk. Each pays RQ, claim, limits, the upstream request, three events and the end. From this the
  same requests made by the floor are taken off; what remains is all that surrounds the request, RQ's bookkeeping being
  a part of it. The product's figure is thus an upper bound.
- naive: a function that does nothing (`time.time`), on one stock `rq worker`: RQ's bookkeeping and its fork, no more.

Round trips are Valkey's `total_reads_processed`: a pipeline or a script call that arrives in one read counts as one.
"""

from __future__ import annotations

import resource
import subprocess
import time
from dataclasses import dataclass

from . import proc
from .systems import Floor, Naive, Product
from .toolchain import BenchError
from .world import World, world

_ONE_CHUNK = "stub:rate=0,chunks=1"


@dataclass(frozen=True)
class PerJob:
    """Per job of the slope: CPU and wall-clock ms, reads and commands of the server."""

    system: str
    jobs: int
    cpu_ms: float
    wall_ms: float
    reads: float
    commands: float

    @property
    def jobs_per_second(self) -> float:
        return 1000 / self.wall_ms


@dataclass(frozen=True)
class _Burst:
    cpu_ms: float
    wall_ms: float
    reads: int
    commands: int


def measure(name: str, few: int, many: int) -> PerJob:
    """The slope between `few` and `many` jobs."""
    low, high = _burst(name, few), _burst(name, many)
    jobs = many - few
    return PerJob(
        name,
        jobs,
        (high.cpu_ms - low.cpu_ms) / jobs,
        (high.wall_ms - low.wall_ms) / jobs,
        (high.reads - low.reads) / jobs,
        (high.commands - low.commands) / jobs,
    )


def _burst(name: str, jobs: int) -> _Burst:
    with world() as here:
        if name == "product":
            _queue_for_product(here, jobs)
        elif name == "naive":
            _queue_for_naive(here, jobs)
        reads, commands = _served(here)
        began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = _start(name, here)
        proc.pin([process.pid], here.core)
        if process.stdin:
            process.stdin.write(f"{_ONE_CHUNK}\n" * jobs)
            process.stdin.close()
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{name}: {jobs} small jobs were not done within 120 s") from None
        wall, now = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            here.processes.check()
        _check(name, here, jobs)
        after = _served(here)
    # Of reaped children: this one alone was waited for meanwhile, its own children are in its account.
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return _Burst(cpu * 1000, wall * 1000, after[0] - reads, after[1] - commands)


def _queue_for_product(here: World, jobs: int) -> None:
    from millstream import Client

    with Client(redis_url=here.valkey.url) as client:
        for _ in range(jobs):
            client.submit("Write a quicksort", model=_ONE_CHUNK)


def _queue_for_naive(here: World, jobs: int) -> None:
    import redis
    from rq import Queue

    queue = Queue("naive", connection=redis.Redis.from_url(here.valkey.url))
    for _ in range(jobs):
        queue.enqueue("time.time")


def _start(name: str, here: World) -> subprocess.Popen[str]:
    if name == "product":
        return Product().spawn(here, 200, "--burst")
    if name == "naive":
        return Naive().spawn(here, "--burst")
    return Floor().spawn(here, 200)


def _check(name: str, here: World, jobs: int) -> None:
    """Raises BenchError unless every job was really done."""
    done = here.stub.stats()["finished"] if name != "naive" else here.valkey.client.zcard("rq:finished:naive")
    if done != jobs:
        raise BenchError(f"{name}: {done} of {jobs} small jobs were done")


def _served(here: World) -> tuple[int, int]:
    info = here.valkey.info()
    return int(info["total_reads_processed"]), int(info["total_commands_processed"])
