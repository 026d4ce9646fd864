"""The worker's side of the shared limiter: which meters there are, and the tickets this process asks for.

Taking tickets for jobs that begin is the intake's; a running job's further requests ask here, all of them, since a
worker without a free slot does not hear what others have learned. What is settled, renewed or learned is the teller's.
Where no limit is set and no upstream has set one, jobs begin without asking.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import structlog

from millstream import meters
from millstream.calls import Call
from millstream.errors import RedisUnavailable
from millstream.job import Spec
from millstream.keys import Keys, text_of
from millstream.meters import SLACK, UNUSED, Acquired, Leave, Meter, Place, Settlement

from .estimate import answer_tokens, prompt_tokens
from .line import KeysBrokenError
from .lines import BROKEN, Lines
from .teller import AWAY, Teller

TELL_EVERY: Final = 1 / 60
"""Of a window: how often at most one process repeats what a meter's upstream says of its counts."""

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
        self._counted: dict[str, float] = {}
        self._lines = Lines()
        self._teller = Teller(run, keys, lease=lease, moves=self._line_moves, broken=self._say_broken)
        self.run, self.flush = self._teller.run, self._teller.flush
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
        return bool(meter.limits) or meter.name in self._lines or self._learned.get(meter.name, 0.0) > self._now()

    def busy_for(self, meter: Meter) -> float:
        """At least so many seconds nobody more in line gets a ticket; 0.0 where that is not known."""
        return self._lines.busy_for(meter.name, self._now())

    def note(self, now_ms: int, waiting: Sequence[tuple[bytes, float]], learned: Sequence[tuple[bytes, float]]) -> None:
        """What Redis says: meters with a line, by when their next job is due, and meters that upstreams limit (ms)."""
        here = self._now()
        self._learned = {text_of(name): here + (until - now_ms) / 1000 for name, until in learned if until > now_ms}
        lines = [(text_of(name), here + max(0.0, (at - now_ms) / 1000)) for name, at in waiting]
        self._lines.looked((name, due) for name, due in lines if self._ours(name))

    @property
    def lines(self) -> bool:
        """Whether jobs wait for a limit of this worker's upstreams."""
        return self.next_ask is not None

    @property
    def next_ask(self) -> float | None:
        """When it is worth asking for a line next (the loop's time)."""
        return self._lines.next(self._now())

    def to_ask(self) -> list[Meter]:
        """The meters whose line is to be asked for now."""
        return [self._named(name) for name in self._lines.to_ask(self._now())]

    def _ours(self, name: str) -> bool:
        return name.partition("/")[0] in self._upstreams

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
            lanes=self._lanes, intermediate=self._intermediate, turn=self._lines.turn(meter.name, self._now()),
        )  # fmt: skip

    async def take(self, meter: Meter, call: Call[Acquired]) -> tuple[Acquired, dict[str, Grant]]:
        """Run an acquire; the grants are by delivery. Raises RedisUnavailable, KeysBrokenError for a broken meter."""
        asked_at = self._now()
        try:
            found: Acquired = await self._run(call)
        except KeysBrokenError as error:
            self._say_broken(meter.name, error)
            raise
        self._lines.answered(meter.name, self._now(), found.again, found.turn)
        grants = {delivery: Grant(meter, delivery, n, asked_at) for delivery, n in found.granted.items()}
        self._teller.hold(meter.name, grants)
        return found, grants

    def place(self, delivery: str, job_id: str, spec: Spec, lane: str, since: float) -> Place:
        """A delivery's place in line."""
        return Place(delivery, job_id, lane, since, prompt_tokens(spec), answer_tokens(spec))

    def new_ticket(self) -> str:
        """The name of a running job's next ticket."""
        return f"{self._asker}:{secrets.token_hex(8)}"

    async def again(
        self, meter: Meter, spec: Spec, ticket: str, *, room: float, instead_of: Grant | None = None
    ) -> Grant | Leave | None:
        """Leave for a further request of a running job: a grant, or what stands against it; None: nothing is counted.

        Asked again, it has the same `ticket`: that is its place before the line. Whoever does not ask again, or is
        cancelled here, gives it up, and settles the ticket that this one was asked for `instead_of`: only an answer
        tells that it was given back. Waits while Redis is away, where there is a limit to keep.
        """
        if instead_of is not None:
            self._teller.let_go(meter.name, instead_of.ticket)  # renewed once more, it would come back to life
        while True:
            asked_at = self._now()
            call = meters.again(
                self._keys, meter, ticket, spec.lane, prompt_tokens(spec), answer_tokens(spec),
                lease=self._lease, room=room, instead_of=instead_of.ticket if instead_of else "",
            )  # fmt: skip
            try:
                found: Leave = await self._run(call)
            except KeysBrokenError as error:
                self._say_broken(meter.name, error)
                if instead_of is not None:
                    self.settle(instead_of, UNUSED)
                return Leave("wait", seconds=BROKEN, because="broken")
            except RedisUnavailable:
                if not meter.limits:
                    if instead_of is not None:
                        self.settle(instead_of, UNUSED)
                    return None
                await asyncio.sleep(AWAY)
                continue
            if found.outcome != "granted":
                return found
            self._teller.hold(meter.name, [ticket])
            return Grant(meter, ticket, found.tokens, asked_at)

    def settle(self, grant: Grant, took: int | None = None, answer: int | None = None) -> None:
        """The request is over. `took`: its tokens in all, None unknown, UNUSED never asked; `answer`: its answer's."""
        self._teller.settle(grant.meter.name, Settlement(grant.ticket, took, answer))

    def give_up(self, meter: Meter, ticket: str) -> None:
        """A running job asks no more for a ticket; it may have been granted in a reply that nobody heard."""
        self._teller.settle(meter.name, Settlement(ticket, UNUSED))

    # Learning ----------------------------------------------------------------------------------------------------

    def refused(self, meter: Meter, retry_after: float | None, requests: meters.Count, tokens: meters.Count) -> None:
        """The upstream wants to be left alone, for how long it may have said."""
        self._learned[meter.name] = self._now() + meter.limits.window  # Redis says for how long exactly
        call = meters.learn(
            self._keys, meter, cool=retry_after or 0.0, slow_down=retry_after is None, requests=requests, tokens=tokens
        )
        self._teller.learn(meter.name, call)

    def counted(self, meter: Meter, requests: meters.Count, tokens: meters.Count) -> None:
        """What the upstream counts, as an answer's headers say it. Passed on when it is scarce, once in a while."""
        now = self._now()
        limits = meter.limits
        scarce = _scarce(requests, limits.requests) or _scarce(tokens, limits.tokens)
        if scarce and now >= self._counted.get(meter.name, 0.0):
            self._counted[meter.name] = now + limits.window * TELL_EVERY
            self._teller.learn(meter.name, meters.learn(self._keys, meter, requests=requests, tokens=tokens))

    # What the teller hears ---------------------------------------------------------------------------------------

    def _line_moves(self, name: str, again: float) -> None:
        if self._ours(name):
            self._lines.moves(name, self._now(), again)
            self.freed.set()

    def _say_broken(self, name: str, error: KeysBrokenError) -> None:
        """Jobs of this meter wait, since nobody may ask without a ticket; those of other meters go on."""
        if self._lines.breaks(name, self._now()):
            start = self._keys.limit.decode()
            log.error("limits.broken", meter=name, reason=str(error), remedy=f"delete the broken ones of {start}*")

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _scarce(count: meters.Count, limit: int) -> bool:
    """Whether the upstream's word may be worse than our own count."""
    if count.limit is None:
        return False
    lower = limit == 0 or count.limit < limit
    return lower or (count.remaining is not None and count.remaining < limit / 2)
