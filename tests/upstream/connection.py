"""One client's connection: requests in, one answer after the other out, and the moment it goes noticed at once."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from .journal import Exchange, Journal, Outcome
from .playing import Gates, Player
from .request import NotHttpError, Request, RequestParser
from .script import Script

_RST_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, for no time
_SIOCOUTQNSD = 0x894B  # linux/sockios.h: bytes in the send queue that were never sent
_NOT_HTTP = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


@dataclass
class Service:
    """What all connections of one server share. `choose` gives the script of a request."""

    choose: Callable[[Request], Script]
    journal: Journal
    gates: Gates
    connections: set[Connection] = field(default_factory=set)
    accepted: int = 0
    stopping: bool = False


class Connection(asyncio.Protocol):
    """Reading never stops, whatever the script is doing: an EOF or RST from the client ends the answer there."""

    def __init__(self, service: Service) -> None:
        """A connection that is not made yet."""
        self._service, self._journal = service, service.journal
        self._number = 0
        self._parser = RequestParser()
        self._waiting: asyncio.Queue[Exchange | None] = asyncio.Queue()  # None: what came was not HTTP
        self._open: list[Exchange] = []
        self._latest: Exchange | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._task: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The client is here."""
        made = cast("asyncio.Transport", transport)  # uvloop's are none by inheritance
        self._transport = made
        if self._service.stopping:
            self._transport.abort()
            return
        self._service.connections.add(self)
        self._service.accepted += 1
        self._number = self._service.accepted
        # No buffer of our own: when write() returns, the kernel has the bytes, and the journal's count is true.
        made.set_write_buffer_limits(high=0)
        self._task = asyncio.get_running_loop().create_task(self._serve())

    def data_received(self, data: bytes) -> None:
        """Requests are journaled here, not when their turn comes: a client that leaves at once has still asked."""
        try:
            for request in self._parser.feed(data):
                self._latest = self._journal.begin(self._number, request)
                self._open.append(self._latest)
                self._waiting.put_nowait(self._latest)
        except NotHttpError:
            self._waiting.put_nowait(None)

    def eof_received(self) -> None:
        """A client that has shut its sending side is taken as gone: none of those under test does it and reads on."""
        self._over("client_closed")
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed, by whichever side."""
        self._over("client_closed")
        if self._latest is not None:
            self._latest.closed_at = time.monotonic()
            self._journal.changed()
        self._service.connections.discard(self)
        self._lost.set()

    def pause_writing(self) -> None:
        """The client reads too slowly for its window."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """All was taken."""
        self._writable.set()

    def stop(self) -> None:
        """The server is stopping."""
        self._over("server_stopped")
        self._transport.abort()

    async def ended(self) -> None:
        """Returns when the socket is closed and nothing of this connection runs any more."""
        await self._lost.wait()
        if self._task is not None:
            await asyncio.wait([self._task])

    def _over(self, outcome: Outcome) -> None:
        for exchange in self._open:
            self._journal.end(exchange, outcome)
        self._open.clear()
        if self._task is not None:
            self._task.cancel()

    async def _serve(self) -> None:
        while not self._transport.is_closing():
            exchange = await self._waiting.get()
            if exchange is None:
                await self.write(_NOT_HTTP)
                self.close()
                return
            try:
                script = self._service.choose(exchange.request)
                await Player(script, exchange, self, self._journal, self._service.gates).play()
            except Exception as broken:  # noqa: BLE001 - the test's own script: stop() raises it where the test sees it
                self._journal.end(exchange, "failed", broken)
                self._transport.abort()
            if exchange in self._open:
                self._open.remove(exchange)

    async def write(self, data: bytes) -> None:
        """Sends; returns when the kernel has taken all of it."""
        self._transport.write(data)
        if not self._writable.is_set():
            await self._writable.wait()

    async def handed_over(self) -> None:
        """Returns when the client's kernel has been sent everything (where there is a way to know: on Linux)."""
        sock = self._transport.get_extra_info("socket")
        while sys.platform == "linux" and _unsent(sock):  # noqa: ASYNC110 - the kernel tells nobody when
            await asyncio.sleep(0.001)

    def reset(self) -> None:
        """Ends the connection with a RST, which throws away whatever is not handed over."""
        sock = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
        self._transport.abort()

    def close(self) -> None:
        """Ends the connection with a FIN."""
        self._transport.close()


def _unsent(sock: socket.socket) -> int:
    """How many bytes wait in the kernel for room at the client."""
    (unsent,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), _SIOCOUTQNSD, b"\0\0\0\0"))
    return int(unsent)
