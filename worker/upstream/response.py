"""An HTTP/1.1 response as it comes: what the parser finds of it, and the ways to read its body.

The bytes of a body reach whoever reads it in the very turn of the loop that brought them, without waking a task for
each: at 35,000 packets a second the steps of tasks would fill a core.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Protocol

MAX_HEAD: Final = 64 * 1024
"""Bytes of a head's names and values; the same many may come without a byte of body: interim responses, trailers."""

MAX_HELD: Final = 64 * 1024
"""Bytes of a body that nobody reads yet at which the connection is no longer read."""


class BrokenError(Exception):
    """The connection or what came over it ended the response early; the message says how."""


class MalformedError(BrokenError):
    """What came is no HTTP/1.1 response, or more of one than anybody needs."""


class StaleError(BrokenError):
    """A connection that had served before was closed without one byte of response: ask again on a fresh one."""


class Sink(Protocol):
    """Who reads a body. Neither call may fail."""

    def data(self, data: bytes) -> None: ...

    def end(self, error: Exception | None) -> None:
        """Nothing more comes; `error` says why, if it is not the body's own end."""


class Carrier(Protocol):
    """The connection that a response comes over."""

    def status(self) -> int:
        """The status of the head that is being read."""

    def keeps_alive(self) -> bool:
        """Whether the response that ends now leaves the connection open."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def drain(self, response: Response) -> None:
        """Wait for the end of this response for a while only."""

    def abort(self) -> None:
        """Close the socket now."""


class Response:
    """A response: its head, then its body, which is held until somebody reads it."""

    __slots__ = (
        "_connection", "_error", "_flowing", "_head", "_held", "_held_size", "_more", "_paused", "_sink", "_size",
        "again", "complete", "headers", "quiet", "status", "surplus", "until_end",
    )  # fmt: skip

    def __init__(self, connection: Carrier) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False
        """Whether nothing more comes."""
        self.again = False
        """Whether the other end keeps the connection open for another one."""
        self.surplus = False
        """Whether more came than this response."""
        self.until_end = False
        """Whether the body ends with the connection: the head gave neither length nor chunks."""
        self.quiet = 0
        """Bytes that came since the last one of the body."""
        self._connection: Carrier | None = connection
        self._head: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._size = 0
        self._sink: Sink | None = None
        self._flowing = False  # to the sink, as it comes
        self._paused = False
        self._held: deque[bytes] = deque()
        self._held_size = 0
        self._error: Exception | None = None
        self._more: asyncio.Future[None] | None = None  # of who waits in `next`

    # Reading -----------------------------------------------------------------------------------------------------

    async def head(self) -> None:
        """Wait for status and headers. Raises BrokenError when they do not come."""
        try:
            await self._head
        except asyncio.CancelledError:
            self.close()
            raise

    def header(self, name: bytes) -> str:
        """The first header of this name (in lower case), empty if there is none."""
        return next((value.decode("latin-1") for key, value in self.headers if key.lower() == name), "")

    def start(self, sink: Sink) -> None:
        """Give the body to `sink`, beginning with what is here, at once."""
        self._sink = sink
        self.resume()

    def pause(self) -> None:
        """Hold the body back, as soon as this call returns; the other end will notice."""
        self._paused, self._flowing = True, False
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        """Go on; what was held comes before this call returns, unless it pauses again."""
        self._paused = False
        sink = self._sink
        while sink is not None and self._held and not self._paused:
            data = self._held.popleft()
            self._held_size -= len(data)
            sink.data(data)
        if self._paused or sink is None:
            return
        self._flowing = True
        if self.complete:
            sink.end(self._error)
        elif self._connection is not None:
            self._connection.resume()

    async def next(self) -> bytes:
        """The next piece of a body that has no sink, empty at its end. Raises BrokenError."""
        while not self._held:
            if self.complete and self._error is not None:
                raise self._error
            if self.complete:
                return b""
            self._more = asyncio.get_running_loop().create_future()
            await self._more
        data = self._held.popleft()
        self._held_size -= len(data)
        if self._connection is not None:
            self._connection.resume()
        return data

    async def read(self, most: int, seconds: float) -> bytes:
        """The body, or what came of it within its first `most` bytes and so many seconds."""
        found = bytearray()
        try:
            async with asyncio.timeout(seconds):
                while len(found) < most and (data := await self.next()):
                    found += data
        except (BrokenError, TimeoutError):
            pass
        return bytes(found[:most])

    def finish(self) -> None:
        """The rest is not needed. It is waited for a moment in silence, so that the connection can be used again."""
        if self._connection is not None:
            self._held.clear()
            connection = self._connection
            self.start(_NOBODY)
            connection.drain(self)

    def close(self) -> None:
        """Close the connection at once, unless the whole response has come."""
        if self._connection is not None:
            self._connection.abort()

    # What the parser found ---------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self.surplus = self.complete

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.status:
            return  # a trailer, or the head of a surplus response
        self._size += len(name) + len(value)
        if self._size > MAX_HEAD:
            raise MalformedError(f"the head of the response exceeds {MAX_HEAD:,} bytes")
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        assert self._connection is not None
        if self.status:
            return
        status = self._connection.status()
        if status < 200 and status != 101:  # interim: the real one follows
            self.headers.clear()
            return
        self.status = status
        coding = self.header(b"transfer-encoding").lower()
        if coding not in ("", "chunked", "identity"):
            raise MalformedError(f"the response has the transfer encoding {coding[:40]!r}, expected chunked or none")
        self.until_end = coding != "chunked" and not self.header(b"content-length") and status not in (204, 304)
        if not self._head.done():
            self._head.set_result(None)

    def on_body(self, data: bytes) -> None:
        self.quiet = 0
        if self._flowing:
            self._sink.data(data)  # type: ignore[union-attr]  # flowing means that there is one
            return
        self._held.append(data)
        self._held_size += len(data)
        self._tell()
        if self._held_size > MAX_HELD and self._connection is not None:
            self._connection.pause()

    def on_message_complete(self) -> None:
        if self.status and not self.complete:
            assert self._connection is not None
            self.complete = True
            self.again = self._connection.keeps_alive()  # the parser knows only now

    def _tell(self) -> None:
        if self._more is not None and not self._more.done():
            self._more.set_result(None)

    # What the connection says ------------------------------------------------------------------------------------

    def leave(self, error: Exception | None) -> None:
        """Nothing more comes over the connection, which is not this response's any longer."""
        self.complete = True
        self._connection = None
        self._error = error
        if not self._head.done():
            self._head.set_exception(error or BrokenError("the connection was closed before a response"))
        elif self._flowing and self._sink is not None:
            self._sink.end(error)
        self._tell()

    def forget(self) -> None:
        """As `leave`, by whoever reads: it wants to hear no more."""
        self._connection = None
        self._flowing = False
        self._sink = None
        if not self._head.done():
            self._head.cancel()


class _Nobody:
    """Takes a body and does nothing with it."""

    def data(self, data: bytes) -> None: ...

    def end(self, error: Exception | None) -> None: ...


_NOBODY: Final = _Nobody()
