"""The one owner of retries: tenacity, until the first content of an attempt may have been seen.

Waits: what the upstream asks for (`retry-after`, at most LONGEST), else exponential with full jitter, 0.5 s doubling
to 20 s (the openai SDK's base, a higher cap: our jobs are not waited for by a blocked caller).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from .upstream import UpstreamFailure

LONGEST: Final = 120.0
ANNOUNCED: Final = 1.0
"""Seconds of waiting from which on consumers are told."""

T = TypeVar("T")


async def persist(
    attempt: Callable[[], Awaitable[T]],
    *,
    retries: int,
    may_retry: Callable[[UpstreamFailure], bool],
    announce: Callable[[UpstreamFailure, float], None],
) -> T:
    """Run `attempt` until it succeeds, fails for good, or `retries` further tries are used up; raises the last
    failure.
    """
    backoff = wait_random_exponential(multiplier=0.5, max=20)

    def wait(state: RetryCallState) -> float:
        failure = state.outcome.exception() if state.outcome else None
        if isinstance(failure, UpstreamFailure) and failure.retry_after is not None:
            return min(failure.retry_after, LONGEST)
        return backoff(state)

    def before_sleep(state: RetryCallState) -> None:
        failure = state.outcome.exception() if state.outcome else None
        assert isinstance(failure, UpstreamFailure)
        announce(failure, state.upcoming_sleep)

    return await AsyncRetrying(
        retry=retry_if_exception(lambda error: isinstance(error, UpstreamFailure) and may_retry(error)),
        stop=stop_after_attempt(retries + 1),
        wait=wait,
        before_sleep=before_sleep,
        reraise=True,
    )(attempt)
