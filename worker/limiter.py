"""The worker's side of the shared limiter: which meters there are, the tickets this process holds, what it tells Redis.

Taking tickets for jobs that begin is the intake's; a running job's further requests ask here. What is settled, renewed
or learned is sent by one task, in batches, so that no stream waits for it. Where no limit is set and no upstream has
set one, nothing is asked of Redis.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import structlog

from millstream import meters
from millstream.calls import Call
from millstream.errors import RedisUnavailable
from millstream.job import Spec
from millstream.keys import Keys
from millstream.meters import SLACK, UNUSED, Acquired, Leave, Meter, Place, Settlement

from .estimate import answer_tokens, prompt_tokens
from .line import KeysBrokenError

AWAY: Final = 0.5
"""Seconds between tries while Redis is away."""

TELL_EVERY: Final = 1 / 60
"""Of a window: how often at most one process repeats what a meter's upstream says of its counts."""

BROKEN: Final = 60.0
"""Seconds that a meter is left alone whose keys in Redis are not the limiter's."""

FRESH: Final = 1 / 2
"""Of the slack: the age at which a ticket that was not used yet is given back, which leaves the rest for the request's
way to the upstream."""

log = structlog.get_logger()


class Metered(Protocol):
    """What the limiter wants to know of an upstream."""

    @property
    def name(self) -> str:
        """Its name in the settings."""

    @property
    def settings(self) -> Any:
        """Its settings: what it calls a model, and the limits of that."""


@dataclass(slots=True, eq=False)
class Grant:
    """A ticket in hand: leave for one request. `asked_at`: the loop's time before it was asked for."""

    meter: Meter
    ticket: str
    tokens: int
    asked_at: float

    def fresh(self, now: float) -> bool:
        """Whether a request that is made now is counted where it belongs."""
        return now - self.asked_at < self.meter.limits.window * SLACK * FRESH


@dataclass(frozen=True, slots=True)
class TooLarge:
    """The job can never be asked for: it takes more than a window's tokens."""

    tokens: int
    limit: int
    upstream: str


@dataclass(slots=True)
class _Told:
    """What waits to be sent for one meter."""

    meter: Meter
    settled: list[Settlement] = field(default_factory=list)
    learned: list[Call[float]] = field(default_factory=list)


