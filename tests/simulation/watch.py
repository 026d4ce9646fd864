"""What no script call may ever do to a job, looked at after each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
        get = item.value._values.get
        now = _State(get(b"status"), int(get(b"seq")), int(get(b"attempt")), get(b"holder", b""), int(get(b"lease", b"0")))
        before = self._states.get(key)
        self._states[key] = now
        if before is None or before == now:
            return
        if now.seq < before.seq or now.attempt < before.attempt:
            self._complain(f"{key!r} went back: {before} became {now}")
        if before.status in _CLOSED:
            self._complain(f"{key!r} had ended: {before} became {now}")
        time = self._server.loop.wall() * 1000
        taken = _token(now.holder) not in (b"", _token(before.holder)) and before.status == b"in_progress"
        if taken and before.lease > time + 1:
            self._complain(f"{key!r} was taken with {before.lease - time:.0f} ms of its lease left: {before} became {now}")


def _token(holder: Any) -> Any:
    return holder.partition(b":")[0]
