"""What no script call may ever do to a job, looked at after each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from millstream.events import TERMINAL_STATUSES

from .server import Server

_CLOSED = frozenset(status.encode() for status in TERMINAL_STATUSES)


class _State(NamedTuple):
    status: bytes
    seq: int
    attempt: int
    holder: bytes
    lease: int


class Watch:
    """Remembers each job's state and compares."""

    def __init__(self, server: Server, complain: Callable[[str], None]) -> None:
        self._server, self._complain = server, complain
        self._states: dict[bytes, _State] = {}
        self.taken: dict[str, list[float]] = {}
        """By job, when it was ended or taken while somebody held it."""

    def forget(self) -> None:
        """The server lost data: what was is no more."""
        self._states.clear()

    def look(self, fields: list[bytes]) -> None:
        """After a script call."""
        for key in fields[3 : 3 + int(fields[2])]:
            if key.endswith(b":state"):
                self._look_at(key)

    def _look_at(self, key: bytes) -> None:
        item = self._server.db.get(key)
        if item is None:
            self._states.pop(key, None)
            return
        field = item.value._values.get
        now = _State(
            field(b"status"), int(field(b"seq")), int(field(b"attempt")), field(b"holder", b""),
            int(field(b"lease", b"0")),
        )  # fmt: skip
        before = self._states.get(key)
        self._states[key] = now
        if before is not None and before != now:
            self._compare(key.decode(), before, now)

    def _compare(self, key: str, before: _State, now: _State) -> None:
        if now.seq < before.seq or now.attempt < before.attempt:
            self._complain(f"{key} went back: {before} became {now}")
        if before.status in _CLOSED:
            self._complain(f"{key} had ended: {before} became {now}")
        if not before.holder or _token(now.holder) == _token(before.holder):
            return
        self.taken.setdefault(key.split("{")[1].split("}", maxsplit=1)[0], []).append(self._server.loop.time())
        left = before.lease - self._server.loop.wall() * 1000
        if now.status == b"in_progress" and left > 1:
            self._complain(f"{key} was taken with {left:.0f} ms of its lease left: {before} became {now}")


def _token(holder: bytes) -> bytes:
    return holder.partition(b":")[0]
