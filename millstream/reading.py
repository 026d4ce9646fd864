"""Where a consumer stands in a job's log: what it has seen, what comes next, what is missing, what is void. Pure.

The order that makes reading safe: subscribe, wait for the acknowledgement, then read the log from the cursor, then go
live. What arrives on the channel meanwhile is at or below the cursor afterwards and is dropped; anything above the next
seq means a message was lost (a slow consumer, a killed connection), and the log is read again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from .errors import JobExpired, JobNotFound, LogRewound, ResultTimeout
from .events import TERMINAL_STATUSES, AnyEvent, Event, Started, Terminal, decode, unpack

SILENCE: Final = 15.0
"""Seconds without a message of a job until its log is read again: a lost terminal event is noticed by then."""

LISTEN: Final = 2.0
"""Longest wait inside one read of a subscription or feed, below the socket's own timeout."""

PAGE: Final = 256
"""Packs read from a log at once; a live pack is at most 64 KB, a usual one below 1 KB."""


@dataclass(frozen=True, slots=True)
class Page:
    """A stretch of the log from the cursor on, with the job's state read in the same transaction.

    `seq` is the last seq by the state, None when there is no such job; `last`: nothing came after this page;
    `closed`: the job has its terminal event; `begun`: what the pack with the reading's `begun` holds now.
    """

    events: Sequence[AnyEvent]
    seq: int | None
    last: bool = True
    closed: bool = False
    begun: Sequence[AnyEvent] = ()


STATE_FIELDS: Final = ("seq", "status")
"""The fields of the state that `page` wants, in this order."""


Entries = Iterable[tuple[bytes, dict[bytes, bytes]]]


def page(entries: Entries, state: Sequence[bytes | None], begun: Entries = ()) -> Page:
    """Make a page of what one transaction answered: XRANGE on the log from the cursor on, HMGET of STATE_FIELDS, and
    for a reading that has `begun`, XRANGE of one entry from there on.
    """
    listed = list(entries)
    seq, status = state
    closed = status is not None and status.decode() in TERMINAL_STATUSES
    return Page(_events(listed), None if seq is None else int(seq), len(listed) < PAGE, closed, _events(begun))


def _events(entries: Entries) -> Sequence[AnyEvent]:
    return [event for entry_id, fields in entries for event in unpack(entry_id, fields)]


class Reading:
    """One consumer's place in one job's log."""

    def __init__(self, job_id: str, after: int = 0) -> None:
        self.job_id = job_id
        self.cursor = max(after, 0)
        """The last seq that was taken."""
        self.ended = False
        self.known = False
        self._seen: AnyEvent | None = None  # the event at the cursor, unless the cursor was given
        self._started: Started | None = None

    @property
    def begun(self) -> int:
        """Where the attempt at the cursor began, by its `started`; 0 = not seen by this reading."""
        return self._started.seq if self._started else 0

    def heard(self, event: AnyEvent) -> list[Event] | None:
        """Take an event from the channel. None: some are missing before it, read the log."""
        if self.ended:
            return []
        if event.seq > self.cursor + 1:
            return None
        if event.seq <= self.cursor:
            return None if self._contradicts(event) else []
        return self._take(event)

    def _contradicts(self, event: AnyEvent) -> bool:
        """Whether an event at or below the cursor is no late copy of what was taken: a later attempt, an end, another
        event at the cursor. Then the log was written anew, or somebody forged a message; the log knows.
        """
        seen = self._seen
        if event.terminal or seen is None:
            return event.terminal
        another = event.seq == seen.seq and not same(event, seen)
        return another or event.attempt > seen.attempt or self._begun_anew([event])

    def read(self, found: Page) -> list[Event]:
        """Take a page of the log."""
        if found.seq is None:
            raise JobExpired(self.job_id) if self.known else JobNotFound(self.job_id)
        self.known = True
        if self.cursor > found.seq or self._begun_anew(found.begun):
            raise LogRewound(self.job_id, self.cursor, found.seq)
        taken: list[Event] = []
        for event in found.events:
            if event.seq == self.cursor and self._seen is not None and not same(event, self._seen):
                raise LogRewound(self.job_id, self.cursor, found.seq)
            if event.seq <= self.cursor:
                continue
            if event.seq > self.cursor + 1:
                raise JobExpired(self.job_id)
            taken += self._take(event)
            if self.ended:
                return taken  # nothing stands behind a terminal event
        if found.last and self.cursor < found.seq:
            raise JobExpired(self.job_id)
        if found.closed and self.cursor == found.seq:
            self.ended = True  # also when the cursor started at the end
        return taken

    def _begun_anew(self, pack: Sequence[AnyEvent]) -> bool:
        """Whether another attempt stands where ours began: Redis lost ours, and its number was given away again."""
        ours = self._started
        there = next((event for event in pack if ours and event.seq == ours.seq), None)
        if ours is None or there is None:
            return False
        return not isinstance(there, Started) or (there.attempt, there.mark) != (ours.attempt, ours.mark)

    def _take(self, event: AnyEvent) -> list[Event]:
        self.cursor, self._seen = event.seq, event
        if isinstance(event, Started):
            self._started = event
        if isinstance(event, Terminal):
            self.ended = True
        return [event] if isinstance(event, Event) else []


