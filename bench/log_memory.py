"""What the log of a job takes in Redis, while it is written and after its end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from .stamps import WIDTH
from .systems import Product
from .world import world

_REPACK_S = 30


@dataclass(frozen=True)
class LogMemory:
    """Bytes by MEMORY USAGE of all logs, keys included; `packs` are stream entries, `events` the last seqs, summed.

    `after_bytes` is what is kept once the ended logs have stopped shrinking; `repacked` tells whether they did shrink.
    """

    jobs: int
    events: int
    packs: int
    chunks: int
    live_bytes: int
    after_bytes: int
    after_packs: int
    repacked: bool

    @property
    def live_per_event(self) -> float:
        return self.live_bytes / self.events

    @property
    def allowed_after(self) -> int:
        """The text, 8 bytes an event and 1 KB a job, in bytes."""
        return self.chunks * WIDTH + 8 * self.events + 1024 * self.jobs


def measure(*, jobs: int = 10, chunks: int = 1000, rate: int = 100) -> LogMemory:
    """Few streams on an idle line: as near to one event a pack as the product comes."""
    product = Product()
    with world() as here:
        product.start(here, 200)
        here.settle(product.pids())
        target = here.stub.stats()["sent"] + jobs * chunks
        ids = [product.submit(f"stub:rate={rate},chunks={chunks},linger=1") for _ in range(jobs)]
        logs = _Logs(here.valkey.client, ids)
        here.processes.wait_until(
            "all chunks to be sent", lambda: here.stub.stats()["sent"] >= target, seconds=30 + chunks / rate
        )
        live = logs.at_rest()
        here.stub.finish()
        here.processes.wait_until("the jobs to end", lambda: all(_completed(product, job) for job in ids), seconds=20)
        # Repacking is the product's own business and in its own time: wait for it, but not for ever.
        until = time.monotonic() + _REPACK_S
        while (after := logs.at_rest()).packs >= live.packs and time.monotonic() < until:
            pass
    return LogMemory(
        jobs,
        live.events,
        live.packs,
        jobs * chunks,
        live.size,
        after.size,
        after.packs,
        repacked=after.packs < live.packs,
    )


def _completed(product: Product, job: str) -> bool:
    return str(product.client.status(job).status) == "completed"


@dataclass(frozen=True)
class _Weight:
    packs: int
    events: int
    size: int


class _Logs:
    """The logs of some jobs, in Redis."""

    def __init__(self, client: Any, jobs: list[str]) -> None:
        self._client = client
        self._keys = [f"millstream:{{{job}}}:log" for job in jobs]

    def weigh(self) -> _Weight:
        packs = events = size = 0
        for key in self._keys:
            packs += int(self._client.xlen(key))
            newest = self._client.xrevrange(key, count=1)
            events += int(newest[0][0].partition("-")[0]) if newest else 0  # an entry's id is LASTSEQ-0
            size += int(self._client.memory_usage(key, samples=0) or 0)
        return _Weight(packs, events, size)

    def at_rest(self) -> _Weight:
        """The weight once it is the same twice, half a second apart."""
        weight = None
        while (now := self.weigh()) != weight:
            weight = now
            time.sleep(0.5)
        return now
