"""Which of the jobs in hand may begin: those that need no ticket, and those that get one; the others wait in line.

A job that waits is in Redis alone, in the line of its meter. Whichever worker has a free slot when the next is due
takes the first of the line, whoever put it there. So workers know of every line: they look once a second, and when they
read the specs of what they took, which costs no round trip of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

import redis.exceptions
import structlog

from millstream.async_client import AsyncClient
from millstream.calls import Call
from millstream.errors import RedisUnavailable, SpecError
from millstream.job import Spec
from millstream.meters import UNUSED, Acquired, Meter, Place
from millstream.redis_door import translated

from .choice import PATIENCE, Upstreams, preferred
from .limiter import Grant, Limiter, TooLarge
from .line import KeysBrokenError
from .rq_worker import Entry

LOOK: Final = 1.0
"""Seconds between looks at the lines that other workers keep."""

log = structlog.get_logger()

T = TypeVar("T")
Leave = Grant | TooLarge | None
Specs = Mapping[str, Spec | SpecError]
"""By delivery."""


class Insist(Protocol):
    """Asks Redis until it answers."""

    def __call__(self, ask: Callable[[], Awaitable[T]], /) -> Awaitable[T]: ...


@dataclass(slots=True)
class Admitted:
    """`begin`: the entries that go on to the claim, some of them only to fail as too large; `leaves`: by delivery.

    `others`: grants by delivery of jobs that came first in a line and are not among the entries; `anew`: deliveries
    that left a line because its limit was lowered; `put_off`: entries whose meter is broken; a sweep brings them back.
    """

    begin: list[Entry] = field(default_factory=list)
    leaves: dict[str, Leave] = field(default_factory=dict)
    others: list[dict[str, Grant]] = field(default_factory=list)
    anew: list[str] = field(default_factory=list)
    put_off: list[Entry] = field(default_factory=list)


class Tickets:
    """The way from an entry to its ticket."""

    def __init__(self, client: AsyncClient, upstreams: Upstreams, limiter: Limiter) -> None:
        self._client = client
        self._upstreams = upstreams
        self._limiter = limiter
        self._look_at = 0.0

    @property
    def lines(self) -> bool:
        """Whether jobs wait for a limit of this worker's upstreams."""
        return self._limiter.lines

    def patience(self) -> float:
        """Seconds until it is worth asking for a line, or until it is time to look for lines."""
        now = asyncio.get_running_loop().time()
        wait = self._look_at - now
        if self._limiter.next_ask is not None:
            wait = min(wait, self._limiter.next_ask - now)
        return max(0.0, wait)

    async def moves(self) -> None:
        """Return when something was settled that a line may have waited for."""
        await self._limiter.freed.wait()

    # What Redis knows of limits ----------------------------------------------------------------------------------

    def ask(self, pipe: Any) -> None:
        """Add to a pipeline what `note` wants to know."""
        pipe.time()
        pipe.zrange(self._client.keys.waiting, 0, -1, withscores=True)
        pipe.zrange(self._client.keys.learned, 0, -1, withscores=True)

    def note(self, replies: Sequence[Any]) -> None:
        """The three replies to `ask`."""
        for reply in replies:
            if isinstance(reply, redis.exceptions.RedisError):
                if "WRONGTYPE" not in str(reply):
                    raise RedisUnavailable(str(reply)) from reply
                keys = self._client.keys
                remedy = f"delete what is no sorted set of {keys.waiting} and {keys.learned}"
                log.error("limits.broken", meter="all", reason=str(reply), remedy=remedy)
        (seconds, micros), waiting, learned = [each if isinstance(each, list | tuple) else () for each in replies]
        self._limiter.note(seconds * 1000 + micros // 1000, waiting, learned)
        self._look_at = asyncio.get_running_loop().time() + LOOK

    async def _look(self) -> None:
        pipe = self._client.redis.pipeline(transaction=False)
        self.ask(pipe)
        with translated(self._client.settings.redis_url):
            replies = await pipe.execute(raise_on_error=False)
        self.note(replies)

    # Tickets -----------------------------------------------------------------------------------------------------

    async def due(
        self, free: Callable[[], int], insist: Insist
    ) -> AsyncIterator[tuple[dict[str, Grant], Sequence[str]]]:
        """Of the lines whose time has come: grants by delivery, and deliveries to be counted anew since they are too
        large now; at most as many as there are slots `free`.
        """
        self._limiter.freed.clear()
        if asyncio.get_running_loop().time() >= self._look_at:
            await self._look()
        for meter in self._limiter.to_ask():
            if free() > 0:
                taken = await self._take(meter, self._limiter.acquire(meter, (), free()), insist)
                if taken is not None and (taken[0].granted or taken[0].too_large):
                    yield taken[1], list(taken[0].too_large)

    async def admit(self, entries: Sequence[Entry], specs: Specs, free: int, insist: Insist) -> Admitted:
        """Sort entries into those that may begin now and those that wait in line from now on."""
        admitted = Admitted()
        lines: dict[Meter, list[Entry]] = {}
        for entry in entries:
            meter = self._metered(specs[entry.rq_job.id])
            if meter is None:
                admitted.begin.append(entry)
            else:
                lines.setdefault(meter, []).append(entry)
        for meter, group in lines.items():
            want = free - len(admitted.begin) - sum(map(len, admitted.others))
            await self._join(meter, group, specs, max(0, want), insist, admitted)
        return admitted

    def _metered(self, spec: Spec | SpecError) -> Meter | None:
        """The meter whose ticket the job needs; None when it needs none."""
        if isinstance(spec, SpecError):
            return None
        serving = self._upstreams.serving(spec.model)
        for upstream in preferred(serving):
            meter = self._limiter.meter(upstream, spec.model)
            if not self._limiter.watches(meter):
                return None
            if self._limiter.busy_for(meter) <= PATIENCE:
                return meter
        return self._limiter.meter(serving[0], spec.model) if serving else None

    async def _join(
        self, meter: Meter, group: Sequence[Entry], specs: Specs, want: int, insist: Insist, admitted: Admitted
    ) -> None:
        call = self._limiter.acquire(meter, [self._place(entry, specs) for entry in group], want)
        taken = await self._take(meter, call, insist)
        if taken is None:
            admitted.put_off += group
            return
        found, grants = taken
        asked = {entry.rq_job.id for entry in group}
        leaves: dict[str, Leave] = {delivery: grant for delivery, grant in grants.items() if delivery in asked}
        for delivery, tokens in found.too_large.items():
            if delivery in asked:
                leaves[delivery] = TooLarge(tokens, meter.limits.tokens, meter.upstream)
            else:
                admitted.anew.append(delivery)
        admitted.leaves.update(leaves)
        admitted.begin += [entry for entry in group if entry.rq_job.id in leaves]
        if others := {delivery: grant for delivery, grant in grants.items() if delivery not in asked}:
            admitted.others.append(others)
        if left := len(asked) - len(leaves):
            log.info("limits.in_line", meter=meter.name, jobs=left, waiting=found.waiting, because=found.because)

    async def _take(
        self, meter: Meter, call: Call[Acquired], insist: Insist
    ) -> tuple[Acquired, dict[str, Grant]] | None:
        """The same call until it is answered: only so its tickets are not lost with a reply. None: a broken meter."""

        async def ask() -> tuple[Acquired, dict[str, Grant]] | None:
            try:
                return await self._limiter.take(meter, call)
            except KeysBrokenError:
                return None

        return await insist(ask)

    def _place(self, entry: Entry, specs: Specs) -> Place:
        spec = specs[entry.rq_job.id]
        assert isinstance(spec, Spec)
        lane = self._client.keys.lane_of(entry.rq_job.origin)
        return self._limiter.place(entry.rq_job.id, entry.job_id, spec, lane, entry.since)

    def give_back(self, leave: Leave) -> None:
        """Its job does not begin."""
        if isinstance(leave, Grant):
            self._limiter.settle(leave, UNUSED)
