"""The final text, for whoever reads a pipe: once, after the end, byte for byte what the model wrote."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from millstream.events import Chunk, Event, Started
from millstream.transcript import Transcript

from .notices import Notices, attempt
from .standard import Standard


class Pipe:
    """One text, or several in the order in which their jobs were named, each below `==> ID <==` as by head(1)."""

    def __init__(self, standard: Standard, job_ids: Sequence[str]) -> None:
        self._standard = standard
        self._waiting = list(dict.fromkeys(job_ids))
        self._name_jobs = len(self._waiting) > 1
        self._notices = Notices(standard.say, name_jobs=self._name_jobs)
        self._transcripts = {job_id: Transcript() for job_id in self._waiting}
        self._several_choices: set[str] = set()

    def feed(self, job_id: str, event: Event) -> None:
        self._transcripts[job_id].feed(event)
        if isinstance(event, Started) and event.attempt > 1:
            self._notices.say(job_id, attempt(event))
        if isinstance(event, Chunk) and event.index > 0 and job_id not in self._several_choices:
            self._several_choices.add(job_id)
            self._notices.say(job_id, "it has several choices; only the first is written, result --json has them all")
        if event.terminal:
            self._write_what_is_next()
        self._notices.feed(job_id, event)

    def _write_what_is_next(self) -> None:
        while self._waiting and self._transcripts[self._waiting[0]].end:
            job_id = self._waiting.pop(0)
            text = self._transcripts.pop(job_id).text
            if self._name_jobs:
                text = f"==> {job_id} <==\n{text}" + ("" if text.endswith("\n") else "\n")
            self._standard.write(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to put right: what has not ended was not written."""
