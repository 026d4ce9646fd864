"""What a batch asks for, step by step, and what the replies mean. No I/O: the clients' shells answer each `Ask`.

One round: take rows while there is room; drop what the caller has kept and submit what is new, in one pipeline; look
at jobs that were silent for long; read the logs of what ended; hand the answers over; listen to the feed of ended
jobs. Every call may be sent again, so an outage only repeats a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from redis.exceptions import NoScriptError, OutOfMemoryError

from millstream import calls, reading
from millstream.calls import Call
from millstream.errors import RedisUnavailable
from millstream.keys import Keys
from millstream.redis_door import passes, words
from millstream.settings import Settings

from .answer import Answer
from .row import Row
from .source import Taken
from .window import Fetching, Window

WINDOW: Final = 1000
"""Jobs open at once unless told otherwise: five workers' worth of streams."""
CHUNK: Final = 250
"""Rows in one pipeline: about 0.7 MB with prompts of 2 KB."""
CHUNK_BYTES: Final = 1024 * 1024
STEP: Final = 10
"""Rows taken before the window is asked for room again: how large they are shows only then, and one may have 4 MB."""
FETCH: Final = 100
"""Logs read in one pipeline. A page is at most 4 MB and usually below 2 KB."""
FEED: Final = 1000
HANDFUL: Final = 500
"""Answers handed over at once: what the caller makes durable with one fsync."""
LISTEN: Final = 0.5
"""Longest wait for an ending; whoever shows progress wants a turn now and then."""
DRY: Final = 0.1
"""The same while the source has nothing just now but may have soon."""
GATHER: Final = 0.05
"""Seconds in which endings gather while most of the window is open: one fsync and two round trips serve them all."""
FULL: Final = 1.0
"""Seconds until a server that was full is asked to accept rows again."""
AWAY: Final = 0.5
"""Seconds between tries while Redis is away, beyond those of the connection itself."""


@dataclass(frozen=True, slots=True)
class Pipe:
    """Commands in one round trip; the reply is a list of replies, some of which may be exceptions."""

    fill: Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Listen:
    """Entries of the feed `key` after `cursor`, as XREAD gives them, waiting `seconds` for one; 0 = not at all."""

    key: str
    cursor: str
    seconds: float

    @property
    def milliseconds(self) -> int | None:
        """For XREAD's BLOCK, where 0 would be for ever."""
        return round(self.seconds * 1000) or None


@dataclass(frozen=True, slots=True)
class Take:
    """At most so many rows from the source: a `Taken`."""

    most: int


@dataclass(frozen=True, slots=True)
class Hand:
    """Answers for the caller, maybe none; it has kept them when it comes back for more."""

    answers: list[Answer]


@dataclass(frozen=True, slots=True)
class Sleep:
    """Nothing for so many seconds."""

    seconds: float


Ask = Pipe | Listen | Take | Hand | Sleep
Steps = Generator[Ask, Any, None]


