"""One HTTP/1.1 connection as an asyncio protocol: a request out, its response in, one at a time.

httptools (llhttp, as in Node) parses. The bytes of a body reach whoever reads it in the very turn of the loop that
brought them, without waking a task for each: at 35,000 packets a second the steps of tasks would fill a core.

What comes from the other end is not trusted: heads, trailers and chunk frames are capped, lengths and chunk sizes must
be right, and a connection on which more came than was asked for is not used again.
"""

from __future__ import annotations

import asyncio
import select
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol, cast

from httptools import (
    HttpParserCallbackError,
    HttpParserError,
    HttpParserUpgrade,
    HttpResponseParser,
)

MAX_HEAD: Final = 64 * 1024
"""Bytes of a head's names and values; the same many may come without a byte of body: interim responses, trailers."""

MAX_HELD: Final = 64 * 1024
"""Bytes of a body that nobody reads yet at which the connection is no longer read."""

DRAIN: Final = 1.0
"""Seconds to wait for the end of a body that nobody needs, so that its connection can be used again."""

SURELY_SENT: Final = 64 * 1024
"""Bytes of a request that a refusal does not leave behind, unread, in somebody's buffer: ours, TLS's, the system's."""


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


class Response:
    """A response: its head, then its body, which is held until somebody reads it."""

    __slots__ = (
        "_connection", "_error", "_flowing", "_head", "_held", "_held_size", "_more", "_paused", "_sink", "_size",
        "again", "complete", "headers", "quiet", "status", "surplus", "until_end",
    )  # fmt: skip

    def __init__(self, connection: Connection) -> None:
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
        self._connection: Connection | None = connection
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


class Connection(asyncio.Protocol):
    """A connection of a pool. `idle(connection)` is called when it can be used again, `lost` when it is gone."""

    def __init__(self, idle: Callable[[Connection], None], lost: Callable[[Connection], None]) -> None:
        self.served = 0
        """Responses that came whole."""
        self.draining = False
        """Whether it only waits for the end of a body."""
        self.wanted = True
        """Whether somebody waits for it to be made; if not, it is closed as soon as it is."""
        self._idle = idle
        self._lost = lost
        self._transport: asyncio.Transport
        self._response: Response | None = None
        self._parser: HttpResponseParser
        self._timer: asyncio.TimerHandle | None = None
        self._reading = True
        self._size = 0  # of the request

    def ask(self, request: bytes) -> Response:
        """Send a request (head and body). Its response waits for `head()`."""
        response = self._response = Response(self)
        self._size = len(request)
        self._parser = HttpResponseParser(response)
        # As tolerant as other clients of the parser are: of odd bytes in values, of LF alone, of padded chunk sizes.
        self._parser.set_dangerous_leniencies(
            lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )
        if self._transport.is_closing():
            self._fail(response, None)
            self._lost(self)  # again, should it have been before the pool knew of it
        else:
            self._transport.write(request)
        return response

    def silent(self) -> bool:
        """Whether nothing has come on an idle connection, not even its end, which the loop may not have seen yet."""
        waiting = select.poll()
        waiting.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not waiting.poll(0)

    def status(self) -> int:
        """The status of the head that is being read."""
        return self._parser.get_status_code()

    def keeps_alive(self) -> bool:
        """Whether the response that ends now leaves the connection open."""
        return self._parser.should_keep_alive()

    def pause(self) -> None:
        if self._reading and not self._transport.is_closing():
            self._reading = False
            self._transport.pause_reading()

    def resume(self) -> None:
        if not self._reading and not self._transport.is_closing():
            self._reading = True
            self._transport.resume_reading()

    def drain(self, response: Response) -> None:
        """Wait for the end of this response for a while only."""
        if self._response is response:
            self.draining = True
            self._timer = asyncio.get_running_loop().call_later(DRAIN, self.abort)

    def abort(self) -> None:
        """Close the socket now. Whoever still reads hears no more."""
        response, self._response = self._response, None
        if response is not None:
            response.forget()
        self._stop_timer()
        self._transport.abort()
        self._lost(self)

    # What the loop says ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of its own class
        if not self.wanted:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:
            self.abort()  # nobody asked
            return
        response.quiet += len(data)
        try:
            self._parser.feed_data(data)
        except HttpParserCallbackError as error:
            self._break(response, error.__context__ if isinstance(error.__context__, Exception) else error)
        except HttpParserUpgrade:
            self._break(response, MalformedError("the other end wants to speak another protocol"))
        except HttpParserError as error:
            if not response.complete:  # else it is the surplus that is none
                self._break(response, MalformedError(str(error)))
            else:
                response.surplus = True
                self._completed(response)
        else:
            if response.complete:
                self._completed(response)
            elif response.quiet > MAX_HEAD:
                self._break(response, MalformedError(f"{response.quiet:,} bytes came that are no body"))

    def eof_received(self) -> None:
        """The other end closes in order. It is told at once: the loop would first try to send what is unsent."""
        if self._response is not None:
            self._fail(self._response, None)
        self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        response = self._response
        if response is not None:
            self._fail(response, error)
        self._stop_timer()
        self._lost(self)

    # Ends --------------------------------------------------------------------------------------------------------

    def _completed(self, response: Response) -> None:
        self._response = None
        self._stop_timer()
        self.served += 1
        # The other end may have answered without reading it all, and would not read the next one either. How much is
        # unsent, a transport says; but under TLS not what waits below it, and what the system holds nobody knows.
        unsent = self._transport.get_write_buffer_size() > 0
        unread = unsent or (self._size > SURELY_SENT and response.status >= 300)
        again = response.again and not (response.surplus or response.until_end or unread)
        response.leave(None)
        if again and not self._transport.is_closing():
            self.draining = False
            self.resume()
            self._idle(self)
        else:
            self.abort()

    def _fail(self, response: Response, error: Exception | None) -> None:
        self._response = None
        if response.until_end and error is None:
            response.leave(None)
        elif error is None and not response.status and not response.quiet and self.served:
            # Closed in order, without a byte: the other end had done so before it saw the request. A reset is no such
            # sign, and asking again may cost twice: that is for the retries to decide.
            response.leave(StaleError("the idle connection had been closed"))
        elif error is None:
            where = "in the middle of the body" if response.status else "before a response"
            response.leave(BrokenError(f"the connection was closed {where}"))
        else:
            response.leave(BrokenError(f"the connection broke: {type(error).__name__} {error}".rstrip()))

    def _break(self, response: Response, error: Exception) -> None:
        self._response = None
        response.leave(error)
        self.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Nobody:
    """Takes a body and does nothing with it."""

    def data(self, data: bytes) -> None: ...

    def end(self, error: Exception | None) -> None: ...


_NOBODY: Final = _Nobody()
