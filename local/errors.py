"""Everything this room raises, as one tree.

    LocalError
    ├── Missing        a program or a wheel that is needed is not installed
    ├── PortTaken      somebody else listens where a server was asked to
    ├── FolderTaken    another `local up` keeps its data in this folder
    └── PartFailed     a part ended, or was not ready in time; the message ends with the last lines of its log

Every first line says what was found and what to do; it is all a person has to read.
"""

from __future__ import annotations


class LocalError(Exception):
    """Base of every error raised by this room."""


class Missing(LocalError):
    """Something that has to be installed is not."""


class PortTaken(LocalError):
    """The port that was asked for cannot be listened on."""


class FolderTaken(LocalError):
    """The data folder belongs to another process."""


class PartFailed(LocalError):
    """A part cannot run."""

    def __init__(self, what: str, log_tail: str = "") -> None:
        """`what` is one line; `log_tail` any number, shown indented below it."""
        shown = "".join(f"\n  | {line}" for line in log_tail.splitlines())
        super().__init__(what + shown)