class Limiter:
    """All meters of one process."""

    def __init__(
        self, run: Callable[[Call[Any]], Awaitable[Any]], keys: Keys, *, lease: float, asker: str,
        upstreams: Iterable[Metered], lanes: Sequence[str], intermediate: Sequence[str],
    ) -> None:  # fmt: skip
        self._run, self._keys, self._lease = run, keys, lease
        self._asker = f"{asker}:{secrets.token_hex(4)}"
        self._numbers = itertools.count(1)
        self._upstreams = {each.name: each for each in upstreams}
        self._lanes, self._intermediate = lanes, intermediate
        self._known: dict[tuple[str, str], Meter] = {}
        self._learned: dict[str, float] = {}  # by meter, until when an upstream's word holds
        self._due: dict[str, float] = {}  # by meter with a line, when it is worth asking
        self._tickets: dict[str, set[str]] = defaultdict(set)
        self._told: dict[str, _Told] = {}
        self._counted: dict[str, float] = {}
        self._broken: dict[str, float] = {}  # by meter whose keys are broken, until when it is left alone
        self._work = asyncio.Event()
        self.freed = asyncio.Event()
        """Set when a line may move on."""

    # Which meters ------------------------------------------------------------------------------------------------

    def meter(self, upstream: Metered, model: str) -> Meter:
        """The meter of a job's model at this upstream."""
        found = self._known.get((upstream.name, model))
        if found is None:
            called = upstream.settings.model(model)
            found = Meter(upstream.name, called, upstream.settings.limits_of(called))
            if len(self._known) > 10_000:
                self._known.clear()
            self._known[upstream.name, model] = found
        return found

    def watches(self, meter: Meter) -> bool:
        """Whether requests of this meter need tickets now."""
        return bool(meter.limits) or meter.name in self._due or self._learned.get(meter.name, 0.0) > self._now()

    def busy_for(self, meter: Meter) -> float:
        """At least so many seconds nobody more in line gets a ticket; 0.0 where that is not known."""
        return max(0.0, self._due.get(meter.name, 0.0) - self._now())

    def note(self, now_ms: int, waiting: Sequence[tuple[bytes, float]], learned: Sequence[tuple[bytes, float]]) -> None:
        """What Redis says: meters with a line, by when their next job is due, and meters that upstreams limit (ms)."""
        here = self._now()
        self._learned = {name.decode(): here + (until - now_ms) / 1000 for name, until in learned if until > now_ms}
        self._due = {
            name: here + max(0.0, (at - now_ms) / 1000)
            for name, at in ((name.decode(), at) for name, at in waiting)
            if name.partition("/")[0] in self._upstreams
        }

    @property
    def lines(self) -> bool:
        """Whether jobs wait for a limit of this worker's upstreams."""
        return self.next_due is not None

    @property
    def next_due(self) -> float | None:
        """When a line is due next (the loop's time)."""
        now = self._now()
        return min((at for name, at in self._due.items() if self._broken.get(name, now) <= now), default=None)

    def due(self) -> list[Meter]:
        """The meters whose line is due."""
        now = self._now()
        return [self._named(name) for name, at in self._due.items() if at <= now and self._broken.get(name, now) <= now]

    def _named(self, name: str) -> Meter:
        upstream, _, model = name.partition("/")
        return Meter(upstream, model, self._upstreams[upstream].settings.limits_of(model))

    # Tickets -----------------------------------------------------------------------------------------------------

    def acquire(self, meter: Meter, places: Sequence[Place], want: int) -> Call[Acquired]:
        """The call that lets deliveries join the line and takes up to `want` tickets for the first of it.

        One at a time, and again the same until it is answered; see `take`.
        """
        return meters.acquire(
            self._keys, meter, places, lease=self._lease, asker=self._asker, number=next(self._numbers), want=want,
            lanes=self._lanes, intermediate=self._intermediate,
        )  # fmt: skip

    async def take(self, meter: Meter, call: Call[Acquired]) -> tuple[Acquired, dict[str, Grant]]:
        """Run an acquire; the grants are by delivery. Raises RedisUnavailable, KeysBrokenError for a broken meter."""
        asked_at = self._now()
        try:
            found: Acquired = await self._run(call)
        except KeysBrokenError as error:
            self._say_broken(meter.name, error)
            raise
        if found.again is None:
            self._due.pop(meter.name, None)
        else:
            self._due[meter.name] = self._now() + found.again
        grants = {delivery: Grant(meter, delivery, n, asked_at) for delivery, n in found.granted.items()}
        self._tickets[meter.name].update(grants)
        return found, grants

    def place(self, delivery: str, job_id: str, spec: Spec, lane: str, since: float) -> Place:
        """A delivery's place in line."""
        return Place(delivery, job_id, lane, since, prompt_tokens(spec), answer_tokens(spec))

    def new_ticket(self) -> str:
        """The name of a running job's next ticket."""
        return f"{self._asker}:{secrets.token_hex(8)}"

    async def again(self, meter: Meter, spec: Spec, ticket: str, *, room: float) -> Grant | Leave | None:
        """Leave for a further request of a running job: a grant, or what stands against it; None: nothing is counted.

        Asked again, it has the same `ticket`: that is its place before the line. Whoever does not ask again, or is
        cancelled here, gives it up. Waits while Redis is away, where there is a limit to keep.
        """
        while True:
            asked_at = self._now()
            call = meters.again(
                self._keys, meter, ticket, spec.lane, prompt_tokens(spec), answer_tokens(spec),
                lease=self._lease, room=room,
            )  # fmt: skip
            try:
                found: Leave = await self._run(call)
            except KeysBrokenError as error:
                self._say_broken(meter.name, error)
                return Leave("wait", seconds=BROKEN, because="broken")
            except RedisUnavailable:
                if not meter.limits:
                    return None
                await asyncio.sleep(AWAY)
                continue
            if found.outcome != "granted":
                return found
            self._tickets[meter.name].add(ticket)
            return Grant(meter, ticket, found.tokens, asked_at)

    def settle(self, grant: Grant, took: int | None = None, answer: int | None = None) -> None:
        """The request is over. `took`: its tokens in all, None unknown, UNUSED never asked; `answer`: its answer's."""
        tickets = self._tickets[grant.meter.name]
        tickets.discard(grant.ticket)
        self._tell(grant.meter).settled.append(Settlement(grant.ticket, took, answer))

    def give_up(self, meter: Meter, ticket: str) -> None:
        """A running job asks no more for a ticket; it may have been granted in a reply that nobody heard."""
        self._tell(meter).settled.append(Settlement(ticket, UNUSED))

    # Learning ----------------------------------------------------------------------------------------------------

    def refused(self, meter: Meter, retry_after: float | None, requests: meters.Count, tokens: meters.Count) -> None:
        """The upstream wants to be left alone, for how long it may have said."""
        self._learned[meter.name] = self._now() + meter.limits.window  # Redis says for how long exactly
        call = meters.learn(
            self._keys, meter, cool=retry_after or 0.0, slow_down=retry_after is None, requests=requests, tokens=tokens
        )
        self._tell(meter).learned.append(call)

    def counted(self, meter: Meter, requests: meters.Count, tokens: meters.Count) -> None:
        """What the upstream counts, as an answer's headers say it. Passed on when it is scarce, once in a while."""
        now = self._now()
        limits = meter.limits
        scarce = _scarce(requests, limits.requests) or _scarce(tokens, limits.tokens)
        if scarce and now >= self._counted.get(meter.name, 0.0):
            self._counted[meter.name] = now + limits.window * TELL_EVERY
            self._tell(meter).learned.append(meters.learn(self._keys, meter, requests=requests, tokens=tokens))

    # The task that tells Redis -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled: settle, renew and pass on."""
        renew_at = self._now() + self._lease / 3
        while True:
            try:
                async with asyncio.timeout_at(renew_at):
                    await self._work.wait()
            except TimeoutError:
                pass
            try:
                await self.flush()
                if self._now() >= renew_at:
                    await self._renew()
                    renew_at = self._now() + self._lease / 3
            except RedisUnavailable as error:
                log.warning("limits.wait", reason=str(error))
                await asyncio.sleep(AWAY)

    async def flush(self) -> None:
        """Send what there is to settle and to pass on. Raises RedisUnavailable; what is left is kept."""
        self._work.clear()
        while self._told:
            name, told = next(iter(self._told.items()))
            try:
                while told.learned:
                    await self._run(told.learned[0])
                    del told.learned[0]
                if settled := told.settled[:500]:
                    again: float | None = await self._run(meters.settle(self._keys, name, settled))
                    del told.settled[: len(settled)]
                    self._line_moves(name, again)
            except KeysBrokenError as error:  # it cannot be told; others can
                self._say_broken(name, error)
                told.settled.clear()
                told.learned.clear()
            except RedisUnavailable:
                self._work.set()
                raise
            if not told.settled and not told.learned:
                self._told.pop(name)

    def _line_moves(self, name: str, again: float | None) -> None:
        if again is None or name.partition("/")[0] not in self._upstreams:
            return
        self._due[name] = min(self._due.get(name, float("inf")), self._now() + again)
        self.freed.set()

    async def _renew(self) -> None:
        for name, tickets in list(self._tickets.items()):
            if not tickets:
                del self._tickets[name]
                continue
            try:
                lost = await self._run(meters.renew(self._keys, name, sorted(tickets), lease=self._lease))
            except KeysBrokenError as error:
                self._say_broken(name, error)
                continue
            if lost:
                log.warning("limits.tickets_had_run_out", meter=name, tickets=lost)

    def _say_broken(self, name: str, error: KeysBrokenError) -> None:
        """Jobs of this meter wait, since nobody may ask without a ticket; those of other meters go on."""
        now = self._now()
        if self._broken.get(name, 0.0) <= now:
            self._broken[name] = now + BROKEN
            start = self._keys.limit.decode()
            log.error("limits.broken", meter=name, reason=str(error), remedy=f"delete the broken ones of {start}*")

    def _tell(self, meter: Meter) -> _Told:
        self._work.set()
        return self._told.setdefault(meter.name, _Told(meter))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _scarce(count: meters.Count, limit: int) -> bool:
    """Whether the upstream's word may be worse than our own count."""
    if count.limit is None:
        return False
    lower = limit == 0 or count.limit < limit
    return lower or (count.remaining is not None and count.remaining < limit / 2)
