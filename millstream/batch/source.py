"""Where the rows of a batch come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from .answer import Answer
from .ledger import Ledger, fingerprint
from .row import Reader, Row


@dataclass(frozen=True, slots=True)
class Taken:
    """Some rows, and lines that are none. `dry`: no more will come; `idle`: none is there now, but may be later."""

    rows: list[Row | Answer]
    dry: bool = False
    idle: bool = False


class Source(Protocol):
    """Gives rows as they are wanted."""

    def take(self, most: int) -> Taken:
        """At most so many, and none rather than waiting for one."""


class Objects:
    """Rows from an iterable of lines or of what lines hold; it is asked for no more than there is room for."""

    def __init__(self, rows: Iterable[Mapping[str, Any] | str | bytes], reader: Reader) -> None:
        self._rows = enumerate(rows, 1)
        self._reader = reader
        self._seen = Ledger()

    def take(self, most: int) -> Taken:
        """The next rows. The iterable may block, and then nothing else happens."""
        taken = list(islice(self._rows, most))
        return Taken([self.read(number, given) for number, given in taken], dry=len(taken) < most)

    def read(self, number: int, given: Mapping[str, Any] | str | bytes) -> Row | Answer:
        """One row."""
        row = self._reader.read_object(given, number)
        if isinstance(row, Row):
            name = fingerprint(row.custom_id)
            if self._seen.get(name):
                return self._reader.duplicate(row.content, number, row.custom_id)
            self._seen.put(name, 1)
        return row
