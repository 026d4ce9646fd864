"""One job's events on their way to the log: what waits, what is frozen into a call, what was acknowledged. Pure.

    text(), event() ──> waiting ──freeze()──> frame ──answered("ok")──> kept (the last 32 KB)
                                                │
                                                └─ unanswered: sent again, byte for byte

Seqs are given when events are frozen. A frozen frame never changes until it is answered, because the server may have
it: text merged into a retried frame would be answered `duplicate` and lost.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from millstream.calls import Ending, Frame, holder
from millstream.events import compact, compact_text

MAX_FRAME: Final = 64 * 1024
"""Bytes of one job's events in one call: a long answer must not hold up its siblings."""

MAX_TEXT: Final = 16 * 1024
"""Characters of one chunk event; longer text becomes several."""

FULL: Final = 256 * 1024
"""Characters waiting at which the upstream is no longer read."""

KEPT: Final = 32 * 1024
"""Bytes acknowledged that can be sent again, should the server lose them in a failover: 4,000 chunks of a token each,
far more than the two seconds that an `everysec` server may lose. In one buffer: 4,000 objects would take 250 KB."""

KEPT_SLACK: Final = KEPT // 4
"""The buffer is cut back when it exceeds KEPT by this, not at every event."""

_CHUNK_STARTS: Final = (b'"', b"[", b'{"type":"chunk"')
_TEXT_STARTS: Final = (*_CHUNK_STARTS, b'{"type":"resumed"')
"""Also a seam, which says nothing without the text before it."""

Stopped = Callable[[str], None]


