"""Which measurements a run makes, in which order, and what it keeps of them."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import redis

from . import acquire, big_answer, first_chunk, log_memory, per_job, steady
from .acquire import Acquire
from .big_answer import BigAnswer
from .first_chunk import FirstChunk
from .log_memory import LogMemory
from .per_job import PerJob
from .steady import Case, Steady
from .toolchain import BenchError

AT_ONCE = {"MILLSTREAM_FLUSH_MS": "0"}
WINDOW = {"MILLSTREAM_FLUSH_MS": "5"}

NAIVE = (10, 25)
PRODUCT = (10, 50, 200, 500, 700, 1000)
# Baseline and product take turns, so that what drifts on the machine drifts for both.
FULL = (
    Case("product", 10),
    Case("naive", 10),
    Case("product", 50),
    Case("product", 200),
    Case("naive", 25),
    Case("product", 500),
    Case("product", 700),
    Case("product", 1000),
    Case("product", 200, settings=AT_ONCE),
    Case("product", 200, settings=WINDOW),
    Case("product", 500, tls=True),
    Case("product", 700, tls=True),
    Case("floor", 200),
    Case("floor", 500),
)
QUICK = (Case("product", 50), Case("naive", 25), Case("product", 200))

T = TypeVar("T")


@dataclass
class Results:
    """Everything one run of the bench found; `steady` by the case's label, as medians over the rounds."""

    steady: dict[str, Steady] = field(default_factory=dict)
    first_chunk: dict[str, FirstChunk] = field(default_factory=dict)
    per_job: dict[str, PerJob] = field(default_factory=dict)
    big_answer: BigAnswer | None = None
    log_memory: LogMemory | None = None
    acquire: Acquire | None = None
    failures: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    seconds: float = 0.0


def median(runs: list[Steady]) -> Steady:
    """Field by field; what must never happen (gaps, duplicates, odd texts, unended streams) is summed instead."""
    summed = ("gaps", "duplicates", "odd", "unended")
    merged: dict[str, Any] = {"case": runs[0].case}
    for name in (f.name for f in dataclasses.fields(Steady) if f.name != "case"):
        values = [getattr(run, name) for run in runs]
        merged[name] = sum(values) if name in summed else statistics.median(values)
    return Steady(**merged)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _try(results: Results, label: str, measurement: Callable[[], T]) -> T | None:
    """One measurement; where it cannot be made the bench says why, goes on, and will not end with status 0."""
    try:
        found = measurement()
    except (BenchError, OSError, redis.RedisError) as error:
        results.failures[label] = str(error) or type(error).__name__
        _say(f"  {label}: not measured: {error}")
        return None
    if isinstance(found, Steady):
        latency = f"p50 {found.p50_us / 1000:.2f} ms, p99 {found.p99_us / 1000:.1f} ms"
        noise = f", {found.foreign_load:.0%} of a core taken by others" if found.foreign_load > 0.1 else ""
        _say(f"  {label}: {found.cpu_us:.1f} us CPU per chunk, {latency}, {found.delivered:.1%} of the load{noise}")
    else:
        _say(f"  {label}: done")
    return found


def run(cases: tuple[Case, ...], *, rounds: int, seconds: float, single: bool) -> Results:
    """The cases, `rounds` times over, `seconds` each; with `single` also what is not measured under a steady load."""
    began, results = time.monotonic(), Results(rounds=rounds)
    runs: dict[str, list[Steady]] = {}
    for number in range(1, rounds + 1):
        _say(f"round {number} of {rounds}")
        for case in cases:
            if case.label in results.failures:
                continue  # what did not run once is not waited for again
            if found := _try(results, case.label, partial(steady.measure, case, seconds=seconds)):
                runs.setdefault(case.label, []).append(found)
    results.steady = {label: median(found) for label, found in runs.items()}
    if single:
        _singles(results)
    results.seconds = time.monotonic() - began
    return results


def _singles(results: Results) -> None:
    _say("single jobs")
    for name in ("product", "naive"):
        if first := _try(results, f"first chunk, {name}", partial(first_chunk.measure, name)):
            results.first_chunk[name] = first
    for name, few, many in (("product", 200, 2200), ("naive", 20, 220), ("floor", 200, 2200)):
        if job := _try(results, f"per job, {name}", partial(per_job.measure, name, few, many)):
            results.per_job[name] = job
    results.acquire = _try(results, "acquire", acquire.measure)
    results.log_memory = _try(results, "log memory", log_memory.measure)
    results.big_answer = _try(results, "100 MB answer", big_answer.measure)
