"""The text in a pipe as it comes, for whoever would rather have it early than final."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from millstream.events import Chunk, Event, Started

from .notices import Notices, attempt
from .standard import Standard


class Live:
    """Choice 0 of each job; `==> ID <==` whenever another of several jobs goes on, as by tail(1).

    What was written cannot be taken back: a restart is said on stderr, and the text begins anew on a new line.
    """

    def __init__(self, standard: Standard, *, name_jobs: bool) -> None:
        self._standard = standard
        self._name_jobs = name_jobs
        self._notices = Notices(standard.say, name_jobs=name_jobs)
        self._writing = ""  # the job whose text was written last
        self._shown: set[str] = set()  # the jobs whose newest attempt has text out there
        self._several_choices: set[str] = set()
        self._at_line_start = True

    def feed(self, job_id: str, event: Event) -> None:
        if isinstance(event, Chunk):
            self._chunk(job_id, event)
        elif isinstance(event, Started) and event.attempt > 1:
            void = job_id in self._shown
            self._notices.say(job_id, attempt(event) + ("; the text so far is void and begins anew" if void else ""))
            if void:
                self._shown.discard(job_id)
                self._new_line()
        self._notices.feed(job_id, event)

    def _chunk(self, job_id: str, event: Chunk) -> None:
        if event.index > 0:
            if job_id not in self._several_choices:
                self._several_choices.add(job_id)
                self._notices.say(job_id, "it has several choices; only the first is written, --json has them all")
        elif event.content:
            if self._name_jobs and job_id != self._writing:
                self._new_line()
                self._standard.write(f"==> {job_id} <==\n")
            self._writing = job_id
            self._shown.add(job_id)
            self._standard.write(event.content)
            self._at_line_start = event.content.endswith("\n")

    def _new_line(self) -> None:
        if not self._at_line_start:
            self._standard.write("\n")
            self._at_line_start = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the last of several sections; a single text stays as the model ended it."""
        if self._name_jobs and not isinstance(error, BrokenPipeError):
            self._new_line()
