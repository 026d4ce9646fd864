"""The shared limiter as calls: a meter counts what one upstream is asked for one model, by all workers together. Pure.

    join the line ── limit_acquire ──> ticket ── the request ── limit_settle
                                         └ limit_renew while it runs; a dead worker's ticket runs out with its lease

`millstream/scripts/_meter.lua` says why the limits hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final

import msgspec
from msgspec import Struct

from .calls import Call, milliseconds
from .keys import LANES, Keys, text_of

WINDOW: Final = 60.0
"""Seconds that requests and tokens are counted over."""

SLACK: Final = 1 / 40
"""The part of a window within which a ticket is to be used, or given back."""

REST: Final = (1.02, 0.05)
"""Of the time an upstream asks to be left alone, and seconds more: what was let go before its word was known reaches it
some tens of milliseconds later, and from there on it is to have its time. Nobody comes back early by its clock."""

UNUSED: Final = -1
"""As tokens in a settlement: the upstream was never asked."""

MOST: Final = 10**9
"""Tokens that one request is counted as at most, whatever it asks for or its upstream says: sums stay whole numbers."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What all workers together may ask of one upstream for one model; 0: no limit.

    `requests` and `tokens` per `window` seconds, `streams` at once; `share`: the part of each that batch leaves to
    interactive.
    """

    requests: int = 0
    tokens: int = 0
    streams: int = 0
    share: float = 0.1
    window: float = WINDOW

    def __bool__(self) -> bool:
        return bool(self.requests or self.tokens or self.streams)


NO_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class Meter:
    """One upstream and one model, with their limits."""

    upstream: str
    model: str
    limits: Limits

    @property
    def name(self) -> str:
        return f"{self.upstream}/{self.model}"


class Place(Struct, frozen=True):
    """A delivery that joins the line of its meter. `since`: when its job was submitted (ms); who is older goes first.

    `most`: tokens the answer may have at most, None where the job does not say.
    """

    delivery: str
    job_id: str
    lane: str
    since: float
    prompt: int
    most: int | None


class Acquired(Struct, frozen=True):
    """What an acquire gave: `granted` and `too_large` as tokens by delivery; `again`: seconds until the first in line
    may get its ticket, None when nobody waits; `turn`: seconds until it is the asker's turn to fetch one.
    """

    granted: dict[str, int]
    too_large: dict[str, int]
    waiting: int
    again: float | None
    turn: float
    because: str


def acquire(
    keys: Keys, meter: Meter, places: Sequence[Place], *, lease: float, asker: str, number: int, want: int,
    lanes: Sequence[str], intermediate: Sequence[str], turn: float = 0.0,
) -> Call[Acquired]:  # fmt: skip
    """Let these deliveries join the line, and take up to `want` tickets for the first of it.

    `intermediate`: RQ's intermediate lists by lane. `number`: of this call, larger than those before it. `turn`:
    seconds until the asker's turn, as an earlier answer said; 0.0 when it has come, or there is none. At most one such
    call of an asker may run at a time and meter.
    """
    waits_for, served = _waits_for(meter.upstream, meter.model), _served(tuple(lanes))
    args = [*_fixed(meter, lease), asker, number, want, served, waits_for, int(turn * 1000), len(places)]
    names = [*keys.meter(meter.name), *intermediate]
    for each in places:
        args += (each.delivery, LANES.index(each.lane), each.since, each.prompt, _tokens(each.most))
        names.append(keys.state(each.job_id))
    return Call("limit_acquire", names, args, _acquired)


@lru_cache(maxsize=1000)
def _waits_for(upstream: str, model: str) -> bytes:
    return msgspec.json.encode({"what": "limit", "upstream": upstream, "model": model})[:-1]


@cache
def _served(lanes: tuple[str, ...]) -> str:
    return "".join(str(at) for at, lane in enumerate(LANES) if lane in lanes)


def _acquired(reply: Sequence[Any]) -> Acquired:
    waiting, wait, turn, because, granted, large = reply
    again = wait / 1000 if wait >= 0 else None
    return Acquired(_members(granted), _members(large), waiting, again, turn / 1000, because.decode())


def _members(text: bytes) -> dict[str, int]:
    if not text:
        return {}
    pairs = (member.rpartition(":") for member in text_of(text).split())
    # Anybody may write into a line.
    return {delivery: int(tokens) for delivery, _, tokens in pairs if tokens.isdecimal()}


@dataclass(frozen=True, slots=True)
class Leave:
    """What a running job's further request was answered: `outcome` granted, too_large or wait."""

    outcome: str
    tokens: int = 0
    seconds: float = 0.0
    because: str = ""


