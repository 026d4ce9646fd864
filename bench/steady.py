"""One steady-state measurement: so many streams of so many chunks a second, for so many seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from . import proc
from .servers import Heard, Subscriber
from .systems import System, named
from .toolchain import BenchError
from .world import World, world

RATE = 50
"""Chunks per second and stream, as budgets.md has it."""
SETTLE_S = 1.5
"""From the start of all streams to the first mark."""


@dataclass(frozen=True)
class Case:
    """What to measure. `settings` are the product's environment beyond its defaults."""

    system: str
    streams: int
    tls: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        variant = [f"{name.removeprefix('MILLSTREAM_')}={value}" for name, value in self.settings.items()]
        return " ".join([self.system, str(self.streams), *(["TLS"] if self.tls else []), *variant])


@dataclass(frozen=True)
class Steady:
    """What one case cost. Times in us, memory in KB, shares of 1."""

    case: str
    streams: int
    seconds: float
    chunks: int
    events: int
    delivered: float
    """Chunks that arrived, by those the load should have had: below 1 the system, or the bench, did not keep up."""
    cpu_us: float
    """CPU of the processes under test per chunk that arrived."""
    valkey_us: float
    p50_us: int
    p99_us: int
    max_us: int
    idle_pss_kb: int
    pss_kb_per_stream: float
    core_load: float
    """CPU time of the processes under test, as a share of one core."""
    helper_load: float
    """The same of stub, Valkey and subscriber together."""
    foreign_load: float
    """CPU time of everything else on the machine, as a share of one core: noise."""
    gaps: int
    duplicates: int
    odd: int
    unended: int
    """Streams whose end no consumer saw within 20 s of it."""


@dataclass(frozen=True)
class _Mark:
    at: float
    tested_us: int
    valkey_us: int
    helpers_us: int
    busy_us: int
    sent: int
    heard: Heard | None


def _mark(here: World, pids: list[int], subscriber: Subscriber | None, helpers: list[int]) -> _Mark:
    """The readings in an order that keeps those that are divided by each other close together."""
    at, tested = time.monotonic(), proc.cpu_us(pids)
    heard = subscriber.take() if subscriber else None
    sent, valkey = here.stub.stats()["sent"], here.valkey.cpu_us()
    return _Mark(at, tested, valkey, proc.cpu_us(helpers), proc.busy_us({here.core, here.helper_core}), sent, heard)


def measure(case: Case, *, seconds: float) -> Steady:
    """Runs one case in a world of its own. Raises BenchError when it cannot be brought to run."""
    system: System = named(case.system, case.settings)
    with world(tls=case.tls) as here:
        subscriber = here.subscribe(system.pattern) if system.pattern else None
        system.start(here, case.streams)
        idle = proc.memory_kb(system.pids())[1]
        gone = system.jobs_before
        if subscriber:
            listening = subscriber
            here.processes.wait_until("the first job's end", lambda: listening.look().ended == gone, seconds=10)
        for _ in range(case.streams):
            system.submit(f"stub:rate={RATE},chunks=1000000,hold=1")
        # Held: all streams are open before the first chunk flows, so that none is measured while others still start.
        here.processes.wait_until(
            f"{case.streams} streams to be open", lambda: here.stub.stats()["held"] == case.streams, seconds=120
        )
        pids = system.pids()
        here.settle(pids)
        here.stub.go()
        time.sleep(SETTLE_S)
        helpers = [here.stub.process.pid, here.valkey.pid, *([subscriber.process.pid] if subscriber else [])]
        before = _mark(here, pids, subscriber, [*helpers, os.getpid()])
        time.sleep(seconds)
        after = _mark(here, pids, subscriber, [*helpers, os.getpid()])
        pss = proc.memory_kb(pids)[1]
        here.stub.finish()
        last = _ended(subscriber, gone + case.streams) if subscriber else None
        unended = gone + case.streams - last.ended if last else 0
        return _steady(case, before, after, (idle, pss), last, unended)


def _ended(subscriber: Subscriber, jobs: int) -> Heard:
    """What was heard once every job had ended, or after 20 s."""
    until = time.monotonic() + 20
    while (heard := subscriber.look()).ended < jobs and time.monotonic() < until:
        time.sleep(0.05)
    return heard


def _steady(case: Case, before: _Mark, after: _Mark, pss: tuple[int, int], last: Heard | None, unended: int) -> Steady:
    passed = after.at - before.at
    heard = after.heard
    chunks = heard.chunks if heard else after.sent - before.sent  # the floor publishes nothing: count what it was sent
    if not chunks:
        raise BenchError(f"{case.label}: not one chunk arrived within {passed:.1f} s")
    tested, helpers = after.tested_us - before.tested_us, after.helpers_us - before.helpers_us
    foreign = after.busy_us - before.busy_us - tested - helpers
    # The baseline's idle workers are as many as its streams: a stream there costs all of its two processes.
    base = 0 if case.system == "naive" else pss[0]
    return Steady(
        case=case.label,
        streams=case.streams,
        seconds=passed,
        chunks=chunks,
        events=heard.events if heard else 0,
        delivered=chunks / (passed * RATE * case.streams),
        cpu_us=tested / chunks,
        valkey_us=(after.valkey_us - before.valkey_us) / chunks,
        p50_us=heard.p50_us if heard else 0,
        p99_us=heard.p99_us if heard else 0,
        max_us=heard.max_us if heard else 0,
        idle_pss_kb=pss[0],
        pss_kb_per_stream=(pss[1] - base) / case.streams,
        core_load=tested / 1e6 / passed,
        helper_load=helpers / 1e6 / passed,
        foreign_load=max(foreign, 0) / 1e6 / passed,
        gaps=last.gaps if last else 0,
        duplicates=last.duplicates if last else 0,
        odd=last.odd if last else 0,
        unended=unended,
    )
