"""The open rows of a batch, and what has to be done about each of them. Pure.

A row goes through these places, and counts towards the window in all of them, so that what Redis holds of a batch is
bounded by the window:

    to submit -> open -> ended: its log is read -> in the caller's hands -> to be dropped -> gone
        ^          |       |
        +----------+-------+   its job is gone before it was read: once more, and paid again
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from millstream.errors import JobExpired, LogRewound
from millstream.events import TERMINAL_STATUSES
from millstream.reading import Page, Reading
from millstream.transcript import Transcript

from .answer import ANSWERED, Answer
from .row import Row

MAX_OPEN_BYTES: Final = 32 * 1024 * 1024
"""Of specs: with prompts of more than 32 KB the window of 1,000 becomes smaller than asked."""

MAX_LOST: Final = 3
"""How often a row's job may vanish before it was read; a retention of seconds would otherwise pay for ever."""

LOOK: Final = 5.0
"""Seconds until an open job's state is asked for, and asked for again. It finds what the feed did not tell: an ending
that fell off its cap, a job that expired or that the server lost; and it is what a progress line shows."""

LOOKS_PER_SECOND: Final = 500


@dataclass(slots=True)
class _Open:
    row: Row
    look_at: float
    status: str = ""  # until it was looked at
    waits_for: str = ""


@dataclass(slots=True)
class Fetching:
    """An ended job on its way out of Redis, page by page."""

    row: Row
    reading: Reading
    transcript: Transcript = field(default_factory=Transcript)


