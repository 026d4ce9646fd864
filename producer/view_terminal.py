"""One job on a terminal: its text as it comes. Model output is shown, never obeyed."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from millstream.events import Chunk, Event, Resumed, Started
from millstream.terminal import printable

from .notices import Notices, attempt
from .standard import Standard

if TYPE_CHECKING:
    from rich.console import Console


class Terminal:
    """Choice 0 streams; its reasoning and refusal are dim; the other choices follow below rules after the end.

    Choices that stream at once cannot be read on one screen, so all but the first are held until it is over.
    """

    def __init__(self, standard: Standard) -> None:
        self._standard = standard
        self._notices = Notices(self._say, name_jobs=False)
        self._others: dict[int, list[str]] = {}
        self._kind = "content"
        self._at_line_start = True
        self._held = ""  # a carriage return that ended a chunk: harmless if the next one begins with a newline
        self._rich: Console | None = None

    def feed(self, job_id: str, event: Event) -> None:
        if isinstance(event, Chunk):
            self._chunk(event)
        elif isinstance(event, Started):
            self._others.clear()
            if event.attempt > 1:
                self._rule(attempt(event))
        elif event.terminal:
            self._show_the_others()
            self._new_line()
        elif not isinstance(event, Resumed):
            self._new_line()
        self._notices.feed(job_id, event)

    def _chunk(self, event: Chunk) -> None:
        for kind in ("reasoning", "refusal", "content"):
            text = event.delta.get(kind)
            if not isinstance(text, str) or not text:
                continue
            if event.index > 0:
                if kind == "content":
                    self._others.setdefault(event.index, []).append(text)
                continue
            if kind != self._kind:
                self._new_line()
                self._kind = kind
            self._write(text, dim=kind != "content")

    def _write(self, text: str, *, dim: bool = False) -> None:
        text, self._held = self._held + text, ""
        if text.endswith("\r"):
            text, self._held = text[:-1], "\r"
        if not text:
            return
        if dim:
            from rich.text import Text

            self._console.print(Text(printable(text), style="dim"), end="", soft_wrap=True)
            self._standard.stdout.flush()
        else:
            self._standard.write(text)
        self._at_line_start = text.endswith("\n")

    def _show_the_others(self) -> None:
        for index in sorted(self._others):
            self._rule(f"choice {index}")
            self._write("".join(self._others[index]))

    def _rule(self, title: str) -> None:
        from rich.rule import Rule
        from rich.text import Text

        self._new_line()
        self._kind = "content"
        self._console.print(Rule(Text(printable(title)), style="yellow"))
        self._standard.stdout.flush()

    def _new_line(self) -> None:
        held, self._held = self._held, ""
        if held:
            self._standard.write(held)
            self._at_line_start = False
        if not self._at_line_start:
            self._standard.write("\n")
            self._at_line_start = True

    def _say(self, text: str) -> None:
        self._new_line()
        self._standard.say(text)

    @property
    def _console(self) -> Console:
        if self._rich is None:
            self._rich = self._standard.console()
        return self._rich

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the cursor at the beginning of a line, where the shell's prompt or an error message belongs."""
        self._new_line()