def same(one: AnyEvent, other: AnyEvent) -> bool:
    """Whether two events are one, but for `at`: repacking rounds it, and a log that was lost is sent again later."""
    return msgspec.structs.replace(one, at=other.at) == other


class Following:
    """Several readings behind one subscription: which logs to read now, and for how long to listen."""

    def __init__(
        self, job_ids: Iterable[str], after: int = 0, *, silence: float = SILENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._readings = {job_id: Reading(job_id, after) for job_id in dict.fromkeys(job_ids)}
        self._silence = silence
        self._clock = clock
        self._began = clock()
        self._look_at: dict[str, float] = dict.fromkeys(self._readings, -math.inf)
        self.deaf = False
        """Whether the log, read because of silence, held news: nothing comes over this subscription; make it anew."""

    @property
    def open(self) -> list[str]:
        """The jobs whose terminal event has not been taken."""
        return list(self._look_at)

    def due(self) -> list[Reading]:
        """The readings whose log must be read now: new, with a gap, after a reconnect, or silent for too long."""
        now = self._clock()
        return [self._readings[job_id] for job_id, at in self._look_at.items() if at <= now]

    def patience(self, longest: float, until: float | None) -> float:
        """Seconds to listen: until a log is due or `until` (by the clock) comes. Raises ResultTimeout when it has."""
        now = self._clock()
        if until is not None and now >= until:
            raise ResultTimeout(next(iter(self._look_at)), until - self._began)
        soonest = min(min(self._look_at.values(), default=now), math.inf if until is None else until)
        return min(longest, max(0.001, soonest - now))

    def take(self, message: Mapping[str, Any] | None, job_of: Callable[[str], str]) -> list[tuple[str, Event]]:
        """Take what redis-py's `get_message` gave: an event, the sign of a renewed subscription, or nothing."""
        if message is None:
            return []
        job_id = job_of(message["channel"].decode())
        if message["type"] == "subscribe":
            self.reconnected(job_id)
            return []
        if message["type"] != "message":
            return []
        try:
            event = decode(message["data"])
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            self.reconnected(job_id)  # whatever this is, it is no event; the log is the truth
            return []
        return [(job_id, each) for each in self.heard(job_id, event)]

    def heard(self, job_id: str, event: AnyEvent) -> list[Event]:
        """Take a message of the channel; a gap makes the job due."""
        if job_id not in self._look_at:
            return []
        events = self._readings[job_id].heard(event)
        if events is None:
            self._look_at[job_id] = -math.inf
            return []
        self._heard_of(job_id)
        return events

    def read(self, reading: Reading, found: Page) -> list[tuple[str, Event]]:
        """Take a page; a reading that has more pages stays due."""
        events = reading.read(found)
        if events and self._look_at[reading.job_id] > -math.inf:
            self.deaf = True
        if found.last or reading.ended:
            self._heard_of(reading.job_id)
        return [(reading.job_id, event) for event in events]

    def reconnected(self, job_id: str | None = None) -> None:
        """The subscription was renewed: whatever was published meanwhile is in the log."""
        self.deaf = False
        for each in self._look_at if job_id is None else [job_id]:
            if each in self._look_at:
                self._look_at[each] = -math.inf

    def _heard_of(self, job_id: str) -> None:
        if self._readings[job_id].ended:
            del self._look_at[job_id]
        else:
            self._look_at[job_id] = self._clock() + self._silence
