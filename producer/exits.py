"""What the exit status says, from how a job ended or what was raised."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from millstream.errors import JobFailed, LogRewound, MillstreamError, RedisUnavailable, ResultTimeout

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
INCOMPLETE: Final = 3
CANCELLED: Final = 4
NO_REDIS: Final = 5
TIMEOUT: Final = 124  # as timeout(1)
INTERRUPTED: Final = 130  # 128 + SIGINT
CLOSED_PIPE: Final = 141  # 128 + SIGPIPE, what any other program of a pipeline ends with

ENDINGS: Final = {"completed": DONE, "failed": FAILED, "incomplete": INCOMPLETE, "cancelled": CANCELLED}
"""Exit status by a job's terminal status."""

BEST_FIRST: Final = (DONE, INCOMPLETE, CANCELLED, FAILED)
"""Of several jobs the last of these speaks: nothing usable is worse than a part, and nobody wanted `failed`."""

MEANINGS: Final = (
    (DONE, "completed; batch: every row answered; for status, cancel, list, forget and limits: done"),
    (FAILED, "failed; batch: some row is an error line"),
    (USAGE, "wrong usage, a setting or job that cannot be, or no such job"),
    (INCOMPLETE, "incomplete: the model stopped early (length, content_filter)"),
    (CANCELLED, "cancelled"),
    (NO_REDIS, "Redis cannot be reached, or refuses"),
    (TIMEOUT, "--timeout of result ran out; the job goes on"),
    (INTERRUPTED, "Ctrl-C: nobody follows any more; the job goes on. batch: rows are missing; run it again"),
    (CLOSED_PIPE, "whoever read the output has closed it"),
)


def worst(statuses: Iterable[str]) -> int:
    """The exit status for jobs that ended like this, in the order of BEST_FIRST."""
    return max((ENDINGS[status] for status in statuses), key=BEST_FIRST.index, default=DONE)


def of_error(error: MillstreamError) -> int:
    """The exit status for an error of the library."""
    if isinstance(error, RedisUnavailable):
        return NO_REDIS
    if isinstance(error, ResultTimeout):
        return TIMEOUT
    if isinstance(error, JobFailed | LogRewound):
        return FAILED
    return USAGE
