"""A batch's input: the lines of a file or pipe, read as they are wanted, and the rows that are still to be done."""

from __future__ import annotations

import os
import random
import select
from collections import deque
from pathlib import Path
from stat import S_ISREG
from typing import IO, Final

from millstream.batch.answer import Answer
from millstream.batch.row import Reader, Row
from millstream.batch.source import Taken
from millstream.errors import SpecError

from .batch_ledger import Lines
from .standard import Standard

BLOCK: Final = 256 * 1024
MAX_LINE: Final = 16 * 1024 * 1024
"""Longest line. A spec has at most 4 MB, and JSON's escapes may blow it up to six times that in no real file."""
AT_ONCE: Final = 2000
"""Lines looked at in one go: what is done already is skipped in many short turns, so that nobody waits for long."""
BOM: Final = b"\xef\xbb\xbf"


class Input:
    """Lines with their numbers, without ever waiting: a pipe may be slow, and open rows must not wait for it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._descriptor = file.fileno()
        found = os.fstat(self._descriptor)
        self.size = found.st_size if S_ISREG(found.st_mode) else None
        """Bytes, None for a pipe."""
        self.taken = 0
        """Bytes of the lines that were given."""
        self.number = 0
        """Lines so far, empty ones counted too, as an editor does."""
        self.ended = False
        self.more = True
        """Whether the last look for a line found one."""
        self._waiting: deque[bytes] = deque()
        self._rest = bytearray()
        self._too_long = False

    def next(self) -> tuple[int, bytes | None] | None:
        """The next line that is not empty; (its number, None) for one that is too long; None if none is there now."""
        while True:
            while not self._waiting:
                self.more = not self.ended and self._read()
                if not self.more:
                    return None
            line = self._waiting.popleft()
            self.number += 1
            self.taken += len(line) + 1
            if line is _TOO_LONG:
                return self.number, None
            if self.number == 1 and line.startswith(BOM):
                line = line[len(BOM) :]
            if line.strip():
                return self.number, line

    def _read(self) -> bool:
        """Read what is there; False if that is nothing."""
        if self.size is None and not select.select([self._descriptor], [], [], 0)[0]:
            return False
        try:
            block = os.read(self._descriptor, BLOCK)
        except OSError as error:
            raise SpecError(f"the input cannot be read ({error.strerror or error}); check the file") from None
        self.ended = not block
        lines = block.split(b"\n")
        if len(lines) > 1 or self.ended:
            first = bytes(self._rest + lines[0])
            whole = [first, *lines[1:-1]] if len(lines) > 1 else [first] if first else []
            if self._too_long and whole:
                whole[0] = _TOO_LONG
            self._waiting.extend(whole)
            self._rest, self._too_long = bytearray(lines[-1] if len(lines) > 1 else b""), False
        else:
            self._rest += block
        if len(self._rest) > MAX_LINE:
            self._rest, self._too_long = bytearray(b"x"), True
        return True

    def wait(self) -> None:
        """Until something is there: for those who have nothing else to do."""
        select.select([self._descriptor], [], [])

    def is_same(self, path: str) -> bool:
        """Whether that is this very file."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), Path(path).stat())
        except OSError:
            return False

    def close(self) -> None:
        self._file.close()


_TOO_LONG: Final = bytes(bytearray(b"too long"))  # known by identity: nothing read from a file is this object


def opened(path: str, standard: Standard) -> Input:
    """The input. Raises SpecError."""
    if path != "-":
        try:
            return Input(Path(path).open("rb", buffering=0))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SpecError(f"{path}: cannot be read ({reason}); check the name") from None
    if standard.stdin is None:
        raise SpecError("stdin is closed; name the input file, or pipe the rows in")
    if standard.stdin.isatty():
        standard.say("reading rows from the terminal; Ctrl-D on an empty line ends it")
    return Input(os.fdopen(os.dup(standard.stdin.fileno()), "rb", buffering=0))


class Rows:
    """The rows of an input that have no line in the output yet. `limit`: only the first so many lines of the input.

    `sample`: only so many of them, drawn at random, always the same ones for the same batch and input.
    """

    def __init__(
        self, source: Input, reader: Reader, lines: Lines, *, limit: int | None = None, sample: int | None = None
    ) -> None:
        self.source, self._reader, self._lines = source, reader, lines
        self.limit, self._sample = limit, sample
        self.rows = 0
        """Lines met so far."""
        self.dry = False
        self._drawn: deque[tuple[int, bytes | None]] = deque()
        self._reservoir: list[tuple[int, bytes | None]] = []
        self._met = 0  # lines that the sample was drawn from
        self._random = random.Random(reader.batch_id)

    @property
    def whole(self) -> bool:
        """Whether every line of the input was met."""
        return self.dry and self.limit is None and self._sample is None

    def take(self, most: int) -> Taken:
        """At most so many rows that are to be done."""
        rows: list[Row | Answer] = []
        for _ in range(AT_ONCE):
            if len(rows) == most:
                return Taken(rows)
            found = self._next()
            if found is None:
                return Taken(rows, dry=self.dry, idle=not self.dry and not self.source.more)
            self.rows += 1
            row = self._read(*found)
            if row is not None:
                rows.append(row)
        return Taken(rows)

    def _read(self, number: int, line: bytes | None) -> Row | Answer | None:
        if line is None:
            what = f"it is longer than {MAX_LINE:,} bytes"
            row: Row | Answer | None = self._reader.refusal(b"", number, "invalid_json_line", what)
        else:
            row = self._reader.read(line, number, self._lines.met)
        if isinstance(row, Answer) and self._lines.met_refused(row):
            return None
        return row

    def _next(self) -> tuple[int, bytes | None] | None:
        if self._sample is None:
            if self.limit is not None and self.rows >= self.limit:
                self.dry = True
                return None
            found = self.source.next()
            self.dry = found is None and self.source.ended
            return found
        if not self._drawn and not self._draw():
            return None
        self.dry = not self._drawn
        return self._drawn.popleft() if self._drawn else None

    def _draw(self) -> bool:
        """Read on to the end of the input and keep a sample (algorithm R); whether it is ready."""
        assert self._sample is not None
        for _ in range(AT_ONCE):
            enough = self.limit is not None and self._met >= self.limit
            found = None if enough else self.source.next()
            if found is None:
                if enough or self.source.ended:
                    self._drawn.extend(sorted(self._reservoir, key=lambda each: each[0]))
                    self._reservoir.clear()
                    return True
                return False
            self._met += 1
            if len(self._reservoir) < self._sample:
                self._reservoir.append(found)
            elif (slot := self._random.randrange(self._met)) < self._sample:
                self._reservoir[slot] = found
        return False
