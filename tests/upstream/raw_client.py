"""A client that believes nothing: it sends bytes, keeps every read as it came, and says how the connection ended."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import zlib
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

Ending = Literal["complete", "eof", "reset"]


@dataclass(frozen=True)
class Response:
    """What came. `body` has framing and compression taken off as far as they go; `reads` is the raw bytes per read.

    `ending` is "complete" if the framing said so while the connection was still open, else how the connection ended.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    reads: list[bytes]
    ending: Ending
    whole: bool

    @property
    def data(self) -> list[str]:
        """The data of the events, for streams that use LF and a space after the colon."""
        return [event[6:] for event in self.body.decode().split("\n\n") if event.startswith("data: ")]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The data that is not [DONE], parsed."""
        return [json.loads(data) for data in self.data if data != "[DONE]"]

    def text(self, index: int = 0) -> str:
        """The content of one choice."""
        choices = [choice for chunk in self.chunks for choice in chunk["choices"] if choice["index"] == index]
        return "".join(choice.get("delta", {}).get("content", "") for choice in choices)


@dataclass
class RawClient:
    """One connection to `port` of 127.0.0.1."""

    port: int
    _reads: list[bytes] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        """Connects."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves."""
        self.writer.close()

    def ask(self, prompt: str = "hi", *, model: str = "m", headers: str = "", **params: object) -> None:
        """Asks for a streamed completion; `params` go into the body."""
        messages = [{"role": "user", "content": prompt}]
        body = json.dumps({"model": model, "messages": messages, "stream": True, **params}).encode()
        self.send(body, headers=headers)

    def send(
        self, body: bytes = b"", *, method: str = "POST", path: str = "/v1/chat/completions", headers: str = ""
    ) -> None:
        """Sends any request; `headers` are whole lines, each with its CRLF."""
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)

    async def response(self) -> Response:
        """Reads one response, until its framing says it is over or the connection ends."""
        ending: Ending | None = None
        while ending is None:
            try:
                data = await self.reader.read(2**20)
            except ConnectionResetError:
                ending = "reset"
            else:
                self._reads.append(data)
                if not data:
                    ending = "eof"
                elif _decoded(b"".join(self._reads))[3]:
                    ending = "complete"
        reads, self._reads = [data for data in self._reads if data], []
        status, headers, body, whole = _decoded(b"".join(reads))
        if headers.get("content-encoding") == "gzip":
            body = zlib.decompressobj(wbits=31).decompress(body)
        return Response(status, headers, body, reads, ending, whole)

    async def until(self, needle: bytes) -> None:
        """Reads until this has come, within the response that `response` will return."""
        while needle not in b"".join(self._reads):
            data = await self.reader.read(2**20)
            assert data, f"the connection ended before {needle!r} came: {self._reads!r}"
            self._reads.append(data)

    def reset(self) -> None:
        """Leaves with a RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


def _decoded(raw: bytes) -> tuple[int, dict[str, str], bytes, bool]:
    head, blank, body = raw.partition(b"\r\n\r\n")
    if not blank:
        return 0, {}, b"", False
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    whole = False
    if headers.get("transfer-encoding") == "chunked":
        body, whole = _unchunked(body)
    elif "content-length" in headers:
        whole = len(body) == int(headers["content-length"])
    return int(first.split(" ")[1]), headers, body, whole


def _unchunked(raw: bytes) -> tuple[bytes, bool]:
    body = b""
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        length = int(size, 16) if size else 0
        if length == 0 or len(raw) < length + 2:
            return body + raw[:length], size == b"0" and raw == b"\r\n"
        body, raw = body + raw[:length], raw[length + 2 :]
    return body, False
