"""Where the rows of a batch come from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Iterable, Mapping
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


Given = Mapping[str, Any] | str | bytes
"""A row as a program gives it: a line of the input, or what such a line holds."""
GivenRows = Iterable[Given]
GivenAsyncRows = AsyncIterable[Given] | Iterable[Given]


class Source(Protocol):
    """Gives rows as they are wanted."""

    def take(self, most: int) -> Taken:
        """At most so many, and none rather than waiting for one."""


class AsyncSource(Protocol):
    """The same for asyncio."""

    async def take(self, most: int) -> Taken:
        """At most so many, and none rather than waiting for one."""


class Objects:
    """Rows from an iterable of lines or of what lines hold; it is asked for no more than there is room for."""

    def __init__(self, rows: GivenRows, reader: Reader) -> None:
        self._rows = iter(rows)
        self._reading = _Reading(reader)

    def take(self, most: int) -> Taken:
        """The next rows. The iterable may block, and then nothing else happens."""
        given = list(islice(self._rows, most))
        return Taken([self._reading.next(each) for each in given], dry=len(given) < most)


class AsyncObjects:
    """The same from an asynchronous iterable, which may take its time, or from a plain one."""

    def __init__(self, rows: GivenAsyncRows, reader: Reader) -> None:
        self._plain = Objects(rows, reader) if isinstance(rows, Iterable) else None
        self._rows = None if isinstance(rows, Iterable) else aiter(rows)
        self._reading = _Reading(reader)
        self._next: asyncio.Future[Given] | None = None

    async def take(self, most: int) -> Taken:
        """The next rows that are there."""
        if self._plain is not None or self._rows is None:
            return self._plain.take(most) if self._plain else Taken([], dry=True)
        rows: list[Row | Answer] = []
        while len(rows) < most:
            self._next = self._next or asyncio.ensure_future(anext(self._rows))
            await asyncio.wait({self._next}, timeout=0)
            if not self._next.done():
                return Taken(rows, idle=True)
            asked, self._next = self._next, None
            if isinstance(asked.exception(), StopAsyncIteration):
                return Taken(rows, dry=True)
            rows.append(self._reading.next(asked.result()))
        return Taken(rows)

    async def aclose(self) -> None:
        """Wait for no row any more."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.wait({self._next})


class _Reading:
    """Numbers what is given, and refuses what has the custom_id of an earlier row."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self._seen, self._number = reader, Ledger(), 0

    def next(self, given: Given) -> Row | Answer:
        self._number += 1
        row = self._reader.read_object(given, self._number)
        if isinstance(row, Row):
            name = fingerprint(row.custom_id)
            if self._seen.get(name):
                return self._reader.duplicate(row.content, self._number, row.custom_id)
            self._seen.put(name, 1)
        return row
