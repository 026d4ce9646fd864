"""Events for programs: one a line, as on the channel."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import msgspec

from millstream.events import Event, encode

from .standard import Standard


class JsonLines:
    """Each event as the channel carries it; with several jobs, led by its `job`."""

    def __init__(self, standard: Standard, *, name_jobs: bool) -> None:
        self._standard = standard
        self._name_jobs = name_jobs

    def feed(self, job_id: str, event: Event) -> None:
        line = encode(event)
        self._standard.write_json({"job": job_id, **msgspec.json.decode(line)} if self._name_jobs else line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to put right: every line is whole."""
