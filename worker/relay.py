"""One job's way from the upstream into the log: claim held, stream read, events written, an end that is true.

    started ─> chunks ... ─> completed | incomplete
       ^          │
       │          └ the stream breaks: nothing shown yet ─> asked again in silence (retries.py)
       └────────────────────────────── shown already ─────> a new attempt, or failed, as `on_break` says

A stop (cancelled elsewhere, fenced, handed over) and a clock both end the reading by cancelling this task; which of
them it was stands in `_stopped` and in the clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog

from millstream import calls
from millstream.calls import Claim, Ending
from millstream.errors import RedisUnavailable, SpecError
from millstream.events import compact
from millstream.job import Spec
from millstream.keys import Keys
from millstream.settings import Settings

from .clocks import Clock, Ticker
from .outbox import Outbox
from .retries import ANNOUNCED, persist
from .upstream import Answer, Piece, Upstream, UpstreamFailure, Verdict
from .upstream.chunks import Part
from .writer import Run, Writer

log = structlog.get_logger()

AWAY = 0.5
"""Seconds between tries of a claim while Redis is away."""

USAGE_EVERY = 1.0
"""Seconds between running usage estimates in the state: what a cancelled job is billed by."""


@dataclass(frozen=True, slots=True)
class Services:
    """What every relay of a process shares."""

    run: Run
    keys: Keys
    settings: Settings
    writer: Writer
    ticker: Ticker
    upstream: Upstream
    worker: str


class Relay:
    """One claimed job."""

    def __init__(self, services: Services, job_id: str, spec: Spec | SpecError, token: str, claim: Claim) -> None:
        self.job_id = job_id
        self._services = services
        self._refusal = spec if isinstance(spec, SpecError) else None
        self._spec = spec if isinstance(spec, Spec) else Spec(model="", messages=[])
        self._claim = claim
        self._outbox = Outbox(job_id, services.keys.written(job_id), token, claim.attempt, claim.seq, self._interrupt)
        self._prompt_bytes = len(msgspec.json.encode(self._spec.messages))
        self._stopped: str | None = None
        self._task: asyncio.Task[Any] | None = None
        self._usage_at = 0.0
        self._log = log.bind(job=job_id)

    async def run(self) -> str:
        """Stream the job to its end. The status it ended with, or why this worker let go of it."""
        self._task = asyncio.current_task()
        self._services.writer.add(self._outbox)
        try:
            status = await self._stream()
        except asyncio.CancelledError:
            if self._stopped is None or self._task is None:
                raise
            self._task.uncancel()
            status = await self._after_stop(self._stopped)
        finally:
            self._services.writer.remove(self._outbox)
        self._log.info("job.ended", status=status, attempt=self._outbox.attempt, events=self._outbox.seq)
        return status

    def hand_over(self) -> None:
        """Stop, and give the job back at once so that another worker takes it; not when only its end is unwritten."""
        if not self._outbox.finishing:
            self._interrupt("released")

    def look(self) -> None:
        """Ask now, not with the next heartbeat, whether the job is still ours."""
        if self._stopped is None and not self._outbox.ended:
            self._services.writer.notify(self._outbox)

    def _interrupt(self, code: str) -> None:
        if self._stopped is None and not self._outbox.ended:
            self._stopped = code
            if self._task is not None:
                self._task.cancel()

    async def _after_stop(self, code: str) -> str:
        if code == "log_lost":
            self._services.writer.notify(self._outbox)
            await self._outbox.settled()  # the `failed` event that says so
            return "failed"
        if code == "released":
            self._outbox.abandon()  # not only the chunks: an end without them would be a lie
            release = calls.release(
                self._services.keys, self.job_id, self._outbox.holder, lease=self._services.settings.lease
            )
            return str(await self._services.run(release))
        return code

    async def _stream(self) -> str:
        if self._refusal is not None:  # somebody else wrote it: a producer's library checks before it sends
            return await self._fail(UpstreamFailure("invalid_spec", str(self._refusal), retryable=False))
        while True:
            self._announce_start()
            try:
                verdict = await persist(
                    self._request,
                    retries=self._services.settings.retries,
                    may_retry=lambda failure: failure.retryable and not self._outbox.shown,
                    announce=self._announce_retry,
                )
            except UpstreamFailure as failure:
                self._log.warning("upstream.failed", code=failure.code, status=failure.status, shown=self._outbox.shown)
                if not self._may_restart(failure):
                    return await self._fail(failure)
                if (stopped := await self._restart()) is not None:
                    return stopped
            else:
                return await self._end(verdict)

    # One request -------------------------------------------------------------------------------------------------

    async def _request(self) -> Verdict:
        settings, task = self._services.settings, self._task
        assert task is not None
        clock = Clock(
            settings.first_token_timeout,
            settings.idle_timeout,
            self._spec.timeout or settings.total_timeout,
            task.cancel,
        )
        self._services.ticker.add(clock)
        try:
            return await self._read(clock)
        except UpstreamFailure:
            self._outbox.drop_chunks()  # unseen ones: the next request brings them again
            raise
        except asyncio.CancelledError:
            if clock.struck is None or self._stopped is not None:
                raise
            task.uncancel()
            self._outbox.drop_chunks()
            raise _out_of_time(clock.struck) from None
        finally:
            self._services.ticker.remove(clock)

    async def _read(self, clock: Clock) -> Verdict:
        answer = Answer(choices=self._spec.params.get("n") or 1, prompt_bytes=self._prompt_bytes)

        def take(parts: Sequence[Part]) -> bool:
            if parts:
                self._pass_on(answer, clock, parts)
            return not self._outbox.full

        async def room() -> None:
            clock.pause()
            await self._outbox.room()
            clock.resume()

        async with self._services.upstream.ask(self._spec) as stream:
            await stream.play(take, room)
        return answer.verdict(done=stream.done)

    def _pass_on(self, answer: Answer, clock: Clock, parts: Sequence[Part]) -> None:
        content = False
        for part in parts:
            if isinstance(part, Piece):
                answer.pieces += 1
                content = True
                if part.delta is None:
                    self._outbox.text(part.index, part.text)
                else:
                    self._outbox.event(compact("chunk", index=part.index, n=1, delta=part.delta))
            else:
                answer.take(part)
        if content:
            now = clock.content()
            if now - self._usage_at >= USAGE_EVERY:
                self._usage_at = now
                self._outbox.usage = msgspec.json.encode(answer.usage)
            self._services.writer.notify(self._outbox)

    # Attempts ----------------------------------------------------------------------------------------------------

    def _announce_start(self) -> None:
        event = compact(
            "started",
            worker=self._services.worker,
            model=self._spec.model,
            upstream=self._services.upstream.name,
            reason=self._claim.reason if self._claim.attempt > 1 else None,
        )
        self._put(event)
        self._log.info("job.started", attempt=self._claim.attempt, model=self._spec.model, reason=self._claim.reason)

    def _announce_retry(self, failure: UpstreamFailure, delay: float) -> None:
        self._log.info("upstream.retry", code=failure.code, status=failure.status, delay=round(delay, 3))
        if delay > ANNOUNCED:
            self._put(compact("retrying", error=failure.error, delay=round(delay, 3)))

    def _may_restart(self, failure: UpstreamFailure) -> bool:
        return failure.retryable and self._outbox.shown and self._spec.on_break != "fail" and not self._exhausted

    @property
    def _exhausted(self) -> bool:
        return self._claim.broken + 1 >= self._claim.max_attempts

    async def _restart(self) -> str | None:
        """Begin a further attempt; what was shown is void. Returns why not, if the job is no longer ours."""
        services, outbox = self._services, self._outbox
        await outbox.settled()  # no event of the old attempt may follow the claim,
        services.writer.remove(outbox)
        await outbox.settled()  # nor a heartbeat: it would be answered `fenced`
        claim = await self._claim_next()
        if claim.outcome != "claimed":
            return claim.outcome
        self._claim = claim
        outbox.begin(claim.attempt, claim.seq)
        services.writer.add(outbox)
        return None

    async def _claim_next(self) -> Claim:
        """Ask until Redis answers; the script allows that, and a job let go of here would lose one more attempt."""
        services, outbox = self._services, self._outbox
        wanted = calls.claim(services.keys, self.job_id, outbox.token, services.settings.lease, outbox.attempt + 1)
        while True:
            try:
                claim: Claim = await services.run(wanted)
            except RedisUnavailable as error:
                self._log.warning("job.restart_waits", reason=str(error))
                await asyncio.sleep(AWAY)
            else:
                return claim

    # Endings -----------------------------------------------------------------------------------------------------

    async def _end(self, verdict: Verdict) -> str:
        usage = msgspec.json.encode(verdict.usage)
        event = compact(verdict.status, finish_reasons=verdict.finish_reasons, usage=verdict.usage)
        return await self._finish(event, Ending(verdict.status, msgspec.json.encode(verdict.finish_reasons)), usage)

    async def _fail(self, failure: UpstreamFailure) -> str:
        error = failure.error
        if failure.retryable and self._outbox.shown and self._exhausted and self._claim.max_attempts > 1:
            last = f"{failure.code}: {failure.message}"
            tried = f"{self._claim.max_attempts} attempts broke or were lost; the last one: {last}"
            error = {**error, "code": "attempts_exhausted", "message": tried}
        event = compact("failed", finish_reasons={}, error=error)
        return await self._finish(event, Ending("failed", b"{}", msgspec.json.encode(error)), b"")

    async def _finish(self, event: bytes, ending: Ending, usage: bytes) -> str:
        self._outbox.usage = usage or self._outbox.usage
        self._outbox.finish(event, ending)
        self._services.writer.notify(self._outbox)
        await self._outbox.settled()
        return ending.status

    def _put(self, event: bytes) -> None:
        self._outbox.event(event)
        self._services.writer.notify(self._outbox)


def _out_of_time(code: str) -> UpstreamFailure:
    words = {
        "first_token_timeout": "no content came in time; MILLSTREAM_FIRST_TOKEN_TIMEOUT sets the time",
        "idle_timeout": "the stream stalled; MILLSTREAM_IDLE_TIMEOUT sets the time",
        "total_timeout": "the answer took too long; the job's timeout or MILLSTREAM_TOTAL_TIMEOUT sets the time",
    }
    return UpstreamFailure(code, words[code], retryable=code != "total_timeout")
