"""Many streams for a long time: does memory or latency grow? `python -m bench --long` prints a row every 30 s.

Flat: the median memory of the worker in the last third of the time is at most 8 MB above that of the middle third (the
budget of one long answer; the first third fills each job's buffer of what may have to be sent again, up to 40 KB).
Latencies are printed beside it; how they compare depends on what else the machine does.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from . import proc
from .servers import Subscriber
from .systems import Product
from .toolchain import BenchError
from .world import World, world

STREAMS = 1000
RATE = 20
INTERVAL_S = 30
MEMORY_KB = 8 * 1024


@dataclass(frozen=True)
class Sample:
    """One interval. Times in us, memory in KB."""

    at_s: float
    chunks: int
    cpu_us: float
    p50_us: int
    p99_us: int
    worker_kb: int
    valkey_mb: float

    def line(self) -> str:
        return (
            f"{self.at_s:6.0f} s  {self.chunks:8,} chunks  {self.cpu_us:5.1f} us  p50 {self.p50_us / 1000:6.2f} ms  "
            f"p99 {self.p99_us / 1000:7.2f} ms  worker {self.worker_kb / 1024:6.1f} MB  Valkey {self.valkey_mb:7.1f} MB"
        )


def run(minutes: float) -> bool:
    """Run it, print it; whether every stream ended whole, without gap or double, and memory stayed flat."""
    print(f"{STREAMS} streams of {RATE} chunks/s on one worker for {minutes:g} minutes")
    with world() as here:
        subscriber = here.subscribe(Product.pattern or "")
        system = Product()
        system.start(here, STREAMS)
        for _ in range(STREAMS):
            system.submit(f"stub:rate={RATE},chunks=1000000,hold=1")
        here.processes.wait_until(
            f"{STREAMS} streams to be open", lambda: here.stub.stats()["held"] == STREAMS, seconds=120
        )
        pids = system.pids()
        here.settle(pids)
        here.stub.go()
        time.sleep(5)
        samples = _watch(here, pids, subscriber, minutes)
        here.stub.finish()
        until = time.monotonic() + 60
        while (last := subscriber.look()).ended < STREAMS + 1 and time.monotonic() < until:
            time.sleep(0.1)
    print(f"ended {last.ended - 1} of {STREAMS}, gaps {last.gaps}, duplicates {last.duplicates}, altered {last.odd}")
    return _flat(samples) and last.ended == STREAMS + 1 and not (last.gaps or last.duplicates or last.odd)


def _watch(here: World, pids: list[int], subscriber: Subscriber, minutes: float) -> list[Sample]:
    samples: list[Sample] = []
    began = time.monotonic()
    subscriber.take()
    cpu = proc.cpu_us(pids)
    while (now := time.monotonic() - began) < minutes * 60:
        time.sleep(min(INTERVAL_S, minutes * 60 - now))
        heard, used = subscriber.take(), proc.cpu_us(pids)
        if not heard.chunks:
            raise BenchError(f"no chunk arrived for {INTERVAL_S} s")
        memory = int(here.valkey.info()["used_memory"]) / 2**20
        sample = Sample(
            time.monotonic() - began, heard.chunks, (used - cpu) / heard.chunks, heard.p50_us, heard.p99_us,
            proc.memory_kb(pids)[1], memory,
        )  # fmt: skip
        print(sample.line(), flush=True)
        samples.append(sample)
        cpu = used
    return samples


def _flat(samples: list[Sample]) -> bool:
    third = max(1, len(samples) // 3)
    first, last = samples[third : 2 * third] or samples, samples[-third:]
    grown = statistics.median(s.worker_kb for s in last) - statistics.median(s.worker_kb for s in first)
    p50 = [statistics.median(s.p50_us for s in part) / 1000 for part in (first, last)]
    p99 = [statistics.median(s.p99_us for s in part) / 1000 for part in (first, last)]
    latency = f"p50 {p50[0]:.2f} -> {p50[1]:.2f} ms, p99 {p99[0]:.2f} -> {p99[1]:.2f} ms"
    print(f"worker memory {grown / 1024:+.1f} MB, {latency}")
    return grown <= MEMORY_KB
