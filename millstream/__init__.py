"""Millstream turns prompts into streams.

    from millstream import Client

    with Client.from_env() as client:
        job = client.submit("Write a quicksort", model="gpt-4o-mini")
        text = client.stream(job.id, on_content=print)

`AsyncClient` has the same methods as coroutines. Errors are drawn in `millstream.errors`, events in
`millstream.events`; `millstream.testing` plays the worker in your own tests.
"""

from .async_client import AsyncClient
from .client import Client
from .errors import (
    JobCancelled,
    JobError,
    JobExists,
    JobExpired,
    JobFailed,
    JobNotFound,
    LogRewound,
    MillstreamError,
    RedisUnavailable,
    ResultTimeout,
    SettingsError,
    SpecError,
)
from .events import Cancelled, Chunk, Completed, Event, Failed, Incomplete, Resumed, Retrying, Started
from .result import Ended, Job, Result
from .settings import Settings
from .status import Status
from .transcript import Transcript

__version__ = "0.1.0"

__all__ = [
    "AsyncClient", "Cancelled", "Chunk", "Client", "Completed", "Ended", "Event", "Failed", "Incomplete", "Job",
    "JobCancelled", "JobError", "JobExists", "JobExpired", "JobFailed", "JobNotFound", "LogRewound", "MillstreamError",
    "RedisUnavailable", "Result", "ResultTimeout", "Resumed", "Retrying", "Settings", "SettingsError", "SpecError",
    "Started", "Status", "Transcript",
]  # fmt: skip
