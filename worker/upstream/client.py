"""One upstream: makes the request with the openai package, reads the body itself. The only module that imports
openai.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx2
import openai
from openai import AsyncOpenAI, AsyncStream

from millstream.job import Spec

from .config import UpstreamSettings
from .counts import Counts, counts
from .failures import UpstreamFailure, from_status, plain
from .response import BrokenError, Response
from .sse import MAX_EVENT, begins_like_events
from .stream import BROKE, Stream
from .transport import RawBodyTransport, body_of
from .waits import retry_after
from .whole import Whole

_BOM: Final = b"\xef\xbb\xbf"
_NOTHING_YET: Final = _BOM + b"\r\n\t "


class Upstream:
    """An OpenAI-compatible API. Its key never leaves this object."""

    def __init__(self, settings: UpstreamSettings, *, connections: int, connect_timeout: float) -> None:
        self.settings = settings
        self.name = settings.name
        self._key = settings.api_key or ""
        self._client = AsyncOpenAI(
            base_url=settings.base_url,
            api_key=settings.api_key or "none",
            max_retries=0,  # retries have one owner: worker/retries.py
            timeout=httpx2.Timeout(None),  # clocks are the loop's: worker/clocks.py
            default_headers=_headers(settings),
            default_query=dict(settings.query),
            http_client=httpx2.AsyncClient(
                transport=RawBodyTransport(connections, connect_timeout, _unwanted(settings)),
                follow_redirects=False,
                trust_env=False,
            ),
        )

    def request(self, spec: Spec) -> dict[str, Any]:
        """The body of a request for this spec."""
        usage = {"stream_options": {"include_usage": True}} if self.settings.stream_options else {}
        model = self.settings.model(spec.model)
        return {**spec.params, "model": model, "messages": spec.messages, "stream": True, **usage}

    async def close(self) -> None:
        """Close every connection."""
        await self._client.close()

    @asynccontextmanager
    async def ask(
        self, body: Mapping[str, Any], heard: Callable[[Counts], None] | None = None
    ) -> AsyncIterator[Stream | Whole]:
        """Send a request (see `request`) and give the stream of its answer. Leaving early closes the connection.

        `heard` is told what the headers say of the upstream's limits. Raises UpstreamFailure.
        """
        try:
            answer = await self._client.post(
                "/chat/completions", body=body, cast_to=object, stream=True, stream_cls=AsyncStream[object]
            )
        except openai.APIStatusError as error:
            raise _from_response(error.response, error.body) from None
        except openai.APIConnectionError as error:
            raise _without_response(error.__cause__ or error) from None
        response = body_of(answer.response)
        if heard is not None:
            heard(counts(answer.response.headers))
        stream: Stream | Whole | None = None
        try:
            stream = await _opened(response)
            yield stream
        finally:
            if stream is not None and stream.done:
                response.finish()
            else:
                response.close()

    def redact(self, failure: UpstreamFailure) -> None:
        """Take the key out of a failure, should the upstream have echoed it."""
        failure.without(self._key)


def _without_response(cause: BaseException) -> UpstreamFailure:
    if isinstance(cause, httpx2.RemoteProtocolError):
        return UpstreamFailure("malformed_response", f"what came is no HTTP response: {cause}")
    return UpstreamFailure("upstream_unreachable", " ".join(str(cause).split())[:300])


async def _opened(body: Response) -> Stream | Whole:
    """What a 2xx brings, which its content type need not say. Raises UpstreamFailure for what is no answer."""
    encoding = body.header(b"content-encoding").lower()
    if encoding not in ("", "identity"):
        raise UpstreamFailure("malformed_stream", f"the upstream sent {encoding[:20]!r} although none was asked for")
    kind = body.header(b"content-type").partition(";")[0].strip().lower()
    start = bytearray()
    while not start.strip(_NOTHING_YET) and len(start) < MAX_EVENT and (packet := await _read(body)):
        start += packet
    begin = bytes(start).removeprefix(_BOM).lstrip()[:1]
    if begin not in (b"{", b"[") and (kind == "text/event-stream" or begins_like_events(bytes(start))):
        return Stream(body, bytes(start))
    if begin in (b"{", b"["):
        while packet := await _read(body):
            start += packet
            if len(start) > MAX_EVENT:
                raise UpstreamFailure("event_too_large", "a JSON answer exceeds 4 MB", retryable=False)
        return Whole(bytes(start).removeprefix(_BOM))
    words = plain(start[:1024].decode("utf-8", "replace"))
    found = f"found {kind[:60] or 'no content type'!r}, expected an event stream"
    raise UpstreamFailure("malformed_stream", f"{found}; it says: {words}" if words else found)


async def _read(body: Response) -> bytes:
    """The next packet, empty at the end; the job's clocks bound the time. Raises UpstreamFailure."""
    try:
        return await body.next()
    except BrokenError:
        raise UpstreamFailure("stream_broken", BROKE) from None


def _from_response(response: httpx2.Response, body: Any) -> UpstreamFailure:
    failure = from_status(response.status_code, body, retry_after(response.headers))
    failure.counts = counts(response.headers)
    return failure


def _headers(settings: UpstreamSettings) -> dict[str, str]:
    """What is added to the SDK's own headers."""
    by_header = settings.auth == "api-key" and settings.api_key is not None
    return {**settings.headers, **({"api-key": settings.api_key or ""} if by_header else {})}


def _unwanted(settings: UpstreamSettings) -> set[str]:
    """What the SDK would send and this upstream must not get."""
    unwanted = set()
    if settings.api_key is None or settings.auth == "api-key":
        unwanted.add("authorization")
    if settings.foreign:  # the SDK takes these from variables that are about OpenAI
        given = {name.lower() for name in settings.headers}
        unwanted |= {"openai-organization", "openai-project"} - given
    return unwanted
