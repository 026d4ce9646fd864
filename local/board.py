"""What the demo shows: one row per job, fed with its events, drawn as panels or as plain lines. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from millstream.events import AnyEvent, Chunk, Resumed, Retrying, Started, Terminal
from millstream.terminal import printable
from millstream.transcript import Transcript

_COLOURS: Final = {"completed": "green", "incomplete": "green", "failed": "red", "cancelled": "red", "queued": "dim"}
_LINE_WIDTH: Final = 88  # characters of a plain line


@dataclass(slots=True)
class Row:
    """One job as seen live. Times are the server's clock, Unix seconds, but for `seconds`."""

    job_id: str
    prompt: str
    transcript: Transcript = field(default_factory=Transcript)
    status: str = "queued"
    ended: bool = False
    seconds: float = 0.0  # from submit to the terminal event, as measured here
    events: int = 0  # chunk events of the newest attempt
    tokens: int = 0  # upstream chunks of the newest attempt, which for most models are tokens
    first_at: float = 0.0
    last_at: float = 0.0

    def feed(self, event: AnyEvent, elapsed: float) -> None:
        """Take the next event, `elapsed` seconds after the submit."""
        self.transcript.feed(event)
        if isinstance(event, Chunk):
            self._count(event)
        elif isinstance(event, Started):
            self.status, self.events, self.tokens = "in_progress", 0, 0
        elif isinstance(event, Resumed):
            self.status = "in_progress"
        elif isinstance(event, Retrying):
            self.status = f"asks again in {event.delay:.0f} s ({event.error.get('code')})"
        elif isinstance(event, Terminal):
            self.status, self.ended, self.seconds = event.type, True, elapsed

    @property
    def rate(self) -> float:
        """Tokens per second from the first to the newest; 0 before there are two."""
        took = self.last_at - self.first_at
        return (self.tokens - 1) / took if took > 0 else 0.0

    def _count(self, chunk: Chunk) -> None:
        if self.events == 0:
            self.first_at = chunk.at
        self.status, self.last_at = "in_progress", chunk.at
        self.events += 1
        self.tokens += chunk.n


def panels(rows: Sequence[Row], console: Console) -> Table:
    """The rows side by side, each showing the end of its text."""
    height = max(5, min(16, console.height - 8))
    width = max(10, console.width // len(rows) - 4)
    grid = Table.grid(expand=True)
    for _ in rows:
        grid.add_column(ratio=1)
    grid.add_row(*(_panel(row, console, width, height) for row in rows))
    return grid


def _panel(row: Row, console: Console, width: int, height: int) -> Panel:
    lines = Text(printable(row.transcript.text)).wrap(console, width)
    rate = f" · {row.rate:.0f} tokens/s" if row.rate else ""
    return Panel(
        Text("\n").join(lines[-height:]),
        title=Text(textwrap.shorten(row.prompt, width - 2, placeholder=" ...")),
        subtitle=Text(row.status + rate if len(row.status + rate) <= width - 2 else row.status),
        border_style=_COLOURS.get(row.status, "cyan"),
        height=height + 2,
    )


class PlainLines:
    """One row's text cut into labelled lines, for output that is no terminal: whole lines of many rows interleave."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._rest = ""

    def feed(self, event: AnyEvent) -> list[str]:
        """The lines that this event completes."""
        if isinstance(event, Chunk) and event.index == 0:
            self._rest += event.content
            return self._cut()
        if isinstance(event, Started) and event.attempt > 1:
            self._rest = ""
            return self._labelled([f"-- starts again ({event.reason}): the text above is void --"])
        if isinstance(event, Retrying):
            return self._labelled([f"-- asks again in {event.delay:.0f} s: {event.error.get('message')} --"])
        if isinstance(event, Terminal):
            rest, self._rest = self._rest, ""
            return self._labelled([rest] if rest.strip() else [])
        return []

    def _cut(self) -> list[str]:
        *whole, self._rest = self._rest.split("\n")
        while len(self._rest) > _LINE_WIDTH:
            at = self._rest.rfind(" ", 1, _LINE_WIDTH + 1)
            end = at if at > 0 else _LINE_WIDTH
            whole.append(self._rest[:end])
            self._rest = self._rest[end:].lstrip(" ")
        return self._labelled([line for line in whole if line.strip()])

    def _labelled(self, lines: Sequence[str]) -> list[str]:
        # Wrapped, because a line that came whole was not cut above.
        return [
            f"{self._label} {part}" for line in lines for part in textwrap.wrap(printable(line), _LINE_WIDTH) or [""]
        ]


def outcome(number: int, row: Row, *, same_as_log: bool) -> str:
    """The line that the demo ends with, for one row."""
    proof = "as in the log" if same_as_log else "NOT as in the log"
    error = row.transcript.error
    why = printable(f"  {error.get('code')}: {error.get('message')}") if error else ""
    return (
        f"[{number}] {row.status:<11}{row.events:>5} chunks {len(row.transcript.text):>6} characters "
        f"{row.seconds:>6.1f} s  {proof}{why}"
    )
