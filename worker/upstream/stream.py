"""The answer as it comes: bytes are taken from the connection the moment they arrive, without waking a task for each.

aiohttp parses the HTTP framing. A tap in front of its protocol hands what it parsed on, in the same turn of the loop:
a future and a task's step for every chunk would cost as much as decoding it (measured: a sixth of all reading).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, cast

import aiohttp

from .chunks import DONE, Chunks, Part
from .failures import UpstreamFailure
from .sse import EventTooLargeError, Named, SseDecoder

MAX_ANSWER: Final = 512 * 1024 * 1024
"""Bytes of one response, JSON and all; an endless stream ends here."""

BROKE: Final = "the connection broke before the end of the answer"

Take = Callable[[Sequence[Part]], bool]


class Stream:
    """One response's body, decoded."""

    def __init__(self, body: aiohttp.ClientResponse, start: bytes = b"", max_answer: int = MAX_ANSWER) -> None:
        """`start`: what was read of the body already."""
        self._body = body
        self._start = start
        self._max_answer = max_answer
        self._decoder = SseDecoder()
        self._chunks = Chunks()
        self._bytes = 0
        self._inside = False
        self._failure: UpstreamFailure | None = None
        self._full = False
        self._ended = False
        self._wake: asyncio.Future[None] | None = None
        self.done = False
        """Whether `[DONE]` was seen; nothing after it counts."""

    async def play(self, take: Take, room: Callable[[], Awaitable[None]]) -> None:
        """Give every part to `take`, as it comes, to the end. Raises UpstreamFailure.

        `take` answers whether it has room for more; if not, the reading pauses until `room()` returns.
        """
        if self._start:
            self._full = not take(self._decode(self._start))
        connection = self._body.connection
        if connection is None or connection.transport is None:  # the whole body came with its headers
            await self._read_out(take, room)
            return
        transport = connection.transport
        inner = cast("asyncio.Protocol", connection.protocol)
        transport.set_protocol(_Tap(inner, lambda: self._arrived(take)))
        try:
            self._arrived(take)
            while not self._over:
                if not self._full:  # it may be again, from what had been parsed already: then nobody wakes us
                    self._wake = asyncio.get_running_loop().create_future()
                    await self._wake
                if self._full and not self._over:
                    transport.pause_reading()
                    await room()
                    self._full = False
                    transport.resume_reading()
                    self._arrived(take)
        finally:
            if not transport.is_closing():
                transport.set_protocol(inner)
        if self._failure is not None:
            raise self._failure

    async def _read_out(self, take: Take, room: Callable[[], Awaitable[None]]) -> None:
        self._arrived(take)
        while not self._over:
            await room()
            self._full = False
            self._arrived(take)
        if self._failure is not None:
            raise self._failure

    @property
    def _over(self) -> bool:
        return self.done or self._ended or self._failure is not None

    def _arrived(self, take: Take) -> None:
        """Decode what aiohttp has parsed; runs in the turn of the loop that brought it."""
        if self._inside or self._full or self._over:
            return  # taking data may make aiohttp parse more, which calls here again
        self._inside = True
        content = self._body.content
        try:
            if content.exception():
                raise UpstreamFailure("stream_broken", BROKE)
            while not self._full and not self._over and (packet := content.read_nowait()):
                self._full = not take(self._decode(packet))
            if not self._full and not self._over and content.at_eof():
                self._ended = True
                take(self._events(self._decoder.close()))
        except UpstreamFailure as failure:
            self._failure = failure
        finally:
            self._inside = False
        if (self._full or self._over) and self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _decode(self, packet: bytes) -> list[Part]:
        self._bytes += len(packet)
        if self._bytes > self._max_answer:
            raise UpstreamFailure("answer_too_large", f"the answer exceeds {self._max_answer:,} bytes", retryable=False)
        try:
            events = self._decoder.feed(packet)
        except EventTooLargeError:
            raise UpstreamFailure("event_too_large", "one event exceeds 4 MB", retryable=False) from None
        return self._events(events)

    def _events(self, events: Sequence[bytes | Named]) -> list[Part]:
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


class _Tap(asyncio.Protocol):
    """Lets a protocol do its work, then tells."""

    __slots__ = ("_inner", "_tell")

    def __init__(self, inner: asyncio.Protocol, tell: Callable[[], None]) -> None:
        self._inner = inner
        self._tell = tell

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)
        self._tell()

    def eof_received(self) -> bool | None:
        keep_open = self._inner.eof_received()
        self._tell()
        return keep_open

    def connection_lost(self, error: Exception | None) -> None:
        self._inner.connection_lost(error)
        self._tell()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()
