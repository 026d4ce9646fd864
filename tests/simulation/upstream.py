"""The upstream, in process: what each request is answered stands in its seed, and every piece says where it came from.

A piece of text is `JOB/REQUEST/NUMBER;`, so that a log tells which answers it was put together from.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from worker.breaker import Guard
from worker.choice import GuardedUpstream
from worker.upstream import Finish, Part, Piece, UpstreamFailure, UpstreamSettings, Usage

from .loop import ACTOR, Actor

Take = Callable[[Sequence[Part]], bool]


@dataclass
class Temper:
    """How likely an answer goes wrong, in each of its ways."""

    breaks: float = 0.0
    refuses: float = 0.0
    rejects: float = 0.0
    stalls: float = 0.0
    spares: float = 0.0  # 429 with a retry-after
    longest: int = 24
    pace: float = 0.15


@dataclass
class Request:
    """One request and what was sent in answer to it."""

    job_id: str
    number: int
    asker: Actor
    prefix: str
    pieces: int
    ending: str
    sent: int = 0
    open: bool = False
    refused: str = ""
    finished: bool = False
    begun_at: float = 0.0
    closed_at: float = 0.0

    def text(self, count: int) -> str:
        return "".join(f"{self.job_id}/{self.number}/{place};" for place in range(count))


@dataclass
class Model:
    """All upstreams' common memory."""

    seed: int
    temper: Temper
    note: Callable[..., None]
    requests: dict[str, list[Request]] = field(default_factory=dict)

    def of(self, job_id: str) -> list[Request]:
        return self.requests.setdefault(job_id, [])

    @property
    def all(self) -> Iterator[Request]:
        return itertools.chain.from_iterable(self.requests.values())

    def begin(self, body: Mapping[str, Any]) -> tuple[Request, random.Random]:
        job_id = body["messages"][0]["content"]
        last = body["messages"][-1]
        prefix = last["content"] if last["role"] == "assistant" else ""
        known = self.of(job_id)
        rng = random.Random(f"{self.seed} {job_id} {len(known)}")
        request = Request(job_id, len(known), ACTOR.get(), prefix, rng.randrange(self.temper.longest + 1), "stop")
        if rng.random() < 0.15:
            request.ending = "length"
        known.append(request)
        return request, rng


class ScriptedUpstream(GuardedUpstream):
    """Stands where the HTTP client stands; the rest of an upstream is the product's."""

    model: Model

    def __init__(self, settings: UpstreamSettings, *, connections: int, connect_timeout: float) -> None:
        self.settings = settings
        self.name = settings.name
        self._key = ""
        self.guard = Guard(asyncio.get_running_loop().time, enabled=settings.breaker)

    async def close(self) -> None:
        pass

    @asynccontextmanager
    async def ask(self, body: Mapping[str, Any]) -> AsyncIterator[Any]:
        request, rng = self.model.begin(body)
        temper, loop = self.model.temper, asyncio.get_running_loop()
        self.model.note(request.asker, "asks", request.job_id, f"request {request.number}")
        request.open, request.begun_at = True, loop.time()
        try:
            await asyncio.sleep(rng.random() * 0.3)
            self._refuse(request, temper, rng.random())
            yield Answering(request, rng, temper)
        finally:
            if request.open:  # else the asker was killed, and the kernel has closed it
                request.open, request.closed_at = False, loop.time()
                self.model.note(request.asker, "closed", request.job_id, f"request {request.number}: {request.sent}")

    @staticmethod
    def _refuse(request: Request, temper: Temper, chance: float) -> None:
        if chance < temper.refuses:
            request.refused = "http_503"
            raise UpstreamFailure("http_503", "busy", status=503)
        if (chance := chance - temper.refuses) < temper.spares:
            request.refused = "http_429"
            raise UpstreamFailure("http_429", "later", retry_after=0.5 + 40 * chance / temper.spares, status=429)
        if (chance := chance - temper.spares) < temper.rejects:
            request.refused = "invalid_request_error"
            raise UpstreamFailure("invalid_request_error", "no", retryable=False, status=400)


class Answering:
    """One answer on its way; what `worker.upstream.Stream` is to the attempt."""

    def __init__(self, request: Request, rng: random.Random, temper: Temper) -> None:
        self._request, self._rng, self._temper = request, rng, temper
        self.done = False

    async def play(self, take: Take, room: Callable[[], Any]) -> None:
        request, rng = self._request, self._rng
        fails_at = self._place(self._temper.breaks)
        stalls_at = self._place(self._temper.stalls)
        pace = 0.0 if rng.random() < 0.3 else rng.random() * self._temper.pace
        while request.sent < request.pieces:
            if request.sent == fails_at:
                raise UpstreamFailure("stream_broken", "the connection broke")
            if request.sent == stalls_at:
                await asyncio.sleep(3600)
            packet = [
                Piece(0, f"{request.job_id}/{request.number}/{request.sent + each};")
                for each in range(min(rng.choice((1, 1, 1, 2, 5)), request.pieces - request.sent))
            ]
            if fails_at is not None and fails_at > request.sent:
                packet = packet[: fails_at - request.sent]
            if stalls_at is not None and stalls_at > request.sent:
                packet = packet[: stalls_at - request.sent]
            request.sent += len(packet)
            if not take(packet):
                await room()
            if pace:
                await asyncio.sleep(pace * rng.random() * 2)
        if fails_at == request.pieces:
            return  # a clean end of a stream without a finish reason
        request.finished = True
        take([Finish(0, request.ending)])
        if stalls_at == request.pieces:
            await asyncio.sleep(3600)
        take([Usage({"prompt_tokens": 1, "completion_tokens": request.pieces, "total_tokens": request.pieces + 1})])
        self.done = True

    def _place(self, chance: float) -> int | None:
        hit = self._rng.random() < chance
        place = self._rng.randint(0, self._request.pieces)
        return place if hit else None
