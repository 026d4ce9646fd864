"""What a user needs to test their own code against Millstream: no worker, no model, no waiting.

    from millstream.testing import ScriptedChannel, fake_client

    def test_my_page_shows_a_restart():
        client = fake_client()                      # needs fakeredis[lua]; or a Client on a real Redis
        channel = ScriptedChannel(client)
        job = client.submit("Hello")
        channel.start(job.id)
        channel.chunk(job.id, "Hel")
        channel.restart(job.id, reason="worker_lost")
        channel.chunk(job.id, "Hello")
        channel.complete(job.id)
        assert my_page(client, job.id) == "Hello"

`ScriptedChannel` plays the worker's part by hand, through the very scripts a worker uses, so what a consumer sees is
what it would see in production. `ManualClock` stands still until it is told to go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from . import calls
from .async_client import AsyncClient
from .calls import Ending, Frame
from .client import Client
from .errors import MillstreamError
from .events import compact, compact_text
from .settings import Settings


class ManualClock:
    """A clock for `Client(clock=...)`: seconds that pass only by `advance`."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def _fakeredis() -> Any:
    """The package, which those want who test, not those who run. Raises MillstreamError where it is missing."""
    try:
        import fakeredis
    except ImportError:
        raise MillstreamError(
            "millstream.testing needs fakeredis with Lua: pip install 'millstream[testing]'"
        ) from None
    return fakeredis


def fake_client(settings: Settings | None = None, *, server: Any = None, **options: Any) -> Client:
    """A client on an in-process fake of Redis. Needs `fakeredis[lua]`.

    Each has its own data, unless they share a `server`: a `fakeredis.FakeServer(version=(7,))`.
    """
    fakeredis = _fakeredis()
    connection = fakeredis.FakeRedis(server=server or fakeredis.FakeServer(version=(7,)))
    return Client(settings=settings, connection=connection, script_header=False, **options)


def fake_async_client(settings: Settings | None = None, *, server: Any = None, **options: Any) -> AsyncClient:
    """As `fake_client`, for asyncio."""
    fakeredis = _fakeredis()
    connection = fakeredis.FakeAsyncRedis(server=server or fakeredis.FakeServer(version=(7,)))
    return AsyncClient(settings=settings, connection=connection, script_header=False, **options)


@dataclass(slots=True)
class _Held:
    token: str
    attempt: int
    seq: int


class ScriptedChannel:
    """The worker's part, played step by step. Each method writes one event, or says why Redis refused it."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._held: dict[str, _Held] = {}

    def start(
        self, job_id: str, *, token: str = "scripted", worker: str = "scripted", reason: str | None = None
    ) -> int:
        """Claim the job and write `started`; returns the attempt's number."""
        claim = self._client.run(calls.claim(self._client.keys, job_id, token, self._client.settings.lease))
        return self._begin(job_id, token, claim, worker, reason)

    def restart(self, job_id: str, *, reason: str = "stream_broken") -> int:
        """Begin a further attempt, as after a stream broke: earlier text is void."""
        held = self._held[job_id]
        lease = self._client.settings.lease
        claim = self._client.run(calls.claim(self._client.keys, job_id, held.token, lease, held.attempt + 1))
        return self._begin(job_id, held.token, claim, "scripted", reason)

    def _begin(self, job_id: str, token: str, claim: calls.Claim, worker: str, reason: str | None) -> int:
        if claim.outcome != "claimed":
            raise MillstreamError(f"job {job_id!r} cannot be started: {claim.outcome} {claim.status}".rstrip())
        self._held[job_id] = _Held(token, claim.attempt, claim.seq)
        why = (reason or claim.reason) if claim.attempt > 1 else None
        names = {"worker": worker, "model": "scripted", "upstream": "scripted"}
        self.write(job_id, compact("started", **names, reason=why, mark=f"{token}:{claim.attempt}"))
        return claim.attempt

    def chunk(self, job_id: str, content: str, *, index: int = 0, n: int = 1) -> None:
        """A piece of text."""
        self.write(job_id, compact_text(content, index, n))

    def delta(self, job_id: str, *, index: int = 0, **delta: Any) -> None:
        """A piece of anything: `reasoning`, `refusal` or `tool_calls`."""
        self.write(job_id, compact("chunk", index=index, n=1, delta=delta))

    def retrying(self, job_id: str, *, code: str = "rate_limited", delay: float = 2.0) -> None:
        """The worker waits."""
        self.write(job_id, compact("retrying", error={"code": code, "message": "scripted"}, delay=delay))

    def complete(self, job_id: str, *, finish_reasons: dict[int, str] | None = None, **usage: int) -> None:
        """The answer is whole."""
        self._end(job_id, "completed", finish_reasons or {0: "stop"}, usage=usage or None)

    def stop_short(self, job_id: str, reason: str = "length") -> None:
        """The upstream stopped early: `incomplete`."""
        self._end(job_id, "incomplete", {0: reason})

    def fail(self, job_id: str, code: str = "upstream_error", message: str = "scripted") -> None:
        """The job fails."""
        self._end(job_id, "failed", {}, error={"code": code, "message": message})

    def _end(self, job_id: str, status: str, reasons: dict[int, str], **fields: Any) -> None:
        encode = msgspec.json.encode
        error = fields.get("error")
        ending = Ending(status, encode(reasons), encode(error) if error else b"")
        usage = encode(fields["usage"]) if fields.get("usage") else b""
        self.write(job_id, compact(status, finish_reasons=reasons, **fields), ending=ending, usage=usage)

    def write(self, job_id: str, *events: bytes, ending: Ending | None = None, usage: bytes = b"") -> None:
        """Write events in compact form, in one pack."""
        held = self._held[job_id]
        keys = self._client.keys
        frame = Frame(
            job_id, keys.written(job_id), calls.holder(held.token, held.attempt), held.seq + 1, events, usage, ending
        )
        call = calls.append(keys, self._client.settings.lease, [frame])
        code, seq, message = self._client.run(call)[0]
        if code != "ok":
            raise MillstreamError(f"job {job_id!r}: the event was refused: {code} {message}".rstrip())
        held.seq = seq