class Window:
    """At most `size` rows. Times are the caller's clock, seconds.

    `again`: an earlier failed or cancelled job of a row is no answer; the row becomes another job.
    """

    def __init__(self, size: int, *, again: bool = False) -> None:
        self._size, self._again = size, again
        self._look = max(LOOK, size / LOOKS_PER_SECOND)
        self._new: dict[str, Row] = {}
        self._open: dict[str, _Open] = {}
        self._ended: dict[str, Fetching] = {}
        self._ready: list[Answer] = []
        self._handed: list[Answer] = []
        self._to_drop: dict[str, None] = {}
        self._lost: Counter[str] = Counter()
        self._bytes = 0
        self._next_look = 0.0

    # How full it is ----------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many more rows it takes."""
        if self._bytes >= MAX_OPEN_BYTES:
            return 0
        return max(0, self._size - len(self) - len(self._to_drop))

    def __len__(self) -> int:
        """Rows that have not been given to the caller for good."""
        return len(self._new) + len(self._open) + len(self._ended) + len(self._ready) + len(self._handed)

    @property
    def busy(self) -> bool:
        """Whether there is something to ask of Redis without waiting for an ending."""
        return bool(self._new or self._ended or self._to_drop)

    @property
    def has_ready(self) -> bool:
        """Whether there are answers to hand over."""
        return bool(self._ready)

    @property
    def running(self) -> int:
        """Rows whose job has not ended, as far as is known."""
        return len(self._open)

    @property
    def crowded(self) -> bool:
        """Whether most of it is still open, so that what ended can wait for company."""
        return 2 * len(self._open) > self._size

    def counts(self) -> tuple[Counter[str], Counter[str]]:
        """Open jobs by the status they had when they were looked at; and queued ones by what they wait for."""
        statuses = Counter(each.status for each in self._open.values() if each.status)
        return statuses, Counter(each.waits_for for each in self._open.values() if each.waits_for)

    # Rows in -----------------------------------------------------------------------------------------------------

    def add(self, row: Row) -> None:
        """Take a row; it is to be submitted."""
        self._new[row.job_id] = row
        self._bytes += len(row.body)

    def add_refused(self, answer: Answer) -> None:
        """Take what is an answer already."""
        self._ready.append(answer)

    def leave_new(self) -> None:
        """Give up rows that are not accepted yet. One whose reply was lost goes on, and is picked up another time."""
        self._bytes -= sum(len(row.body) for row in self._new.values())
        self._new.clear()

    def to_submit(self, most: int, most_bytes: int) -> list[Row]:
        """The oldest rows that are not accepted yet; one at least, if there is one."""
        chosen: list[Row] = []
        size = 0
        for row in self._new.values():
            size += len(row.body)
            if chosen and (len(chosen) >= most or size > most_bytes):
                break
            chosen.append(row)
        return chosen

    def accepted(self, job_id: str, outcome: str, status: str, now: float) -> None:
        """What a submit was answered: created, exists or conflict (it exists, submitted with other options).

        Or a withdrawal: cancelled, closed (with the status) or unknown.
        """
        row = self._new.pop(job_id, None)
        if row is None:
            return
        if outcome == "unknown":  # to be cancelled, and never submitted
            self._bytes -= len(row.body)
            self._ready.append(_unasked(row))
        elif self._again and outcome == "exists" and status in TERMINAL_STATUSES and status not in ANSWERED:
            row = row.again()
            self._new[row.job_id] = row
        elif status in TERMINAL_STATUSES or outcome == "cancelled":
            self._fetch(row)
        else:
            self._open[job_id] = _Open(row, now if outcome == "conflict" else now + self._look)
            self._next_look = min(self._next_look, self._open[job_id].look_at)

    # Endings -----------------------------------------------------------------------------------------------------

    def ended(self, job_ids: Iterable[str]) -> None:
        """What the feed told: endings of anybody's jobs."""
        for job_id in job_ids:
            if found := self._open.pop(job_id, None):
                self._fetch(found.row)

    def to_look(self, now: float, most: int) -> list[str]:
        """Open jobs whose state has not been asked for in a while."""
        if now < self._next_look:
            return []
        due = [job_id for job_id, each in self._open.items() if each.look_at <= now][:most]
        if len(due) < most:
            self._next_look = min((each.look_at for each in self._open.values() if each.look_at > now), default=now)
        return due

    def looked(self, job_id: str, status: str | None, waits_for: str, now: float) -> None:
        """A job's status, None where there is no such job, and what it waits for."""
        if (found := self._open.get(job_id)) is None:
            return
        if status is None:
            del self._open[job_id]
            self._gone(found.row)
        elif status in TERMINAL_STATUSES:
            self.ended([job_id])
        else:
            found.status, found.waits_for, found.look_at = status, waits_for, now + self._look

    def to_fetch(self, most: int) -> list[Fetching]:
        """Ended jobs whose log, or the next page of it, is to be read."""
        return [found for found, _ in zip(self._ended.values(), range(most), strict=False)]

    def fetched(self, fetching: Fetching, page: Page) -> None:
        """A page of an ended job's log and its state."""
        row = fetching.row
        job_id = fetching.reading.job_id
        if page.seq is None:
            del self._ended[job_id]
            self._gone(row)
            return
        try:
            for event in fetching.reading.read(page):
                fetching.transcript.feed(event)
        except (JobExpired, LogRewound) as error:
            self._answer(row, Answer(status="failed", error={"code": "log_lost", "message": str(error)}, **_of(row)))
            return
        if fetching.reading.ended:
            self._answer(row, _answer(row, fetching.transcript))

    # Rows out ----------------------------------------------------------------------------------------------------

    def hand(self) -> list[Answer]:
        """The answers that are ready, for the caller to keep."""
        self._handed, self._ready = self._ready, []
        return self._handed

    def kept(self) -> None:
        """The caller has what it was handed: Redis may forget it."""
        self._to_drop.update((answer.job_id, None) for answer in self._handed if answer.status != "refused")
        self._handed = []

    def to_drop(self, most: int) -> list[str]:
        """Jobs whose answer is kept."""
        return [job_id for job_id, _ in zip(self._to_drop, range(most), strict=False)]

    def dropped(self, job_id: str) -> None:
        self._to_drop.pop(job_id, None)

    # -------------------------------------------------------------------------------------------------------------

    def _fetch(self, row: Row) -> None:
        self._ended[row.job_id] = Fetching(row, Reading(row.job_id))

    def _gone(self, row: Row) -> None:
        job_id = row.job_id
        self._lost[job_id] += 1
        if self._lost[job_id] < MAX_LOST:
            self._new[job_id] = row
            return
        message = f"its job vanished {MAX_LOST} times before it was read; give jobs a longer retention"
        self._answer(row, Answer(status="failed", error={"code": "expired", "message": message}, **_of(row)))

    def _answer(self, row: Row, answer: Answer) -> None:
        self._ended.pop(row.job_id, None)
        self._lost.pop(row.job_id, None)
        self._bytes -= len(row.body)
        self._ready.append(answer)


def _of(row: Row) -> dict[str, Any]:
    return {"custom_id": row.custom_id, "job_id": row.job_id, "number": row.number}


def _unasked(row: Row) -> Answer:
    error = {"code": "batch_cancelled", "message": "the batch was cancelled before this row was asked"}
    return Answer(status="cancelled", error=error, **_of(row))


def _answer(row: Row, transcript: Transcript) -> Answer:
    end = transcript.end
    assert end is not None
    status = end.type
    error = transcript.error
    if status == "cancelled":
        error = {"code": "batch_cancelled", "message": "this row was cancelled before its answer was complete"}
    completion = transcript.completion(row.job_id) if status in ANSWERED else None
    return Answer(
        status=status, completion=completion, usage=end.usage, error=error, attempts=transcript.attempt, **_of(row)
    )
