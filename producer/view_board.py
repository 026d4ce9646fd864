"""Several jobs on a terminal: those that run stand side by side, and each that ended is printed whole above them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from millstream.events import Chunk, Event, Started
from millstream.terminal import printable
from millstream.transcript import Transcript

from .notices import Notices, attempt
from .standard import Standard

REFRESHES: Final = 12
"""Drawings per second: about as fast as one can read, and far below what a terminal over ssh can take."""
NARROWEST: Final = 36
"""Columns of a panel; below it lines of prose fall apart."""
SHORTEST: Final = 4
TALLEST: Final = 16
"""Most lines of a panel, with its frame; SHORTEST is the fewest: two lines of text."""
TAIL: Final = 20_000
"""Characters kept for drawing: more than the largest panel can show."""


@dataclass(slots=True)
class _Job:
    id: str
    said: str = "queued"
    tail: str = ""
    transcript: Transcript = field(default_factory=Transcript)

    def feed(self, event: Event) -> None:
        self.transcript.feed(event)
        if isinstance(event, Started):
            self.said = attempt(event) if event.attempt > 1 else "in_progress"
            self.tail = ""
        elif isinstance(event, Chunk) and event.index == 0:
            self.tail = (self.tail + event.content)[-TAIL:]
        elif event.terminal:
            self.said = event.type + (f" (attempt {event.attempt})" if event.attempt > 1 else "")

    def panel(self, console: Console, width: int, height: int) -> Panel:
        """Its last lines, in a frame of this many columns and lines."""
        rows, columns = height - 2, width - 4
        text = Text(printable(self.tail[-rows * columns :]))
        lines = text.wrap(console, columns)[-rows:]
        title = Text(f"{self.id} · {printable(self.said)}")
        style = "yellow" if self.transcript.attempt > 1 else "cyan"
        return Panel(Text("\n").join(lines), title=title, title_align="left", height=height, border_style=style)

    def section(self) -> Iterator[RenderableType]:
        """The whole answer, every choice of it."""
        yield Rule(Text(f"{self.id} · {printable(self.said)}"), align="left")
        for choice in self.transcript.completion(self.id)["choices"]:
            if choice["index"] > 0:
                yield Rule(Text(f"choice {choice['index']}"), align="left", characters="·")
            yield Text(printable(choice["message"]["content"] or ""))


class Board:
    """A live drawing of the open jobs; it leaves nothing behind but whole sections."""

    def __init__(self, standard: Standard, job_ids: Sequence[str]) -> None:
        self._standard = standard
        self._console = standard.console()
        self._jobs = {job_id: _Job(job_id) for job_id in job_ids}
        self._notices = Notices(self._say, name_jobs=True)
        self._live = Live(
            get_renderable=self._draw, console=self._console, transient=True, refresh_per_second=REFRESHES,
            redirect_stdout=False, redirect_stderr=False, vertical_overflow="crop",
        )  # fmt: skip

    def feed(self, job_id: str, event: Event) -> None:
        job = self._jobs[job_id]
        job.feed(event)
        if event.terminal:
            del self._jobs[job_id]
            self._print(job)
        self._notices.feed(job_id, event)

    def _print(self, job: _Job) -> None:
        for part in job.section():
            self._console.print(part, soft_wrap=isinstance(part, Text))

    def _say(self, text: str) -> None:
        """A line on the same screen must go through the drawing's own door, or it would tear it."""
        if self._standard.stderr.isatty():
            self._console.print(Text(printable(" ".join(text.split())), style="dim"))
        else:
            self._standard.say(text)

    def _draw(self) -> RenderableType:
        jobs = list(self._jobs.values())  # the drawing thread looks while the events come in
        if not jobs:
            return Text("")
        columns = max(1, min(len(jobs), self._console.width // NARROWEST))
        height = self._console.height - 2
        rows = max(1, min(-(-len(jobs) // columns), height // SHORTEST))
        shown = jobs[: rows * columns]
        each = max(SHORTEST, min(TALLEST, height // rows))
        width = self._console.width // columns
        grid = Table.grid(*[""] * columns)
        for start in range(0, len(shown), columns):
            grid.add_row(*[job.panel(self._console, width, each) for job in shown[start : start + columns]])
        for column in grid.columns:
            column.width = width
        left = len(jobs) - len(shown)
        return Group(grid, Text(f"and {left} more", style="dim")) if left else grid

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wipe the drawing; of jobs that still run, print what there is, since it would be gone otherwise."""
        self._live.stop()
        for job in self._jobs.values():
            if job.transcript.text:
                self._print(job)
