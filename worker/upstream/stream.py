"""The answer as it comes: bytes are taken from the connection the moment they arrive, without waking a task for each.

connection.py hands each piece of the body on in the turn of the loop that brought it, down to the outbox: a future and
a task's step for every chunk would cost as much as decoding it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from .chunks import DONE, Chunks, Part
from .failures import UpstreamFailure
from .response import BrokenError, Response
from .sse import EventTooLargeError, Named, SseDecoder

MAX_ANSWER: Final = 512 * 1024 * 1024
"""Bytes of one response, JSON and all; an endless stream ends here."""

BROKE: Final = "the connection broke before the end of the answer"

Take = Callable[[Sequence[Part]], bool]


class Stream:
    """One response's body, decoded. The `Sink` of its response."""

    def __init__(self, body: Response, start: bytes = b"", max_answer: int = MAX_ANSWER) -> None:
        """`start`: what was read of the body already."""
        self._body = body
        self._start = start
        self._max_answer = max_answer
        self._decoder = SseDecoder()
        self._chunks = Chunks()
        self._bytes = 0
        self._take: Take = _nothing
        self._failure: Exception | None = None
        self._full = False
        self._ended = False
        self._wake: asyncio.Future[None] | None = None
        self.done = False
        """Whether `[DONE]` was seen; nothing after it counts."""

    async def play(self, take: Take, room: Callable[[], Awaitable[None]]) -> None:
        """Give every part to `take`, as it comes, to the end. Raises UpstreamFailure.

        `take` answers whether it has room for more; if not, the reading pauses until `room()` returns.
        """
        self._take = take
        if self._start:
            self.data(self._start)
        if not self._full:
            self._body.start(self)
        while not self._over:
            if not self._full:  # it may be again, from what had come already: then nobody wakes us
                self._wake = asyncio.get_running_loop().create_future()
                await self._wake
            if self._full and not self._over:
                await room()
                self._full = False
                self._body.start(self)
        if self._failure is not None:
            raise self._failure

    @property
    def _over(self) -> bool:
        return self.done or self._ended or self._failure is not None

    def data(self, packet: bytes) -> None:
        """Decode what came; runs in the turn of the loop that brought it."""
        if self.done or self._failure is not None:
            return
        try:
            room = self._take(self._decode(packet))
        except UpstreamFailure as failure:
            self._failure, room = failure, True
        except MemoryError:
            self._decoder = SseDecoder()  # what it held is most of what can be given back
            what = "the worker ran out of memory while it read the answer"
            self._failure, room = UpstreamFailure("out_of_memory", what), True
        if room and not self.done and self._failure is None:
            return
        if not room:
            self._full = True
            self._body.pause()
        self._awake()

    def end(self, error: Exception | None) -> None:
        """Nothing more comes."""
        if isinstance(error, BrokenError):
            self._failure = self._failure or UpstreamFailure("stream_broken", BROKE)
        elif error is not None:
            self._failure = error  # a bug of ours in `data`
        elif not self._over:
            self._ended = True
            self._take(self._events(self._decoder.close()))
        self._awake()

    def _awake(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _decode(self, packet: bytes) -> Sequence[Part]:
        self._bytes += len(packet)
        if self._bytes > self._max_answer:
            raise UpstreamFailure("answer_too_large", f"the answer exceeds {self._max_answer:,} bytes", retryable=False)
        try:
            events = self._decoder.feed(packet)
        except EventTooLargeError:
            raise UpstreamFailure("event_too_large", "one event exceeds 4 MB", retryable=False) from None
        if len(events) == 1 and isinstance(event := events[0], bytes) and event[:1] == b"{":  # the usual packet
            return self._chunks.parts(event)
        return self._events(events)

    def _events(self, events: Sequence[bytes | Named]) -> Sequence[Part]:
        """The parts of some events, up to the first that says the stream is over or broken."""
        found: list[Part] = []
        try:
            for event in events:
                if isinstance(event, Named):
                    found += self._chunks.named(event.name, event.data)
                elif said := event.strip():
                    if said[:1] == b"[" and said[: len(DONE)].upper() == DONE:
                        self.done = True
                        break
                    found += self._chunks.parts(said)
        except UpstreamFailure as failure:
            self._failure = failure
        return found


def _nothing(_: Sequence[Part]) -> bool:
    return True
