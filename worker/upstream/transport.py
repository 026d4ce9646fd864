"""The openai SDK's requests, carried by aiohttp, with the response's body left to be read as raw bytes.

The SDK's own aiohttp transport wraps each read in httpx2's layers and caps itself at 100 connections; this one hands
the aiohttp response through (`body_of`), reads error bodies up to a limit, follows no redirect and asks for no
compression.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any, Final

import aiohttp
import httpx2

MAX_ERROR_BODY: Final = 64 * 1024
ERROR_PATIENCE: Final = 5.0
"""Seconds an error's body may take."""

_EXTENSION: Final = "aiohttp_response"
_FIRST_ERROR_STATUS: Final = 300


class _Idle(asyncio.Protocol):
    """Minds a connection that nobody uses. Whatever comes then answers no request of ours: it must not answer the next.

    (Seen with a server that answered twice: another job's answer began with the second one.)
    """

    def __init__(self, transport: asyncio.Transport, inner: asyncio.Protocol) -> None:
        self._transport, self._inner = transport, inner

    def data_received(self, _data: bytes) -> None:
        self._transport.abort()

    def eof_received(self) -> None:
        self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._inner.connection_lost(error)


class _Connector(aiohttp.TCPConnector):
    """Connections that are thrown away when anything comes on them between two requests."""

    def _release(self, key: Any, protocol: Any, *, should_close: bool = False) -> None:
        super()._release(key, protocol, should_close=should_close)
        transport = protocol.transport
        if transport is not None and not transport.is_closing():
            transport.set_protocol(_Idle(transport, protocol))

    async def _get(self, key: Any, traces: Any) -> Any:
        connection = await super()._get(key, traces)
        if connection is not None and connection.transport is not None and connection.protocol is not None:
            connection.transport.set_protocol(connection.protocol)
        return connection


class RawBodyTransport(httpx2.AsyncBaseTransport):
    """Sends httpx2 requests through one aiohttp session."""

    def __init__(self, connections: int, connect_timeout: float, without: Collection[str] = ()) -> None:
        """`without`: names, in lower case, of headers of the SDK that are not sent."""
        self._connections = connections
        self._connect_timeout = connect_timeout
        self._without = frozenset({"accept-encoding", *without})
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:  # a session belongs to the running loop
            self._session = aiohttp.ClientSession(
                connector=_Connector(limit=self._connections, keepalive_timeout=15),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout),
                auto_decompress=False,
                raise_for_status=False,
            )
        return self._session

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request; the caller closes the response."""
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in self._without]
        try:
            response = await self._open().request(
                request.method,
                str(request.url),
                headers=[*headers, ("accept-encoding", "identity")],
                data=await request.aread(),
                allow_redirects=False,
            )
            body = await _read_error(response) if response.status >= _FIRST_ERROR_STATUS else None
        except aiohttp.ClientResponseError as error:
            what = error.message.partition("\n")[0].partition("b'")[0]  # without the bytes themselves
            raise httpx2.RemoteProtocolError(what.rstrip(" :")) from None
        except (aiohttp.ClientError, OSError) as error:
            raise httpx2.ConnectError(f"{type(error).__name__}: {error}") from error
        return httpx2.Response(
            response.status,
            headers=[
                (name, value) for name, value in response.raw_headers if name.lower() != b"content-encoding" or not body
            ],
            content=body,
            request=request,
            extensions={_EXTENSION: response},
        )

    async def aclose(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()


async def _read_error(response: aiohttp.ClientResponse) -> bytes:
    body = b""
    try:
        async with asyncio.timeout(ERROR_PATIENCE):
            while len(body) < MAX_ERROR_BODY and (data := await response.content.readany()):
                body += data
    except (aiohttp.ClientError, OSError, TimeoutError):
        pass  # the status says what it is; of the words there are those that came
    finally:
        response.close()
    return body[:MAX_ERROR_BODY] or b" "


def body_of(response: httpx2.Response) -> aiohttp.ClientResponse:
    """The aiohttp response behind a response of this transport."""
    found = response.extensions[_EXTENSION]
    assert isinstance(found, aiohttp.ClientResponse)
    return found
