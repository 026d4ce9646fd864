"""The three standard streams, and what may be written to each.

Text goes to stdout, everything else to stderr. A terminal gets nothing that could act on it, a pipe gets it as it is.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Final, TextIO

import msgspec

from millstream.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console

LONGEST_LINE: Final = 600
"""Characters of one line on stderr: room for a message of an upstream, not for the page it may have sent instead."""


@dataclass(slots=True)
class Standard:
    """stdin as bytes, the others as text. `terminal`: whether stdout is one; `prog`: how this command is called."""

    stdin: IO[bytes] | None
    stdout: TextIO
    stderr: TextIO
    terminal: bool = False
    width: int | None = None  # of the terminal; None = ask it
    prog: str = "millstream"

    @classmethod
    def of_process(cls, prog: str) -> Standard:
        """The streams of this process. A pipe speaks UTF-8 whatever the locale says: what goes through it is data."""
        stdin: BinaryIO | None = getattr(sys.stdin, "buffer", None)
        stdout, stderr = (_open(stream) for stream in (sys.stdout, sys.stderr))
        terminal = stdout.isatty()
        if not terminal and hasattr(stdout, "reconfigure"):
            stdout.reconfigure(encoding="utf-8", newline="")
        for stream in (stdout, stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        return cls(stdin, stdout, stderr, terminal, prog=prog)

    def write(self, text: str) -> None:
        """Write to stdout, as it comes."""
        self.stdout.write(printable(text) if self.terminal else text)
        self.stdout.flush()

    def write_json(self, value: Any) -> None:
        """Write one line of JSON to stdout."""
        line = (value if isinstance(value, bytes) else msgspec.json.encode(value)).decode()
        self.stdout.write((_inert(line) if self.terminal else line) + "\n")
        self.stdout.flush()

    def say(self, text: str) -> None:
        """Write one line to stderr, whoever reads it. A stderr that is closed is no reason to stop."""
        indent = text[: len(text) - len(text.lstrip(" "))]
        line = printable(indent + " ".join(text.split()))
        self._to_stderr(line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + " ...")

    def say_json(self, value: Any) -> None:
        """Write one line of JSON to stderr."""
        self._to_stderr(_inert(msgspec.json.encode(value).decode()))

    def _to_stderr(self, line: str) -> None:
        try:
            self.stderr.write(line + "\n")
            self.stderr.flush()
        except OSError:
            pass

    @property
    def columns(self) -> int:
        """Characters of a line on the terminal."""
        return self.width or shutil.get_terminal_size().columns

    def console(self) -> Console:
        """Rich on stdout, for rules and tables. Imported here because only some commands need it."""
        from rich.console import Console

        return Console(
            file=self.stdout, force_terminal=self.terminal or None, width=self.width, highlight=False, markup=False,
            emoji=False,
        )  # fmt: skip

    def abandon(self) -> None:
        """Nobody reads stdout any more: let what is buffered, and the interpreter's last flush, go nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stdout.fileno())
        os.close(nowhere)


def _open(stream: TextIO | None) -> TextIO:
    """The stream, or a hole in its place when the shell has closed it (`>&-`)."""
    return stream if stream is not None else Path(os.devnull).open("w", encoding="utf-8")


def _inert(line: str) -> str:
    """JSON with every character that could act on a terminal in JSON's own escape."""
    if printable(line) == line:
        return line
    return "".join(each if printable(each) == each else f"\\u{ord(each):04x}" for each in line)
