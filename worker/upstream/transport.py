"""The openai SDK's requests over our own connections, with the response's body left to be read as raw bytes.

httpx2's own transport reads a body through four layers, each a coroutine: 40 us a packet, against 10 here. This one
hands the response through (`body_of`), reads error bodies up to a limit, follows no redirect, asks for no compression
and heeds no proxy.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

import httpx2

from .pool import Origin, Pool
from .response import BrokenError, MalformedError, Response

MAX_ERROR_BODY: Final = 64 * 1024
ERROR_PATIENCE: Final = 5.0
"""Seconds an error's body may take; its status says enough."""

_EXTENSION: Final = "millstream_response"
_FIRST_ERROR_STATUS: Final = 300
_FORBIDDEN: Final = re.compile(rb"[\r\n\0]")


class RawBodyTransport(httpx2.AsyncBaseTransport):
    """Sends httpx2 requests over the connections of one pool."""

    def __init__(self, connections: int, connect_timeout: float, without: Collection[str] = ()) -> None:
        """`without`: names, in lower case, of headers of the SDK that are not sent."""
        self._pool = Pool(connections, connect_timeout)
        self._without = frozenset({"accept-encoding", *without})

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request; the caller closes the response."""
        head = self._head(request)
        body = await request.aread()
        try:
            response = await self._pool.ask(_origin(request.url), head + body)
        except MalformedError as error:
            raise httpx2.RemoteProtocolError(str(error)) from None
        except (BrokenError, OSError) as error:
            said = str(error) if isinstance(error, BrokenError) else f"{type(error).__name__}: {error}"
            raise httpx2.ConnectError(said) from error
        content = await _read_error(response) if response.status >= _FIRST_ERROR_STATUS else None
        return httpx2.Response(
            response.status,
            headers=[each for each in response.headers if each[0].lower() != b"content-encoding" or not content],
            content=content,
            request=request,
            extensions={_EXTENSION: response},
        )

    def _head(self, request: httpx2.Request) -> bytes:
        lines = [b"%s %s HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)]
        for name, value in (*request.headers.raw, (b"Accept-Encoding", b"identity")):
            if name.lower().decode("latin-1") in self._without and value != b"identity":
                continue
            if _FORBIDDEN.search(name) or _FORBIDDEN.search(value):
                raise httpx2.LocalProtocolError(f"the header {name!r} holds a line break; look at the settings")
            lines.append(b"%s: %s" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    async def aclose(self) -> None:
        """Close every connection."""
        self._pool.close()


def _origin(url: httpx2.URL) -> Origin:
    if url.scheme not in ("http", "https"):
        raise httpx2.UnsupportedProtocol(f"found {url.scheme!r}, expected http or https")
    tls = url.scheme == "https"
    return Origin(tls, url.raw_host.decode("ascii"), url.port or (443 if tls else 80))


async def _read_error(response: Response) -> bytes:
    try:
        return await response.read(MAX_ERROR_BODY, ERROR_PATIENCE) or b" "
    finally:
        response.close()


def body_of(response: httpx2.Response) -> Response:
    """Our response behind a response of this transport."""
    found = response.extensions[_EXTENSION]
    assert isinstance(found, Response)
    return found