def again(
    keys: Keys, meter: Meter, ticket: str, lane: str, prompt: int, most: int | None, *, lease: float, room: float,
    instead_of: str = "",
) -> Call[Leave]:  # fmt: skip
    """Leave for a further request of a running job, which can wait `room` seconds where it is.

    `instead_of`: a ticket that it holds and will not use; whatever the answer, it is given back.
    """

    def decode(reply: Sequence[Any]) -> Leave:
        outcome = reply[0].decode()
        if outcome == "wait":
            return Leave(outcome, seconds=int(reply[1]) / 1000, because=reply[2].decode())
        return Leave(outcome, int(reply[1]))

    args = [*_fixed(meter, lease), ticket, LANES.index(lane), prompt, _tokens(most), int(room * 1000), instead_of]
    return Call("limit_again", keys.meter(meter.name), args, decode)


def renew(keys: Keys, name: str, tickets: Sequence[str], *, lease: float) -> Call[int]:
    """Keep tickets of running requests. The value is how many had run out."""
    return Call("limit_renew", keys.meter(name), [milliseconds(lease), *tickets], int)


@dataclass(frozen=True, slots=True)
class Settlement:
    """A request is over. `took`: its tokens in all, None unknown, UNUSED never asked; `answer`: those of its answer."""

    ticket: str
    took: int | None = None
    answer: int | None = None


def settle(keys: Keys, name: str, settlements: Sequence[Settlement]) -> Call[float | None]:
    """Settle tickets, each once. The value is when it is worth asking for those in line (seconds); None: nobody is."""
    args: list[Any] = [name]
    for each in settlements:
        args += (each.ticket, UNUSED if each.took == UNUSED else _tokens(each.took), _tokens(each.answer))

    def decode(reply: Sequence[Any]) -> float | None:
        return int(reply[2]) / 1000 if int(reply[2]) >= 0 else None

    return Call("limit_settle", keys.meter(name), args, decode)


@dataclass(frozen=True, slots=True)
class Count:
    """What an upstream says of one of its limits; None: nothing. `reset`: seconds until all of it is back."""

    limit: int | None = None
    remaining: int | None = None
    reset: float | None = None


def learn(
    keys: Keys, meter: Meter, *, cool: float = 0.0, slow_down: bool = False, requests: Count | None = None,
    tokens: Count | None = None,
) -> Call[float]:  # fmt: skip
    """Tell all workers what the upstream said. The value is how long it is left alone now (seconds).

    `cool`: seconds it asked for, to which REST adds a touch; `slow_down`: it refused and did not say for how long.
    """
    args: list[Any] = [
        meter.name, milliseconds(meter.limits.window), milliseconds(rested(cool)) if cool > 0 else 0, int(slow_down)
    ]  # fmt: skip
    for each in (requests or Count(), tokens or Count()):
        args += (
            "" if each.limit is None else each.limit, "" if each.remaining is None else each.remaining,
            "" if each.reset is None else int(each.reset * 1000),
        )  # fmt: skip
    return Call("limit_learn", keys.meter(meter.name), args, lambda reply: int(reply[0]) / 1000)


class Use(Struct, frozen=True):
    """One of a meter's measures: what is in use of its limit (None: no limit)."""

    used: int
    limit: int | None


class Gauge(Struct, frozen=True, kw_only=True):
    """A meter as it is now. Times are Unix seconds by the server's clock.

    `requests` and `tokens` of the last `window` seconds, `streams` at this moment; `waiting`: jobs in line by lane;
    `next_at`: when the first of them is due, None when nobody waits; `cooling_until`: None while it is not cooling;
    `answer_tokens`: what an answer takes on average, None while that is not known.
    """

    upstream: str
    model: str
    window: float
    requests: Use
    tokens: Use
    streams: Use
    waiting: dict[str, int]
    next_at: float | None
    cooling_until: float | None
    answer_tokens: int | None


def look(keys: Keys, name: str) -> Call[Gauge | None]:
    """The meter of this name now; None when there is none any more."""
    upstream, _, model = name.partition("/")

    def use(used: int, limit: int) -> Use:
        return Use(used, limit or None)

    def decode(reply: Sequence[Any]) -> Gauge | None:
        r, rpm, t, tpm, s, streams, first, second, window, _now, due, cooling, answer = map(int, reply)
        if window == 0:
            return None
        return Gauge(
            upstream=upstream, model=model, window=window / 1000,
            requests=use(r, rpm), tokens=use(t, tpm), streams=use(s, streams),
            waiting=dict(zip(LANES, (first, second), strict=True)),
            next_at=due / 1000 if due else None,
            cooling_until=cooling / 1000 if cooling else None,
            answer_tokens=answer or None,
        )  # fmt: skip

    return Call("limit_look", keys.meter(name), [], decode)


def rested(cool: float) -> float:
    """How long an upstream is left alone that asked for so many seconds."""
    part, more = REST
    return cool * part + more


def _tokens(count: int | None) -> int | str:
    return "" if count is None else max(0, min(count, MOST))


def _fixed(meter: Meter, lease: float) -> list[Any]:
    limits = meter.limits
    return [
        meter.name, limits.requests, limits.tokens, limits.streams, limits.share, milliseconds(limits.window),
        milliseconds(lease),
    ]  # fmt: skip
