"""Everything Millstream raises, as one tree.

    MillstreamError
    ├── SettingsError              the environment asks for something that cannot be
    ├── SpecError (ValueError)     a job that no worker could run
    ├── RedisUnavailable           Redis did not answer, or refused
    └── JobError                   about one job; has `.job_id`
        ├── JobNotFound            no such job
        ├── JobExists              the id is taken by a different job
        ├── JobExpired             it was there, and its retention is over
        ├── LogRewound             Redis lost the end of a log that was already read
        ├── JobFailed              it ended as `failed`; has `.code`
        ├── JobCancelled           it ended as `cancelled`
        └── ResultTimeout (TimeoutError)   it is still open

Every message says what was found, what was expected and what to do.
"""

from __future__ import annotations

from typing import Any


class MillstreamError(Exception):
    """Base of every error raised by this package."""


class SettingsError(MillstreamError):
    """A setting has a value that cannot be used; the message names the variable."""


class SpecError(MillstreamError, ValueError):
    """A job was refused before anything was written; the message names the field."""


class RedisUnavailable(MillstreamError):
    """Redis could not be reached, or answered that it cannot serve now."""


class JobError(MillstreamError):
    """Something about one job; `job_id` is its id."""

    def __init__(self, job_id: str, message: str) -> None:
        super().__init__(message)
        self.job_id = job_id

    def __reduce__(self) -> tuple[Any, ...]:
        """As pickle wants it: by default it would call the class with the message alone, and fail."""
        return _restored, (type(self), self.args, vars(self))


def _restored(kind: type[JobError], args: tuple[Any, ...], fields: dict[str, Any]) -> JobError:
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(fields)
    return error


class JobNotFound(JobError):
    """No job has this id."""

    def __init__(self, job_id: str) -> None:
        super().__init__(
            job_id, f"no job {job_id!r}: it was never submitted, or it ended and its retention is over; check the id"
        )


class JobExists(JobError):
    """The id belongs to a job with a different spec."""

    def __init__(self, job_id: str) -> None:
        super().__init__(
            job_id, f"job {job_id!r} exists with a different spec; choose another id, or send exactly the same spec"
        )


class JobExpired(JobError):
    """The job was there while this consumer looked, and is gone or incomplete now."""

    def __init__(self, job_id: str) -> None:
        super().__init__(
            job_id,
            f"job {job_id!r} is gone: its retention ended before it was read (submit with a longer one), "
            "or Redis lost its data",
        )


class LogRewound(JobError):
    """Redis lost the end of a log; what was read and what is there now differ."""

    def __init__(self, job_id: str, seen: int, found: int) -> None:
        super().__init__(
            job_id,
            f"the log of job {job_id!r} does not reach event {seen}: it ends at {found} or was written anew. "
            "If that event was seen, Redis lost its newest writes (see the README on power loss); follow again "
            "from the start",
        )


class JobFailed(JobError):
    """The job ended as `failed`; `code` is the reason in one word."""

    def __init__(self, job_id: str, code: str, message: str) -> None:
        super().__init__(job_id, f"job {job_id!r} failed ({code}): {message}")
        self.code = code
        self.reason = message


class JobCancelled(JobError):
    """The job ended as `cancelled`."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id, f"job {job_id!r} was cancelled; its partial text can still be followed")


class ResultTimeout(JobError, TimeoutError):
    """The job did not end in the time that was given; it is still open."""

    def __init__(self, job_id: str, seconds: float) -> None:
        super().__init__(job_id, f"job {job_id!r} has not ended within {seconds:.3g} s; it goes on, ask again later")
