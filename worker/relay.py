"""One job's way from the upstream into the log: claim held, stream read, events written, an end that is true.

    started ─> chunks ... ─> completed | incomplete
       ^          │
       │          ├ the stream breaks: nothing shown yet ─> asked again in silence (retries.py)
       │          ├ shown, the job says `continue` and the upstream can ─> resumed: it goes on from the text
       └──────────┴ shown already ─> a new attempt, or failed, as `on_break` says

A wait that is too long for memory gives the job back to the queue with its time. A stop (cancelled elsewhere, fenced,
handed over) and a clock both end the reading by cancelling this task; which of them it was stands in `_stopped` and in
the clock.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import structlog

from millstream import calls
from millstream.calls import Call, Claim, Ending
from millstream.errors import RedisUnavailable, SpecError
from millstream.events import compact
from millstream.job import Spec
from millstream.keys import Keys
from millstream.settings import Settings

from .attempt import Attempt, Means
from .choice import Upstreams
from .clocks import Ticker
from .limiter import Grant, Limiter, TooLarge
from .outbox import Outbox
from .reservation import too_large
from .retries import HandBack, persist
from .turns import Turns
from .upstream import UpstreamFailure, Verdict
from .writer import Run, Writer

log = structlog.get_logger()

T = TypeVar("T")

AWAY = 0.5
"""Seconds between tries of a claim or a release while Redis is away."""


@dataclass(frozen=True, slots=True)
class Services:
    """What every relay of a process shares."""

    run: Run
    keys: Keys
    settings: Settings
    writer: Writer
    ticker: Ticker
    turns: Turns
    upstreams: Upstreams
    worker: str
    limiter: Limiter | None = None
    """None: nothing is limited."""


class Relay:
    """One claimed job."""

    def __init__(
        self, services: Services, job_id: str, spec: Spec | SpecError, token: str, claim: Claim,
        leave: Grant | TooLarge | None = None,
    ) -> None:  # fmt: skip
        self.job_id = job_id
        self._services = services
        self._refusal = _refusal(spec, leave)
        self._spec = spec if isinstance(spec, Spec) else Spec(model="", messages=[])
        self._claim = claim
        self._outbox = Outbox(job_id, services.keys.written(job_id), token, claim.attempt, claim.seq, self._interrupt)
        self._means = Means(
            services.settings, services.writer, services.ticker, services.turns, services.worker, services.limiter
        )
        self._attempt = self._begin(again=False, grant=leave if isinstance(leave, Grant) else None)
        self._stopped: str | None = None
        self._task: asyncio.Task[Any] | None = None
        self._log = log.bind(job=job_id)

    async def run(self) -> str:
        """Stream the job to its end. The status it ended with, or why this worker let go of it."""
        self._task = asyncio.current_task()
        self._services.writer.add(self._outbox)
        try:
            status = await self._stream()
        except asyncio.CancelledError:
            if self._stopped in (None, "waits") or self._task is None:  # not ours: the process ends
                raise
            self._task.uncancel()
            status = await self._after_stop(self._stopped)
        finally:
            self._attempt.give_back()
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
            return str(await self._services.run(self._release()))
        return code

    def _release(self, delay: float = 0.0, waits_for: bytes = b"") -> Call[str]:
        services = self._services
        return calls.release(
            services.keys, self.job_id, self._outbox.holder,
            lease=services.settings.lease, delay=delay, waits_for=waits_for,
        )  # fmt: skip

    async def _hand_back(self, wait: HandBack) -> str:
        """Wait in the queue: no slot is held meanwhile, a cancel works, and a sweep delivers the job at its time."""
        await self._outbox.settled()
        self._stopped = self._stopped or "waits"  # from the release on, a heartbeat is answered `fenced`
        self._log.info("job.handed_back", upstream=wait.upstream, delay=round(wait.delay, 3))
        waits_for = msgspec.json.encode({"what": wait.what, "upstream": wait.upstream})
        return await self._insist(self._release(wait.delay, waits_for))

    def _begin(self, *, again: bool, grant: Grant | None = None) -> Attempt:
        serving = self._services.upstreams.serving(self._spec.model)
        return Attempt(
            self._means, self._spec, self._outbox, self._claim, serving,
            again=again, interrupted=lambda: self._stopped is not None, grant=grant,
        )  # fmt: skip

    async def _stream(self) -> str:
        if self._refusal is not None:
            return await self._fail(self._refusal)
        if not self._services.upstreams.serving(self._spec.model):
            what = f"no upstream of this worker serves the model {self._spec.model!r}"
            return await self._fail(UpstreamFailure("model_not_served", what, retryable=False))
        while True:
            attempt = self._attempt
            try:
                verdict = await persist(
                    attempt.request,
                    retries=self._services.settings.retries,
                    may_retry=attempt.may_ask_again,
                    announce=attempt.announce_retry,
                )
            except HandBack as wait:
                return await self._hand_back(wait)
            except UpstreamFailure as failure:
                self._log.warning("upstream.failed", code=failure.code, status=failure.status, shown=self._outbox.shown)
                if attempt.may_go_on(failure):
                    attempt.go_on()
                elif not self._may_restart(failure):
                    return await self._fail(failure)
                elif (stopped := await self._restart()) is not None:
                    return stopped
            else:
                return await self._end(verdict)

    # Attempts ----------------------------------------------------------------------------------------------------

    def _may_restart(self, failure: UpstreamFailure) -> bool:
        worth_it = failure.retryable or self._attempt.refused  # a refusal to go on is none of the whole request
        return worth_it and self._outbox.shown and self._spec.on_break != "fail" and not self._exhausted

    @property
    def _exhausted(self) -> bool:
        return self._claim.broken + 1 >= self._claim.max_attempts

    async def _restart(self) -> str | None:
        """Begin a further attempt; what was shown is void. Returns why not, if the job is no longer ours."""
        self._outbox.drop_chunks()
        services, outbox = self._services, self._outbox
        await outbox.settled()  # no event of the old attempt may follow the claim,
        services.writer.remove(outbox)
        await outbox.settled()  # nor a heartbeat: it would be answered `fenced`
        wanted = calls.claim(services.keys, self.job_id, outbox.token, services.settings.lease, outbox.attempt + 1)
        claim = await self._insist(wanted)
        if claim.outcome != "claimed":
            return claim.outcome
        self._claim = claim
        outbox.begin(claim.attempt, claim.seq)
        services.writer.add(outbox)
        if self._attempt.refused:  # it would refuse the next time, too
            self._spec = msgspec.structs.replace(self._spec, on_break="restart")
        self._attempt = self._begin(again=True)
        return None

    async def _insist(self, call: Call[T]) -> T:
        """Ask until Redis answers; let go of, the job would lose an attempt."""
        while True:
            try:
                found: T = await self._services.run(call)
            except RedisUnavailable as error:
                self._log.warning("job.waits_for_redis", script=call.script, reason=str(error))
                await asyncio.sleep(AWAY)
            else:
                return found

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
        usage = self._attempt.usage
        event = compact("failed", finish_reasons={}, error=error, usage=usage)
        ending = Ending("failed", b"{}", msgspec.json.encode(error))
        return await self._finish(event, ending, b"" if usage is None else msgspec.json.encode(usage))

    async def _finish(self, event: bytes, ending: Ending, usage: bytes) -> str:
        self._outbox.usage = usage or self._outbox.usage
        self._outbox.finish(event, ending)
        self._services.writer.notify(self._outbox)
        await self._outbox.settled()
        return ending.status


def _refusal(spec: Spec | SpecError, leave: Grant | TooLarge | None) -> UpstreamFailure | None:
    """Why the job cannot be asked for at all."""
    if isinstance(spec, SpecError):  # somebody else wrote it: a producer's library checks before it sends
        return UpstreamFailure("invalid_spec", str(spec), retryable=False)
    if isinstance(leave, TooLarge):
        return too_large(leave)
    return None
