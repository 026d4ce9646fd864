"""How followed jobs are shown, one file per way. A view takes events and writes; it decides nothing else.

| file             | where                           | what                                                           |
|------------------|---------------------------------|----------------------------------------------------------------|
| view_terminal.py | a terminal, one job             | the text as it comes; a restart is a rule                      |
| view_board.py    | a terminal, several jobs        | those that run side by side; each that ended as a section      |
| view_pipe.py     | a pipe                          | the final text, once, after the end                            |
| view_live.py     | a pipe, `--live`                | the text as it comes                                           |
| view_json.py     | anywhere, `--json`              | one event a line                                               |
| notices.py       | stderr, beside all but `--json` | restarts, waits, endings                                       |
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from millstream.events import Event

from .standard import Standard


class View(AbstractContextManager["View"], Protocol):
    """Entered before the first event and left after the last, however that comes about."""

    def feed(self, job_id: str, event: Event) -> None:
        """Show the next event of a job, in order."""


def choose(standard: Standard, job_ids: Sequence[str], *, live: bool, as_json: bool) -> View:
    """The view for what was asked and for who is at the other end. Each is imported when it is chosen."""
    several = len(job_ids) > 1
    if as_json:
        from .view_json import JsonLines

        return JsonLines(standard, name_jobs=several)
    if standard.terminal and several:
        from .view_board import Board

        return Board(standard, job_ids)
    if standard.terminal:
        from .view_terminal import Terminal

        return Terminal(standard)
    if live:
        from .view_live import Live

        return Live(standard, name_jobs=several)
    from .view_pipe import Pipe

    return Pipe(standard, job_ids)
