"""Sparing an upstream that is down: a retry budget and a breaker, one of each per upstream and process. Pure.

    closed ── half of the last 10 s' answers failed (of 10 or more), or the last 10 in a row ──> open
      ^                                                                                           │ 15 s
      └── the probe is answered ── probing: one request, everybody else waits <───────────────────┘
                                      └── it fails: open again

The budget bounds what is asked again before that, and where only a part fails: a first request puts a tenth of a retry
into it, a retry takes one out and puts it back once it is answered. The numbers are those of Finagle's and Envoy's
budgets, smaller. Together they keep an outage of ten minutes within a tenth more requests than jobs from one job a
second on; tests/unit/test_breaker.py simulates it.

Nothing here fails a job: what may not be asked now is told how long to wait.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

WINDOW: Final = 10.0
LEAST: Final = 10
"""Answers within WINDOW seconds (or failures in a row) before the breaker judges."""

FAILED_SHARE: Final = 0.5
OPEN: Final = 15.0
PROBING: Final = 2.0
"""Seconds after which those who wait for a probe ask again."""

RETRY_SHARE: Final = 0.1
RETRIES_PER_SECOND: Final = 0.1
RESERVE: Final = 20.0
"""Retries in a full budget: enough for a few jobs on a quiet worker."""

MAX_COOLING: Final = 1000
"""Models that may be cooling at once; further ones are not remembered."""

Clock = Callable[[], float]


class Wait(NamedTuple):
    """Not now: ask again in so many seconds. `open`: because the breaker is, so that another upstream may help."""

    seconds: float
    open: bool = False


class RetryBudget:
    """How many requests may be repeats."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._retries = RESERVE
        self._seen = clock()

    def _put(self, retries: float) -> None:
        now = self._clock()
        self._retries = min(RESERVE, self._retries + retries + (now - self._seen) * RETRIES_PER_SECOND)
        self._seen = now

    def first(self) -> None:
        """A first request is made."""
        self._put(RETRY_SHARE)

    def take(self) -> float:
        """Take a retry: 0.0, or the seconds until there is one."""
        self._put(0)
        if self._retries >= 1:
            self._retries -= 1
            return 0.0
        return (1 - self._retries) / RETRIES_PER_SECOND

    def put_back(self) -> None:
        """A retry was answered."""
        self._put(1)

    def refill(self) -> None:
        """The upstream is back."""
        self._put(RESERVE)


class Ticket:
    """One request that was let through. Say how it goes: `answered` at its first content, `failed` if it breaks."""

    __slots__ = ("_again", "_guard", "_note", "_probe")

    def __init__(self, guard: Guard, *, again: bool, probe: bool) -> None:
        self._guard, self._again, self._probe = guard, again, probe
        self._note: Note | None = None

    def answered(self) -> None:
        """The upstream works: it answers, well or with a refusal that is the request's own fault."""
        if self._note is None:
            self._note = self._guard.answered(probe=self._probe, again=self._again)
            self._probe = False

    def failed(self) -> None:
        """The upstream did not do its part, perhaps after a good beginning."""
        self._guard.failed(self._note, probe=self._probe)
        self._probe = False

    def dropped(self) -> None:
        """Nobody knows: the job was stopped."""
        if self._probe:
            self._guard.probe_lost()
        self._probe = False


@dataclass(slots=True)
class Note:
    """One request's outcome so far."""

    at: float
    failed: bool


class Guard:
    """One upstream's breaker, budget and cool-downs. `enabled` False keeps the cool-downs alone."""

    def __init__(self, clock: Clock = time.monotonic, *, enabled: bool = True) -> None:
        self._clock = clock
        self._enabled = enabled
        self._budget = RetryBudget(clock)
        self._answers: deque[Note] = deque()
        self._failed = 0  # of those
        self._in_a_row = 0
        self._open_until: float | None = None
        self._probing = False
        self._cooling: dict[str, float] = {}

    @property
    def open(self) -> bool:
        """Whether requests are held back until a probe is answered."""
        return self._open_until is not None

    def admit(self, model: str, *, again: bool) -> Ticket | Wait:
        """Leave to ask for this model now; `again`: the request repeats one of this job that failed."""
        now = self._clock()
        if (until := self._cooling.get(model)) is not None:
            if until > now:
                return Wait(until - now)
            del self._cooling[model]
        if not self._enabled:
            return Ticket(self, again=again, probe=False)
        if self._open_until is not None:
            if now < self._open_until:
                return Wait(self._open_until - now, open=True)
            if self._probing:
                return Wait(PROBING, open=True)
            self._probing = True
            return Ticket(self, again=False, probe=True)
        if not again:
            self._budget.first()
        elif (seconds := self._budget.take()) > 0:
            return Wait(seconds)
        return Ticket(self, again=again, probe=False)

    def cool(self, model: str, seconds: float) -> None:
        """The upstream asks to be left alone with this model."""
        now = self._clock()
        if len(self._cooling) >= MAX_COOLING:
            self._cooling = {name: until for name, until in self._cooling.items() if until > now}
        if model in self._cooling or len(self._cooling) < MAX_COOLING:
            self._cooling[model] = max(self._cooling.get(model, 0.0), now + seconds)

    def answered(self, *, probe: bool, again: bool) -> Note:
        """A request was answered; a ticket says so."""
        note = Note(self._clock(), failed=False)
        if probe:
            self._probing, self._open_until = False, None
            self._budget.refill()
        if again:
            self._budget.put_back()
        self._in_a_row = 0
        self._write(note)
        return note

    def failed(self, note: Note | None, *, probe: bool) -> None:
        """A request failed; `note` is what was said about it when it began well."""
        now = self._clock()
        if probe:
            self._probing, self._open_until = False, now + OPEN
            return
        if note is not None and note.at >= now - WINDOW and not note.failed:
            note.failed = True
            self._failed += any(each is note for each in self._answers)
            self._write(None)
        else:
            self._write(Note(now, failed=True))
        self._in_a_row += 1
        judged = len(self._answers) >= LEAST and self._failed >= FAILED_SHARE * len(self._answers)
        if self._enabled and self._open_until is None and (judged or self._in_a_row >= LEAST):
            self._open_until = now + OPEN
            self._answers.clear()
            self._failed = self._in_a_row = 0

    def _write(self, note: Note | None) -> None:
        if not self._enabled or self._open_until is not None:
            return  # asked before it opened: no news
        if note is not None:
            self._answers.append(note)
            self._failed += note.failed
        oldest = self._clock() - WINDOW
        while self._answers and self._answers[0].at < oldest:
            self._failed -= self._answers.popleft().failed

    def probe_lost(self) -> None:
        """The job that probed was stopped: the next one probes."""
        self._probing = False
