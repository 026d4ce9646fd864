"""The one owner of retries: tenacity, until the first content of an attempt may have been seen.

Waits: what the upstream asks for, else exponential, 0.5 s doubling to 5 s, half of it random (half is certain, so that
the retries of a job cannot all be spent within a second of an outage). A wait longer than the waiting room is not
spent here: HandBack says so, and the job goes back to the queue with its time.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from .upstream import UpstreamFailure

WAITING_ROOM: Final = 5.0
"""Seconds a job may wait in memory; a longer wait would keep its slot from others."""

FIRST_BACKOFF: Final = 0.5
LONGEST_BACKOFF: Final = 5.0

ANNOUNCED: Final = 1.0
"""Seconds of waiting from which on consumers are told."""

T = TypeVar("T")


class HandBack(Exception):  # noqa: N818 - not an error: the job waits elsewhere
    """The job is to wait `delay` seconds for the upstream of this name, or for its limit, in the queue."""

    def __init__(self, delay: float, upstream: str, what: str = "upstream") -> None:
        super().__init__(f"{delay:.3f} s for {upstream}")
        self.delay = delay
        self.upstream = upstream
        self.what = what


def backoff(tries: int, chance: Callable[[], float] = random.random) -> float:
    """Seconds to wait after so many requests that failed."""
    most = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0 ** min(tries - 1, 10))
    return float(most * (0.5 + 0.5 * chance()))


async def persist(
    attempt: Callable[[], Awaitable[T]],
    *,
    retries: int,
    may_retry: Callable[[UpstreamFailure], bool],
    announce: Callable[[UpstreamFailure, float], None],
) -> T:
    """Run `attempt` until it succeeds, fails for good, or `retries` further tries are used up; raises the last
    failure. `announce` is told of every wait before it begins, and may raise HandBack.
    """

    def wait(state: RetryCallState) -> float:
        failure = _failure(state)
        return backoff(state.attempt_number) if failure.retry_after is None else failure.retry_after

    return await AsyncRetrying(
        retry=retry_if_exception(lambda error: isinstance(error, UpstreamFailure) and may_retry(error)),
        stop=stop_after_attempt(retries + 1),
        wait=wait,
        before_sleep=lambda state: announce(_failure(state), state.upcoming_sleep),
        reraise=True,
    )(attempt)


def _failure(state: RetryCallState) -> UpstreamFailure:
    failure = state.outcome.exception() if state.outcome else None
    assert isinstance(failure, UpstreamFailure)
    return failure
