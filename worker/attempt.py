"""One attempt at a job: leave to ask an upstream, the request under its clocks, the parts on their way to the outbox.

An attempt may need several requests: again in silence while nothing was shown, and further ones that go on from its
text where the upstream can. Its parent, the relay, decides which.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import structlog

from millstream.calls import Claim
from millstream.events import compact
from millstream.job import Spec
from millstream.settings import Settings

from .breaker import Ticket
from .choice import GuardedUpstream, Held, admit
from .clocks import Clock, Ticker
from .limiter import Grant, Limiter
from .outbox import Outbox
from .reservation import Reservation
from .retries import ANNOUNCED, WAITING_ROOM, HandBack
from .turns import Turns
from .upstream import Answer, Finish, Logprobs, Part, Piece, UpstreamFailure, Usage, Verdict, continuation
from .writer import Writer

log = structlog.get_logger()

USAGE_EVERY: Final = 1.0
"""Seconds between running usage estimates in the state: what a cancelled job is billed by."""

SEAM_ROOM: Final = 60.0
"""Seconds that a job with a text to go on from waits in memory: in the queue it would lose the text."""


@dataclass(frozen=True, slots=True)
class Means:
    """What every attempt of a process works with."""

    settings: Settings
    writer: Writer
    ticker: Ticker
    turns: Turns
    worker: str
    limiter: Limiter | None = None


@dataclass(slots=True)
class Seam:
    """Where a request goes on from: the text so far, about how many tokens it has, what they were billed."""

    text: str
    tokens: int
    usage: dict[str, Any]
    spent: float
    """Seconds the answer has taken so far; its total time goes on from there."""
    written: bool = False
    """Whether `resumed` is in the log, because the upstream did go on."""


class Attempt:
    """What was asked, shown and kept since the last `started`."""

    def __init__(
        self, means: Means, spec: Spec, outbox: Outbox, claim: Claim, serving: Sequence[GuardedUpstream],
        *, again: bool, interrupted: Callable[[], bool], grant: Grant | None = None,
    ) -> None:  # fmt: skip
        self._means, self._spec, self._outbox, self._claim = means, spec, outbox, claim
        self._serving = serving
        self._again = again
        self._interrupted = interrupted
        self._reservation = Reservation(means.limiter, spec, grant)
        self._upstream: GuardedUpstream | None = None  # the one asked last
        self._answer = Answer()
        self._partial = continuation.Partial() if spec.on_break == "continue" else None
        self._tokens = 0
        self._seam: Seam | None = None
        self._clock: Clock | None = None  # of the request made last
        self._seams = 0
        self._usage_at = 0.0
        self._prompt_bytes = len(msgspec.json.encode(spec.messages))
        self._size = self._prompt_bytes + len(msgspec.json.encode(spec.params))
        self._log = log.bind(job=outbox.job_id)

    @property
    def usage(self) -> dict[str, Any] | None:
        """What the attempt has used so far; None while nothing was shown."""
        return self._answer.usage if self._outbox.shown else None

    @property
    def refused(self) -> bool:
        """Whether the upstream was asked to go on and did not."""
        return self._seam is not None and not self._seam.written

    def may_ask_again(self, failure: UpstreamFailure) -> bool:
        """Whether the same request may be made once more: consumers have seen nothing of its answer."""
        seen = self._outbox.shown if self._seam is None else self._seam.written
        return failure.retryable and not seen

    def announce_retry(self, failure: UpstreamFailure, delay: float) -> None:
        """A retry comes after `delay` seconds. Raises HandBack when that is too long to wait here."""
        assert self._upstream is not None
        name = self._upstream.name
        self._log.info("upstream.retry", upstream=name, code=failure.code, status=failure.status, delay=round(delay, 3))
        if self._seam is None:
            self._outbox.drop_chunks()  # unseen ones: the next request brings them again
        if delay > ANNOUNCED:
            self._put(compact("retrying", error=failure.error, delay=round(delay, 3)))
        if delay > self._room:
            raise HandBack(delay, name)

    # Going on ----------------------------------------------------------------------------------------------------

    def may_go_on(self, failure: UpstreamFailure) -> bool:
        """Whether the upstream can be asked to go on from the text so far."""
        if not (failure.retryable and self._outbox.shown and self._partial is not None and self._partial.plain):
            return False
        dialect = self._upstream.settings.continue_with if self._upstream is not None else ""
        allowed = self._seams < self._means.settings.retries and not self.refused
        return allowed and continuation.possible(self._spec, dialect)

    def go_on(self) -> None:
        """Make the next request one that goes on. What waits in the outbox stays: it is part of the text."""
        assert self._partial is not None
        spent = 0.0 if self._clock is None else self._clock.spent + (self._seam.spent if self._seam else 0.0)
        self._seam = Seam(self._partial.text(), self._tokens, self._answer.usage, spent)
        self._seams += 1

    # One request -------------------------------------------------------------------------------------------------

    async def request(self) -> Verdict:
        """Ask once. Raises UpstreamFailure, or HandBack when the wait for leave would be too long."""
        await self._means.turns.mine(self._size)
        upstream, ticket = await self._leave()
        self._again = True
        self._announce(upstream)
        try:
            verdict = await self._timed(upstream, ticket)
        except UpstreamFailure as failure:
            upstream.redact(failure)
            if failure.of_the_upstream:
                ticket.failed()
            else:
                ticket.answered()
            self._reservation.settle(self._answer, refused=failure.status >= 400)
            self._reservation.pass_on(upstream, failure)
            raise
        except RecursionError:  # of the library that writes the request
            ticket.dropped()
            self._reservation.give_back()
            what = "the job is nested too deeply to be written into a request; flatten its messages and parameters"
            raise UpstreamFailure("invalid_spec", what, retryable=False) from None
        except BaseException:  # cancelled, or a bug: a probe that told nothing would keep its breaker open for good
            ticket.dropped()
            self._reservation.settle(self._answer)
            raise
        ticket.answered()
        self._reservation.settle(self._answer)
        return verdict

    def give_back(self) -> None:
        """The attempt makes no further request."""
        self._reservation.give_back()

    @property
    def _room(self) -> float:
        return WAITING_ROOM if self._seam is None else SEAM_ROOM

    async def _leave(self) -> tuple[GuardedUpstream, Ticket]:
        """Leave to ask: of the breaker and its like, and where there are limits a ticket. Raises HandBack."""
        serving = self._serving if self._seam is None or self._upstream is None else [self._upstream]
        waited = 0.0
        while isinstance(found := admit(serving, self._spec.model, again=self._again), Held):
            waited += await self._wait(found.wait.seconds, waited, found.upstream, "upstream")
        upstream, ticket = found
        try:
            while (seconds := await self._reservation.have(upstream, self._room - waited, again=self._again)) > 0:
                waited += await self._wait(seconds, waited, upstream, "limit")
        except BaseException:
            ticket.dropped()
            raise
        return upstream, ticket

    async def _wait(self, seconds: float, waited: float, upstream: GuardedUpstream, what: str) -> float:
        seconds *= random.uniform(1.0, 1.1)  # not all at the same moment
        if waited + seconds > self._room:
            raise HandBack(seconds + random.random(), upstream.name, what)
        if seconds > ANNOUNCED and self._upstream is not None:
            error = {"code": "upstream_spared", "message": f"{upstream.name} is left alone for a while"}
            self._put(compact("retrying", error=error, delay=round(seconds, 3)))
        await asyncio.sleep(seconds)
        return seconds

    def _announce(self, upstream: GuardedUpstream) -> None:
        before, self._upstream = self._upstream, upstream
        if before is None:
            worker, model, claim = self._means.worker, self._spec.model, self._claim
            reason = claim.reason if claim.attempt > 1 else None
            mark = secrets.token_hex(4)  # tells this attempt from another of its number, should Redis lose this one
            self._put(compact("started", worker=worker, model=model, upstream=upstream.name, reason=reason, mark=mark))
            self._log.info(
                "job.started", attempt=claim.attempt, model=model, upstream=upstream.name, reason=claim.reason
            )
        elif before is not upstream:
            error = {"code": "upstream_spared", "message": f"{upstream.name} is asked instead of {before.name}"}
            self._put(compact("retrying", error=error, delay=0.0, upstream=upstream.name))

    async def _timed(self, upstream: GuardedUpstream, ticket: Ticket) -> Verdict:
        settings, task = self._means.settings, asyncio.current_task()
        assert task is not None
        total = (self._spec.timeout or settings.total_timeout) - (self._seam.spent if self._seam else 0.0)
        clock = self._clock = Clock(settings.first_token_timeout, settings.idle_timeout, total, task.cancel)
        self._means.ticker.add(clock)
        try:
            return await self._read(upstream, ticket, clock)
        except asyncio.CancelledError:
            if clock.struck is None or self._interrupted():
                raise
            task.uncancel()
            if self._answer.finished:  # only the usage or the end of the stream did not come
                return self._answer.verdict(done=False)
            raise _out_of_time(clock.struck) from None
        finally:
            self._means.ticker.remove(clock)

    async def _read(self, upstream: GuardedUpstream, ticket: Ticket, clock: Clock) -> Verdict:
        settings, seam = upstream.settings, self._seam
        answer = self._answer = Answer(
            choices=self._spec.params.get("n") or 1,
            prompt_bytes=self._prompt_bytes + (len(seam.text) if seam else 0),
            allowed=settings.finish_reasons,
            done_is_enough=settings.ends_with == "done",
            earlier=seam.usage if seam else None,
        )
        body = upstream.request(self._spec)
        echo = continuation.Echo(settings.continue_with, seam.text if seam else "")
        if seam is not None:
            body = continuation.request(body, settings.continue_with, seam.text, seam.tokens)
        elif self._partial is not None:  # what an earlier request brought was never shown
            self._partial, self._tokens = continuation.Partial(), 0

        def take(parts: Sequence[Part]) -> bool:
            if parts:
                self._pass_on(answer, clock, ticket, parts if seam is None else self._sewn(seam, echo, parts))
            return not self._outbox.full

        async def room() -> None:
            clock.pause()
            await self._outbox.room()
            clock.resume()

        done = False
        try:
            async with upstream.ask(body, self._reservation.heard if self._reservation.counted else None) as stream:
                await stream.play(take, room)
                done = stream.done
        except UpstreamFailure as failure:
            if failure.code not in ("stream_broken", "malformed_stream") or not answer.finished:
                raise  # else every choice had ended before the connection or the grammar broke: the answer is whole
        return answer.verdict(done=done)

    def _pass_on(self, answer: Answer, clock: Clock, ticket: Ticket, parts: Sequence[Part]) -> None:
        content = ended = False
        for part in parts:
            if isinstance(part, Piece):
                answer.pieces += 1  # what answer.take would do: this is once for every token
                if answer.reasons:
                    answer.note_more(part.index)
                content = True
                if part.delta is None:
                    self._outbox.text(part.index, part.text)
                else:
                    self._outbox.event(compact("chunk", index=part.index, n=1, delta=part.delta))
                if self._partial is not None:
                    self._partial.add(part.index, part.text, part.delta)
                    self._tokens += 1
            elif isinstance(part, Logprobs):  # n counts the chunk they came in, and its content did
                self._put(compact("chunk", index=part.index, n=0, delta={"logprobs": part.lists}))
            else:
                answer.take(part)
                ended = ended or isinstance(part, Finish)
        if content:
            ticket.answered()
            now = clock.content()
            if now - self._usage_at >= USAGE_EVERY:
                self._usage_at = now
                self._outbox.usage = msgspec.json.encode(answer.usage)
            self._means.writer.notify(self._outbox)
        if ended and answer.finished:
            clock.tail()

    def _sewn(self, seam: Seam, echo: continuation.Echo, parts: Sequence[Part]) -> Sequence[Part]:
        """The parts without what only repeats the text; the seam is written before the first of them."""
        found: list[Part] = []
        for part in parts:
            if isinstance(part, Piece) and part.delta is None and part.index == 0:
                if text := echo.new(part.text):
                    found.append(Piece(0, text))
                continue
            if isinstance(part, Finish) and (rest := echo.rest()):
                found.append(Piece(0, rest))
            found.append(part)
        if not seam.written and not all(isinstance(part, Usage) for part in found):
            seam.written = True
            self._put(compact("resumed"))
            self._log.info("job.resumed", upstream=self._upstream.name if self._upstream else "", tokens=seam.tokens)
        return found

    def _put(self, event: bytes) -> None:
        self._outbox.event(event)
        self._means.writer.notify(self._outbox)


def _out_of_time(code: str) -> UpstreamFailure:
    words = {
        "first_token_timeout": "no content came in time; MILLSTREAM_FIRST_TOKEN_TIMEOUT sets the time",
        "idle_timeout": "the stream stalled; MILLSTREAM_IDLE_TIMEOUT sets the time",
        "total_timeout": "the answer took too long; the job's timeout or MILLSTREAM_TOTAL_TIMEOUT sets the time",
    }
    return UpstreamFailure(code, words[code], retryable=code != "total_timeout")