class Outbox:
    """The events of one attempt at one job."""

    def __init__(
        self, job_id: str, keys: tuple[str, str], token: str, attempt: int, seq: int, on_stop: Stopped
    ) -> None:
        self.job_id = job_id
        self.token = token
        self._keys = keys  # of the state and the log
        self._on_stop = on_stop
        self.stopped: str | None = None
        """Why nothing more may be written: closed, fenced, unknown, error or log_lost."""
        self.ended = False
        """Whether the terminal event was acknowledged."""
        self.written_at = 0.0
        """When the last frame was acknowledged, by the loop's clock; the writer's to set."""
        self.usage = b""
        """Running usage (JSON) for the state, sent with the next frame."""
        self._waiting: deque[bytes] = deque()
        self._texts: list[str] = []
        self._index = 0
        self._merged = 0
        self._length = 0  # of self._texts
        self._size = 0  # of everything that waits
        self._frame: Frame | None = None
        self._kept = bytearray()  # events, each ended by a newline, which JSON holds only escaped
        self._kept_count = 0
        self._ending: Ending | None = None
        self._abandoned = False
        self._room = asyncio.Event()
        self._settled = asyncio.Event()
        self.begin(attempt, seq)

    def begin(self, attempt: int, seq: int) -> None:
        """A new attempt starts after `seq`. Nothing may be in flight."""
        self.attempt, self.seq = attempt, seq
        self.holder = holder(self.token, attempt)
        self.shown = False
        """Whether a chunk of this attempt was frozen: from then on it may have been seen."""
        self._kept.clear()  # a gap reaches back to the claim of this attempt at most
        self._kept_count = 0
        self._room.set()
        self._settled.set()

    # Filling -----------------------------------------------------------------------------------------------------

    def text(self, index: int, text: str, n: int = 1) -> None:
        """Content of a choice; merges with what waits of the same choice."""
        if self._abandoned or self._ending is not None:
            return
        if self._texts and (index != self._index or self._length + len(text) > MAX_TEXT):
            self._close_text()
        self._index = index
        self._merged += n
        if len(text) <= MAX_TEXT:
            self._texts.append(text)
            self._length += len(text)
        else:
            for start in range(0, len(text), MAX_TEXT):
                self._texts.append(text[start : start + MAX_TEXT])
                self._close_text()
        self._grow(len(text))

    def event(self, event: bytes) -> None:
        """Any other event, in compact form."""
        if self._abandoned or self._ending is not None:
            return
        self._close_text()
        self._waiting.append(event)
        self._grow(len(event))

    def finish(self, event: bytes, ending: Ending) -> None:
        """The terminal event. Nothing can follow: what still comes is ignored."""
        if self._ending is None:
            self.event(event)
            self._ending = ending

    @property
    def finishing(self) -> bool:
        """Whether the terminal event is on its way: the answer is whole, and nothing may be taken out of it."""
        return self._ending is not None

    def abandon(self) -> None:
        """The attempt is given up: what waits is dropped and what still comes is ignored, so that no gap is written."""
        self._clear()
        self._abandoned = True
        self._shrink()

    def drop_chunks(self) -> None:
        """Forget the chunks nobody has seen, because the attempt they belong to broke."""
        self._texts.clear()
        self._length = self._merged = 0
        self._waiting = deque(event for event in self._waiting if not event.startswith(_TEXT_STARTS))
        self._shrink()

    def _close_text(self) -> None:
        if self._texts:
            self._waiting.append(compact_text("".join(self._texts), self._index, max(1, self._merged)))
            self._texts.clear()
            self._length = self._merged = 0

    def _grow(self, size: int) -> None:
        self._size += size
        self._settled.clear()
        if self._size >= FULL:
            self._room.clear()

    def _shrink(self) -> None:
        self._size = self._length + sum(map(len, self._waiting)) if self._waiting else self._length
        if self._size < FULL:
            self._room.set()
        if self._frame is None and not self._size and not self.waiting:
            self._settled.set()

    @property
    def full(self) -> bool:
        """Whether the upstream must not be read for now."""
        return self._size >= FULL

    async def room(self) -> None:
        """Wait until more may be put in."""
        await self._room.wait()

    async def settled(self) -> None:
        """Wait until everything was acknowledged, or refused, a heartbeat in flight included."""
        await self._settled.wait()

    @property
    def waiting(self) -> bool:
        """Whether there is something to freeze."""
        return bool(self._waiting or self._texts)

    # Sending -----------------------------------------------------------------------------------------------------

    def freeze(self) -> Frame:
        """The next frame, at most MAX_FRAME long but for one larger event; without events it is a heartbeat."""
        if self._frame is not None:
            return self._frame
        if not self._waiting and self._length < MAX_TEXT:  # the usual frame: one piece of text, or a heartbeat
            self._close_text()
            events = list(self._waiting)
            self._waiting.clear()
            self.shown = self.shown or bool(events)
        else:
            events = self._next_events()
        ending = None if self._waiting else self._ending
        self._frame = Frame(self.job_id, self._keys, self.holder, self.seq + 1, events, self.usage, ending)
        self.usage = b""
        self._settled.clear()
        return self._frame

    def heartbeat(self) -> Frame:
        """A frame that changes nothing here or there but the lease, whatever else is on its way; seq 1 is no gap."""
        return Frame(self.job_id, self._keys, self.holder, 1, [], b"", None)

    def _next_events(self) -> list[bytes]:
        self._close_text()
        events: list[bytes] = []
        size = 0
        while self._waiting and (not events or size + len(self._waiting[0]) <= MAX_FRAME):
            event = self._waiting.popleft()
            size += len(event)
            events.append(event)
            self.shown = self.shown or event.startswith(_CHUNK_STARTS)
        return events

    def answered(self, code: str, seq: int) -> None:
        """The server's answer to the frame."""
        frame, self._frame = self._frame, None
        assert frame is not None
        if code in ("ok", "duplicate"):
            self.seq = frame.first + len(frame.events) - 1
            self.ended = frame.ending is not None
            for event in frame.events:
                self._keep(event)
        elif code == "gap":
            self._go_back(frame, seq)
        else:
            self._stop(code)
        self._shrink()

    def _keep(self, event: bytes) -> None:
        self._kept += event
        self._kept += b"\n"
        self._kept_count += 1
        if len(self._kept) > KEPT + KEPT_SLACK:
            cut = self._kept.index(b"\n", len(self._kept) - KEPT - 1) + 1
            self._kept_count -= self._kept.count(b"\n", 0, cut)
            del self._kept[:cut]

    def _go_back(self, frame: Frame, seq: int) -> None:
        """The server lost events that it had acknowledged: send the same ones again, or fail the job honestly."""
        lost = self.seq - seq
        self.seq = seq
        self.usage = self.usage or frame.usage
        if lost <= self._kept_count:
            self._waiting.extendleft(reversed([*self._take_back(lost), *frame.events]))
            return
        self._clear()
        self._ending = None
        self.finish(
            compact("failed", finish_reasons={}, error=_LOG_LOST),
            Ending("failed", b"{}", msgspec.json.encode(_LOG_LOST)),
        )
        self._notify("log_lost")

    def _take_back(self, count: int) -> list[bytes]:
        events = bytes(self._kept).split(b"\n")[:-1]
        still = len(events) - count
        self._kept = bytearray(b"".join(event + b"\n" for event in events[:still]))
        self._kept_count = still
        return events[still:]

    def _stop(self, code: str) -> None:
        self.abandon()
        self._notify(code)

    def _clear(self) -> None:
        self._waiting.clear()
        self._texts.clear()
        self._length = self._merged = 0

    def _notify(self, code: str) -> None:
        if self.stopped is None:
            self.stopped = code
            self._on_stop(code)


_LOG_LOST: Final = {"code": "log_lost", "message": "Redis lost more of the log than the worker still had"}
