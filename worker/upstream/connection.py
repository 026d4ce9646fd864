"""One HTTP/1.1 connection as an asyncio protocol: a request out, its response in, one at a time.

httptools (llhttp, as in Node) parses. What comes from the other end is not trusted: heads, trailers and chunk frames
are capped, lengths and chunk sizes must be right, and a connection on which more came than was asked for is not used
again.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from typing import Final, cast

from httptools import (
    HttpParserCallbackError,
    HttpParserError,
    HttpParserUpgrade,
    HttpResponseParser,
)

from .response import MAX_HEAD, BrokenError, MalformedError, Response, StaleError

DRAIN: Final = 1.0
"""Seconds to wait for the end of a body that nobody needs, so that its connection can be used again."""

SURELY_SENT: Final = 64 * 1024
"""Bytes of a request that a refusal does not leave behind, unread, in somebody's buffer: ours, TLS's, the system's."""


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
        return self._parser.get_status_code()

    def keeps_alive(self) -> bool:
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