class Course:
    """One batch. `cancel` withdraws rows instead of submitting them; `again` asks failed ones once more.

    While it runs: `window` has the counts, `trouble` says what Redis refuses or that it is away.
    """

    def __init__(
        self,
        keys: Keys,
        settings: Settings,
        window: int,
        *,
        cancel: bool = False,
        again: bool = False,
        header: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.window = Window(window, again=again)
        self.trouble = ""
        self.stopped = False
        self._keys, self._settings, self._header, self._clock = keys, settings, header, clock
        self._cancel = cancel
        self._dry = False
        self._idle = False  # the source has nothing just now
        self._cursor = ""
        self._full = ""  # why rows were refused at the last try
        self._submit_at = self._handed_at = 0.0

    def stop(self) -> None:
        """Take no more rows; what is open goes on to its end."""
        self.stopped = True

    @property
    def over(self) -> bool:
        """Whether nothing is left but to drop what is kept."""
        return (self._dry or self.stopped) and not len(self.window)

    def steps(self) -> Steps:
        """Run it. An outage at the very beginning is raised, a later one is waited out."""
        # Before the first submit: whatever ends after that is behind this cursor.
        [newest] = yield from self._ask(lambda pipe: pipe.xrevrange(self._keys.ended, count=1))
        self._cursor = newest[0][0].decode() if newest else "0-0"
        yield from self._send()  # nothing yet; but from here on a refusal is known to be passing
        while not self.over:
            yield from self._take()
            try:
                yield from self._round()
                self.trouble = self._full
            except RedisUnavailable as error:
                if not passes(error):
                    raise
                self.trouble = str(error)
                yield Sleep(AWAY)
            yield Hand(self.window.hand())
            self._handed_at = self._clock()
            self.window.kept()
        while self.window.busy:
            try:
                yield from self._send()
            except RedisUnavailable:
                return  # all is kept; the retention ends what could not be dropped

    # A round -----------------------------------------------------------------------------------------------------

    def _round(self) -> Steps:
        yield from self._send()
        yield from self._look_at_silent()
        yield from self._listen()
        ready = 0
        while ready < HANDFUL and (some := self.window.to_fetch(FETCH)):
            yield from self._fetch(some)
            ready += len(some)

    def _take(self) -> Steps:
        if self.stopped:
            self.window.leave_new()
        for _ in range(CHUNK // STEP):
            room = min(self.window.room, STEP)
            if self._dry or self.stopped or not room:
                return
            taken: Taken = yield Take(room)
            for row in taken.rows:
                if isinstance(row, Answer):
                    self.window.add_refused(row)
                else:
                    self.window.add(row)
            self._dry, self._idle = taken.dry, taken.idle
            if len(taken.rows) < room:
                return

    def _send(self) -> Steps:
        now = self._clock()
        drops = self.window.to_drop(2 * CHUNK)
        rows = self.window.to_submit(CHUNK, CHUNK_BYTES) if now >= self._submit_at else []
        wanted: list[Call[tuple[str, str]]] = [calls.drop(self._keys, job_id) for job_id in drops]
        wanted += map(self._opening, rows)
        replies = yield from self._run(wanted)
        for job_id, reply in zip(drops, replies, strict=False):
            self._checked(reply)
            self.window.dropped(job_id)
        if rows:
            self._full = ""
        for row, reply in zip(rows, replies[len(drops) :], strict=True):
            oom = isinstance(reply, OutOfMemoryError)
            outcome, status = ("full", self._words(reply)) if oom else self._checked(reply)
            if outcome == "full":
                self._full, self._submit_at = status, now + FULL
                continue  # running jobs still end, and what is kept is dropped: there will be room again
            self.window.accepted(row.job_id, outcome, status, now)

    def _opening(self, row: Row) -> Call[tuple[str, str]]:
        if self._cancel:
            return calls.withdraw(self._keys, row.job_id)
        return calls.accept(self._keys, self._settings, row.job_id, row.spec, row.body)

    def _look_at_silent(self) -> Steps:
        silent = self.window.to_look(self._clock(), 4 * CHUNK)
        if not silent:
            return

        def fill(pipe: Any) -> None:
            for job_id in silent:
                pipe.hmget(self._keys.state(job_id), "status", "wait")

        replies = yield from self._ask(fill)
        for job_id, (status, wait) in zip(silent, replies, strict=True):
            self.window.looked(job_id, status and status.decode(), waits_for(wait), self._clock())

    def _fetch(self, some: Sequence[Fetching]) -> Steps:
        def fill(pipe: Any) -> None:
            for each in some:  # they have ended: what is read one after the other belongs together
                job_id = each.reading.job_id
                pipe.xrange(self._keys.log(job_id), min=f"{max(1, each.reading.cursor)}-0", count=reading.PAGE)
                pipe.hmget(self._keys.state(job_id), reading.STATE_FIELDS)

        replies = yield from self._ask(fill)
        for each, entries, state in zip(some, replies[::2], replies[1::2], strict=True):
            self.window.fetched(each, reading.page(entries, state))

    def _listen(self) -> Steps:
        window = self.window
        if window.crowded and (rest := self._handed_at + GATHER - self._clock()) > 0:
            yield Sleep(rest)
        more = bool(window.room) and not self._dry and not self.stopped
        wait = DRY if more and self._idle else LISTEN
        unhurried = not window.busy or self._clock() < self._submit_at
        if not unhurried or (more and not self._idle) or window.has_ready or self.over:
            wait = 0
        entries = yield Listen(self._keys.ended, self._cursor, wait)
        window.ended(fields[b"id"].decode() for _, fields in entries)
        if entries:
            self._cursor = entries[-1][0].decode()

    # Asking ------------------------------------------------------------------------------------------------------

    def _run(self, wanted: Sequence[Call[Any]]) -> Generator[Ask, Any, list[Any]]:
        """What each call is answered, an exception where Redis refused it."""
        if not wanted:
            return []
        scripts = [call.load(header=self._header) for call in wanted]

        def fill(pipe: Any) -> None:
            for call, script in zip(wanted, scripts, strict=True):
                pipe.evalsha(script.sha, len(call.keys), *call.keys, *call.args)

        replies: list[Any] = yield Pipe(fill)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            texts = {script.sha: script.text for script in scripts}
            yield from self._ask(lambda pipe: [pipe.script_load(text) for text in texts.values()])
            replies = yield Pipe(fill)  # those that had run say so again
        return [
            reply if isinstance(reply, Exception) else call.decode(reply)
            for call, reply in zip(wanted, replies, strict=True)
        ]

    def _ask(self, fill: Callable[[Any], Any]) -> Generator[Ask, Any, list[Any]]:
        """The replies, of which none may be an exception."""
        replies = yield Pipe(fill)
        return [self._checked(reply) for reply in replies]

    def _checked(self, reply: Any) -> Any:
        if isinstance(reply, Exception):
            raise RedisUnavailable(self._words(reply)) from reply
        return reply

    def _words(self, error: Any) -> str:
        return words(error, self._settings.redis_url)


def waits_for(wait: bytes | None) -> str:
    """What a queued job waits for, in a word or two."""
    if not wait:
        return ""
    try:
        found = msgspec.json.decode(wait)
    except (msgspec.MsgspecError, UnicodeError):
        return "something"
    if not isinstance(found, dict):
        return str(found)[:40]
    named = " ".join(str(found[name]) for name in ("what", "upstream") if found.get(name))[:60] or "something"
    return f"{named} ({str(found['because'])[:20]})" if found.get("because") else named
