"""What one attempt holds of the limits: the ticket of its next request, or of the one that runs, or a place for one."""

from __future__ import annotations

import asyncio

from millstream.job import Spec
from millstream.meters import UNUSED, Meter, rested

from .choice import GuardedUpstream
from .limiter import Grant, Limiter, TooLarge
from .upstream import Answer, Counts, UpstreamFailure


class Reservation:
    """Without a limiter nothing is limited."""

    def __init__(self, limiter: Limiter | None, spec: Spec, grant: Grant | None) -> None:
        self._limiter, self._spec, self._grant = limiter, spec, grant
        self._place: tuple[Meter, str] | None = None  # what was asked for and not granted yet, perhaps before the line

    @property
    def counted(self) -> bool:
        """Whether the request that runs has a ticket."""
        return self._grant is not None

    async def have(self, upstream: GuardedUpstream, room: float, *, again: bool) -> float:
        """Have a ticket for a request to this upstream: 0.0, or the seconds until it is worth asking again.

        Raises UpstreamFailure when no waiting makes the request possible.
        """
        limiter = self._limiter
        if limiter is None:
            return 0.0
        meter = limiter.meter(upstream, self._spec.model)
        if self._grant is not None:
            if self._grant.meter.name != meter.name:
                self.give_back()
            elif self._grant.fresh(asyncio.get_running_loop().time()):
                return 0.0
        elif not again and not limiter.watches(meter):
            return 0.0
        if self._place is None or self._place[0].name != meter.name:
            if self._place is not None:
                limiter.give_up(*self._place)
            self._place = meter, limiter.new_ticket()
        found = await limiter.again(meter, self._spec, self._place[1], room=room, instead_of=self._grant)
        self._grant = None
        if found is None or isinstance(found, Grant):
            self._grant, self._place = found, None
            return 0.0
        if found.outcome == "too_large":
            raise too_large(TooLarge(found.tokens, meter.limits.tokens, upstream.name))
        return max(found.seconds, 0.001)

    def give_back(self) -> None:
        """No request is made with it."""
        if self._limiter is not None:
            if self._grant is not None:
                self._limiter.settle(self._grant, UNUSED)
            if self._place is not None:
                self._limiter.give_up(*self._place)
        self._grant = self._place = None

    def settle(self, answer: Answer, *, refused: bool = False) -> None:
        """The request is over: what was reserved for it counts as what it took."""
        grant, self._grant = self._grant, None
        if grant is None or self._limiter is None:
            return
        usage = answer.measured or {}
        took = 0 if refused and not answer.pieces else _count(usage.get("total_tokens"))
        self._limiter.settle(grant, took, _count(usage.get("completion_tokens")))

    def heard(self, counts: Counts) -> None:
        """What the upstream says of its limits in an answer's headers."""
        if self._grant is not None and self._limiter is not None:
            self._limiter.counted(self._grant.meter, *counts)

    def pass_on(self, upstream: GuardedUpstream, failure: UpstreamFailure) -> None:
        """Who wants to be left alone, is: by this process from now on, by all others with their next look."""
        cools = failure.retryable and failure.retry_after is not None
        if failure.retry_after is not None and cools:
            upstream.guard.cool(self._spec.model, rested(failure.retry_after))
        limiter = self._limiter
        if limiter is not None and (cools or (failure.retryable and failure.status == 429)):
            limiter.refused(limiter.meter(upstream, self._spec.model), failure.retry_after, *failure.counts)


def _count(said: object) -> int | None:
    return said if isinstance(said, int) and said >= 0 else None


def too_large(found: TooLarge) -> UpstreamFailure:
    """A request that no waiting makes possible."""
    what = (
        f"about {found.tokens:,} tokens (the prompt and the most it may answer) never fit into the {found.limit:,} "
        f"that {found.upstream} is asked for in one window; shorten the prompt or lower max_tokens"
    )
    return UpstreamFailure("exceeds_limit", what, retryable=False)
