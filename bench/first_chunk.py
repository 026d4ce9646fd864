"""How long a job takes on an idle system from being handed in to its first chunk at a live consumer."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass

from .subscriber import Subscription, Tally
from .systems import System, named
from .toolchain import BenchError
from .world import World, world

_PAUSE_S = 0.25
"""Between two jobs: a stock RQ worker needs some of it to bury its work-horse. Varied, to meet no timer in step."""


@dataclass(frozen=True)
class FirstChunk:
    """Milliseconds from before submit to the first content at the subscriber, the upstream's own time taken off."""

    system: str
    trials: int
    median_ms: float
    worst_ms: float
    upstream_ms: float


def measure(name: str, *, trials: int = 30) -> FirstChunk:
    system: System = named(name)
    with world() as here:
        assert system.pattern is not None
        system.start(here, 1 if name == "naive" else 200)
        subscription = Subscription(here.valkey.host, here.valkey.port, system.pattern)
        here.settle(system.pids())
        before, waits = here.stub.stats(), []
        for _ in range(trials):
            time.sleep(_PAUSE_S + random.random() * 0.05)
            waits.append(_one(here, system, subscription))
        subscription.close()
        after = here.stub.stats()
    requests = after["requests"] - before["requests"]
    own = (after["first_us"] - before["first_us"]) / max(requests, 1) / 1000
    return FirstChunk(name, trials, statistics.median(waits) - own, max(waits) - own, own)


def _one(here: World, system: System, subscription: Subscription) -> float:
    """Streams one job to its end; returns its milliseconds to the first chunk."""
    tally, first = Tally(), 0.0
    began = time.monotonic_ns()
    job = f"{{{system.submit('stub:rate=50,chunks=3,phase=0')}}}".encode()
    until = began + 20 * 10**9
    while not tally.ended:
        here.processes.check()
        for channel, data in subscription.messages():
            if job in channel:
                tally.message(channel, data, 0)
                first = first or (time.monotonic_ns() - began) / 1e6 if tally.chunks else 0.0
        if time.monotonic_ns() > until:
            raise BenchError(f"{system.name}: a job on an idle system did not end within 20 s")
    return first
