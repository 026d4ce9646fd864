"""One upstream: makes the request with the openai package, reads the body itself. The only module that imports
openai.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
import httpx2
import openai
from openai import AsyncOpenAI, AsyncStream

from millstream.job import Spec

from .config import UpstreamSettings
from .counts import counts
from .failures import UpstreamFailure, from_error, from_status
from .stream import Stream
from .transport import RawBodyTransport, body_of
from .waits import retry_after

DRAIN: Final = 1.0
"""Seconds to wait for the end of a finished body, so that its connection can be used again."""


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
        self._draining: set[asyncio.Task[None]] = set()

    def request(self, spec: Spec) -> dict[str, Any]:
        """The body of a request for this spec."""
        usage = {"stream_options": {"include_usage": True}} if self.settings.stream_options else {}
        model = self.settings.model(spec.model)
        return {**spec.params, "model": model, "messages": spec.messages, "stream": True, **usage}

    async def close(self) -> None:
        """Close every connection."""
        for task in self._draining:
            task.cancel()
        await self._client.close()

    @asynccontextmanager
    async def ask(self, body: Mapping[str, Any]) -> AsyncIterator[Stream]:
        """Send a request (see `request`) and give the stream of its answer. Leaving early closes the connection.

        Raises UpstreamFailure.
        """
        try:
            answer = await self._client.post(
                "/chat/completions", body=body, cast_to=object, stream=True, stream_cls=AsyncStream[object]
            )
        except openai.APIStatusError as error:
            raise self._redacted(_from_response(error.response, error.body)) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise self._redacted(UpstreamFailure("upstream_unreachable", str(cause)[:300])) from None
        response = body_of(answer.response)
        stream = Stream(response)
        try:
            await _check_kind(response)
            yield stream
        except UpstreamFailure as failure:
            raise self._redacted(failure) from None
        finally:
            if stream.done:
                self._drain(response)
            else:
                response.close()

    def _drain(self, response: aiohttp.ClientResponse) -> None:
        task = asyncio.create_task(_read_to_end(response))
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    def _redacted(self, failure: UpstreamFailure) -> UpstreamFailure:
        """The failure without the key, should the upstream have echoed it."""
        if len(self._key) >= 8 and self._key in failure.message:
            failure.message = failure.message.replace(self._key, "***")
            failure.args = (f"{failure.code}: {failure.message}",)
        return failure


async def _check_kind(body: aiohttp.ClientResponse) -> None:
    """A 200 may still be an error page. Raises UpstreamFailure unless it is an event stream, uncompressed."""
    encoding = body.headers.get("content-encoding", "identity").lower()
    if encoding not in ("", "identity"):
        raise UpstreamFailure("malformed_stream", f"the upstream sent {encoding[:20]!r} although none was asked for")
    kind = body.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "text/event-stream":
        return
    try:
        start = await asyncio.wait_for(body.content.read(64 * 1024), timeout=5)
    except (aiohttp.ClientError, OSError, TimeoutError):
        start = b""
    try:
        found = json.loads(start)
    except ValueError:
        found = None
    if isinstance(found, dict) and found.get("error"):
        raise from_error(found["error"])
    raise UpstreamFailure("malformed_stream", f"found {kind[:60] or 'no content type'!r}, expected an event stream")


async def _read_to_end(body: aiohttp.ClientResponse) -> None:
    try:
        async with asyncio.timeout(DRAIN):
            while await body.content.readany():
                pass
            body.release()
    except (aiohttp.ClientError, OSError, TimeoutError):
        pass
    finally:
        body.close()  # nothing to do when it was released


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
