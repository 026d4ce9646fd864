"""The connections to an upstream: opened when there is no idle one, kept a while, closed for good at once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from functools import cache
from typing import Any, Final, NamedTuple

import aiohappyeyeballs

from .connection import Connection
from .response import BrokenError, Response, StaleError

KEEP_IDLE: Final = 15.0
"""Seconds an idle connection is kept: less than what servers and what lies between allow (60 s and more)."""

KEEP_ADDRESSES: Final = 10.0
"""Seconds a name's addresses are kept. Hundreds of streams may begin at once, and each would ask."""

NEXT_ADDRESS: Final = 0.25
"""Seconds one address is tried before the next one is beside it (RFC 8305)."""


class Origin(NamedTuple):
    """Where requests go."""

    tls: bool
    host: str
    port: int


class Pool:
    """Connections by origin.

    `connections`: how many may be open at once. Those with a request in flight are as many as there are callers; beyond
    that, those that only drain are closed, then the idle ones. `connect_timeout` (seconds) includes the name's look-up
    and the TLS handshake.
    """

    def __init__(self, connections: int, connect_timeout: float) -> None:
        self._most = connections
        self._connect_timeout = connect_timeout
        self._open: set[Connection] = set()
        self._idle: dict[Origin, dict[Connection, float]] = {}  # since when; the newest last
        self._addresses: dict[Origin, tuple[float, asyncio.Task[list[Any]]]] = {}
        self._sweep: asyncio.TimerHandle | None = None

    async def ask(self, origin: Origin, request: bytes) -> Response:
        """Send a request and wait for the head of its response. Raises BrokenError or OSError.

        It is sent again, over a fresh connection, only when an idle one turns out to be closed and not one byte of a
        response had come: the other end had given it up before it saw the request.
        """
        if (connection := self._take_idle(origin)) is not None:
            response = connection.ask(request)
            with contextlib.suppress(StaleError):
                await response.head()
                return response
        connection = await self._connect(origin)
        response = connection.ask(request)
        await response.head()
        return response

    def close(self) -> None:
        """Close every connection."""
        for connection in list(self._open):
            connection.abort()
        for _, task in self._addresses.values():
            task.cancel()
        self._addresses.clear()
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None

    # Idle ones ---------------------------------------------------------------------------------------------------

    def _take_idle(self, origin: Origin) -> Connection | None:
        idle = self._idle.get(origin)
        while idle:
            connection = idle.popitem()[0]
            if connection.silent():
                return connection
            connection.abort()
        return None

    def _now_idle(self, origin: Origin, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        self._idle.setdefault(origin, {})[connection] = loop.time()
        if self._sweep is None:
            self._sweep = loop.call_later(KEEP_IDLE, self._close_old)

    def _close_old(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() - KEEP_IDLE
        for connection in [each for idle in self._idle.values() for each, since in idle.items() if since <= until]:
            connection.abort()
        left = [since for idle in self._idle.values() for since in idle.values()]
        self._sweep = loop.call_later(min(left) - until, self._close_old) if left else None

    def _lost(self, origin: Origin, connection: Connection) -> None:
        self._open.discard(connection)
        self._idle.get(origin, {}).pop(connection, None)

    def _make_room(self) -> None:
        while len(self._open) >= self._most:
            spare = next((each for each in self._open if each.draining), None)
            spare = spare or next((each for idle in self._idle.values() for each in idle), None)
            if spare is None:
                return
            spare.abort()

    # New ones ----------------------------------------------------------------------------------------------------

    async def _connect(self, origin: Origin) -> Connection:
        self._make_room()
        try:
            async with asyncio.timeout(self._connect_timeout):
                connection = await self._open_socket(origin)
        except TimeoutError:
            seconds = f"{self._connect_timeout:g} s"
            raise BrokenError(f"no connection to {origin.host}:{origin.port} within {seconds}") from None
        self._open.add(connection)
        return connection

    async def _open_socket(self, origin: Origin) -> Connection:
        loop = asyncio.get_running_loop()
        sock = await aiohappyeyeballs.start_connection(
            await self._found(origin), happy_eyeballs_delay=NEXT_ADDRESS, interleave=1
        )
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            trust = _trust() if origin.tls else None
        except BaseException:
            sock.close()
            raise
        connection = Connection(lambda each: self._now_idle(origin, each), lambda each: self._lost(origin, each))
        try:  # the socket is the loop's from here on, which closes it: its number may be another one's by now
            await loop.create_connection(
                lambda: connection,
                sock=sock,
                ssl=trust,
                server_hostname=origin.host if origin.tls else None,
                ssl_handshake_timeout=self._connect_timeout if origin.tls else None,
            )
        except BaseException:
            connection.wanted = False  # asyncio forgets to close one whose handshake has not begun
            raise
        return connection

    async def _found(self, origin: Origin) -> list[Any]:
        """The addresses of a name; one look-up at a time, however many wait for it."""
        loop = asyncio.get_running_loop()
        until, task = self._addresses.get(origin, (0.0, None))
        if task is None or until < loop.time() or (task.done() and (task.cancelled() or task.exception())):
            task = asyncio.ensure_future(look_up(origin))
            self._addresses[origin] = loop.time() + KEEP_ADDRESSES, task
        return await asyncio.shield(task)


async def look_up(origin: Origin) -> list[Any]:
    """The addresses of a name, as `getaddrinfo` gives them."""
    loop = asyncio.get_running_loop()
    return await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)


@cache
def _trust() -> ssl.SSLContext:
    """The system's certificates, or those of SSL_CERT_FILE; read once, since that takes 20 ms."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
