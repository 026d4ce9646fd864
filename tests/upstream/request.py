"""What a client asked: an incremental HTTP/1.1 request parser, and the request as a script's callable sees it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

_HEAD_CAP = 65536


class NotHttpError(ValueError):
    """These bytes are not HTTP/1.1 as this server reads it; the message says what was found."""


@dataclass(frozen=True)
class Request:
    """One request. Header names are lower case; `arrived_at` (time.monotonic) is when its last byte was here."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    arrived_at: float = field(default_factory=time.monotonic)

    @cached_property
    def json(self) -> Any:
        """The body's JSON; None if it is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    def _field(self, name: str) -> Any:
        return self.json.get(name) if isinstance(self.json, dict) else None

    @property
    def model(self) -> str:
        """The model asked for, "" if none."""
        model = self._field("model")
        return model if isinstance(model, str) else ""

    @property
    def prompt(self) -> str:
        """The text of the last user message, its text parts joined; "" if there is none."""
        messages = self._field("messages")
        for message in reversed(messages if isinstance(messages, list) else []):
            if isinstance(message, dict) and message.get("role") == "user":
                content = message.get("content")
                if isinstance(content, list):
                    parts = [part.get("text") for part in content if isinstance(part, dict)]
                    return "".join(part for part in parts if isinstance(part, str))
                return content if isinstance(content, str) else ""
        return ""

    @property
    def stream(self) -> bool:
        """Whether chunks were asked for rather than one completion."""
        return self._field("stream") is True

    @property
    def include_usage(self) -> bool:
        """Whether `stream_options` asks for the usage chunk."""
        options = self._field("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    @property
    def choices(self) -> int:
        """The `n` asked for, 1 if none."""
        n = self._field("n")
        return n if isinstance(n, int) else 1

    @property
    def says_close(self) -> bool:
        """Whether the client wants the connection closed after the answer."""
        return self.headers.get("connection", "").lower() == "close"

    @property
    def key(self) -> str:
        """The API key sent, as bearer token or as Azure's `api-key`; "" if none."""
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token if scheme.lower() == "bearer" else self.headers.get("api-key", "")


class RequestParser:
    """Bytes in, requests out; bodies by content-length or chunked, pipelining included."""

    def __init__(self) -> None:
        """A parser at the start of a connection."""
        self._buffer = bytearray()
        self._head: tuple[str, str, dict[str, str]] | None = None
        self._body = bytearray()

    def feed(self, data: bytes) -> list[Request]:
        """The requests these bytes complete. Raises NotHttpError, after which the connection is of no more use."""
        self._buffer += data
        complete = []
        while (request := self._next()) is not None:
            complete.append(request)
        return complete

    def _next(self) -> Request | None:
        if self._head is None:
            self._head = self._take_head()
            if self._head is None:
                return None
        method, path, headers = self._head
        chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        body = self._take_chunked() if chunked else self._take_length(headers.get("content-length", "0"))
        if body is None:
            return None
        self._head = None
        return Request(method, path, headers, body)

    def _take_head(self) -> tuple[str, str, dict[str, str]] | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _HEAD_CAP:
                raise NotHttpError(f"no end of the request head within {_HEAD_CAP} bytes")
            return None
        first, *lines = self._take(end, 4).decode("latin-1").split("\r\n")
        words = first.split(" ")
        if len(words) != 3 or words[2] != "HTTP/1.1":
            raise NotHttpError(f"not an HTTP/1.1 request line: {first[:80]!r}")
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon:
                raise NotHttpError(f"not a header: {line[:80]!r}")
            name, value = name.strip().lower(), value.strip()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        return words[0], words[1], headers

    def _take_length(self, said: str) -> bytes | None:
        if not said.isdecimal():
            raise NotHttpError(f"not a content-length: {said[:80]!r}")
        return self._take(int(said), 0) if len(self._buffer) >= int(said) else None

    def _take_chunked(self) -> bytes | None:
        while (line_end := self._buffer.find(b"\r\n")) >= 0:
            try:
                size = int(self._buffer[:line_end].partition(b";")[0], 16)
            except ValueError:
                raise NotHttpError(f"not a chunk size: {bytes(self._buffer[:line_end])[:80]!r}") from None
            if len(self._buffer) < line_end + 2 + size + 2:
                return None
            self._take(line_end, 2)
            self._body += self._take(size, 2)
            if size == 0:
                body, self._body = bytes(self._body), bytearray()
                return body
        return None

    def _take(self, size: int, delimiter: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[: size + delimiter]
        return taken
