"""A batch's output: lines added at its end, whole and durable, by one producer at a time; beside it the batch's id."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, Final

import msgspec
from msgspec import Struct

from millstream.batch.answer import Answer
from millstream.batch.ledger import Ledger, fingerprint
from millstream.errors import MillstreamError, SpecError

from .batch_ledger import Lines, kind_of

BESIDE: Final = ".batch"
ENDS_OF_LINES: Final = "\x85\u2028\u2029"
CANCELLED: Final = "batch_cancelled"
_ID: Final = re.compile(r"batch_(?:line|req)_[0-9a-f]{32}")


class OutputBusyError(MillstreamError):
    """Another producer writes to this output."""


class _Body(Struct):
    model: str = ""
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class _Response(Struct):
    status_code: int
    body: _Body


class Written(Struct):
    """What is read of a line of the output."""

    id: str
    custom_id: str | None = None
    response: _Response | None = None
    error: dict[str, Any] | None = None

    @property
    def code(self) -> str | None:
        """Why there is no answer, None if there is one."""
        if self.response and self.response.status_code < 400:
            return None
        error = self.error or (self.response.body.error if self.response else None) or {}
        return str(error.get("code") or "unknown")

    @property
    def kind(self) -> str:
        return "answered" if self.code is None else "cancelled" if self.code == CANCELLED else "failed"

    @property
    def refused(self) -> bool:
        """Whether it is about a line of the input that was not asked."""
        return self.id.startswith("batch_line_")


_decoder: Final = msgspec.json.Decoder(Written)


class _Beside(Struct):
    batch: str
    v: int = 1


class Output:
    """OUT and OUT.batch. The latter holds the batch's id, durable before the first job, and the lock."""

    def __init__(self, path: str) -> None:
        try:
            self.path = Path(path).resolve()  # through a link: the file itself is replaced when it is tidied
        except (OSError, RuntimeError):  # the latter until Python 3.13
            raise SpecError(f"--out {path}: its links lead in a circle; name a file that can be written") from None
        self._beside = self.path.with_name(self.path.name + BESIDE)
        self._file: BinaryIO | None = None
        self._lock = self._opened(path)
        try:
            self._take_lock()
            self.batch_id = self._known() or self._begin()
        except BaseException:
            os.close(self._lock)
            raise

    def _opened(self, named: str) -> int:
        try:
            found = self.path.stat() if self.path.exists() else None
            if found and not S_ISREG(found.st_mode):
                raise SpecError(f"--out {named}: found something that is no file; name one that can be read again")
            if found and found.st_size and not self._beside.exists():
                raise SpecError(
                    f"--out {named}: it is there, and no {self._beside.name} beside it says of which batch; name "
                    "another file, or move it away"
                )
            return os.open(self._beside, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise SpecError(f"--out {named}: {error.strerror or error}; name a file that can be written") from None

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputBusyError(
                f"{self.path} is being written by another producer; let it finish, or stop it with Ctrl-C first"
            ) from None

    def _known(self) -> str | None:
        held = os.pread(self._lock, 4096, 0)
        try:
            return msgspec.json.decode(held, type=_Beside).batch
        except msgspec.MsgspecError:
            if not self.path.exists() or not self.path.stat().st_size:
                return None  # nothing was submitted before that file was whole
        raise SpecError(
            f"{self._beside}: found something else than a batch's id; name another --out, or move both files away"
        )

    def _begin(self) -> str:
        beside = _Beside(secrets.token_hex(16))
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, msgspec.json.encode(beside) + b"\n", 0)
        os.fsync(self._lock)
        _sync_folder(self._beside)
        return beside.batch

    # Before -------------------------------------------------------------------------------------------------------

    def read(self, lines: Lines, saw: Callable[[Written], None], *, again: bool = False) -> int:
        """Note every line, and cut off a torn one; the bytes that were cut. `again`: failed rows have none."""
        with self.path.open("a+b"):
            pass
        _sync_folder(self.path)
        end = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                found = _parsed(line)
                if found is None:
                    lines.stale += 1
                elif found.refused:
                    lines.written_refused(found.id)
                elif again and found.kind != "answered":
                    lines.void(found.custom_id or "")
                    continue
                else:
                    lines.written(found.custom_id or "", found.id.removeprefix("batch_req_"), found.kind)
                if found is not None:
                    saw(found)
            torn = os.fstat(file.fileno()).st_size - end
        self._file = self.path.open("r+b")
        if torn:
            self._file.truncate(end)
        self._file.seek(end)
        return torn

    # Meanwhile ----------------------------------------------------------------------------------------------------

    def write(self, answers: Iterable[Answer], lines: Lines) -> None:
        """Add lines; when this returns they outlast a power failure."""
        assert self._file is not None
        encoded = []
        for answer in answers:
            encoded.append(_one_line(msgspec.json.encode(answer.line())))
            if answer.status != "refused":
                lines.written(answer.custom_id or "", answer.job_id, kind_of(answer))
        try:
            self._file.write(b"\n".join(encoded) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:  # what is open goes on, and its answers wait in Redis
            words = f"{self.path}: {error.strerror}; when that is mended, the same command goes on"
            raise OSError(error.errno, words) from None

    # After --------------------------------------------------------------------------------------------------------

    def tidy(self, lines: Lines, *, whole: bool) -> None:
        """Leave out lines that are void: of each row the last one stays; with `whole`, no refusal of a former input."""
        if not lines.stale and not (whole and lines.unmet_refused):
            return
        last = Ledger()
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if found := _parsed(line):
                    last.put(_name(found), number)
        fresh = self.path.with_name(self.path.name + ".tidy")
        with self.path.open("rb") as file, fresh.open("wb") as copy:
            shutil.copymode(self.path, fresh)  # before anybody can read what is in it
            for number, line in enumerate(file, 1):
                found = _parsed(line)
                if found is None or last.get(_name(found)) != number:
                    continue
                if not (whole and found.refused and not lines.keeps_refused(found.id)):
                    copy.write(line)
            copy.flush()
            os.fsync(copy.fileno())
        fresh.replace(self.path)
        _sync_folder(self.path)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what counts was written before
                self._file.close()
        os.close(self._lock)


def _one_line(encoded: bytes) -> bytes:
    """JSON without the characters that Python's `splitlines` and others take for the end of a line."""
    for character in ENDS_OF_LINES:
        if (found := character.encode()) in encoded:
            encoded = encoded.replace(found, f"\\u{ord(character):04x}".encode())
    return encoded


def _parsed(line: bytes) -> Written | None:
    try:
        found = _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return found if _ID.fullmatch(found.id) else None


def _name(found: Written) -> int:
    return fingerprint(found.id if found.refused else found.custom_id or "")


def _sync_folder(path: Path) -> None:
    """Make a file's name durable."""
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
