"""Millstream turns prompts into streams.

    from millstream import Client

    with Client.from_env() as client:
        job = client.submit("Write a quicksort", model="gpt-4o-mini")
        text = client.stream(job.id, on_content=print)

`AsyncClient` has the same methods as coroutines. Errors are drawn in `millstream.errors`, events in
`millstream.events`; `millstream.testing` plays the worker in your own tests.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .batch.answer import Answer
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

if TYPE_CHECKING:
    from .async_client import AsyncClient
    from .client import Client
    from .meters import Gauge

__version__ = "0.1.0"

__all__ = [
    "Answer", "AsyncClient", "Cancelled", "Chunk", "Client", "Completed", "Ended", "Event", "Failed", "Gauge",
    "Incomplete", "Job", "JobCancelled", "JobError", "JobExists", "JobExpired", "JobFailed", "JobNotFound",
    "LogRewound", "MillstreamError", "RedisUnavailable", "Result", "ResultTimeout", "Resumed", "Retrying",
    "Settings", "SettingsError", "SpecError", "Started", "Status", "Transcript",
]  # fmt: skip

if not TYPE_CHECKING:  # a type checker sees the imports above, and so still knows which names there are

    def __getattr__(name: str) -> Any:
        """Import what stands on redis and rq when it is first asked for: they take ten times as long as the rest."""
        homes = {"Client": "client", "AsyncClient": "async_client", "Gauge": "meters"}
        if name not in homes:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = getattr(import_module(f".{homes[name]}", __name__), name)
        return globals()[name]
