"""What must not be missing, each taken out in turn: a script's text as it is loaded, or a method of the product.

Nothing is written to a file. Each is undone when its context ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import msgspec

from millstream import calls, scripts
from millstream.events import compact_text
from millstream.reading import Following
from worker.outbox import Outbox
from worker.sweeper import Sweeper
from worker.writer import Writer


@contextmanager
def script(name: str, *changes: tuple[str, str]) -> Iterator[None]:
    """A script with pieces of its text replaced; each must be there exactly once."""
    read = scripts._read

    def changed(wanted: str) -> str:
        text = read(wanted)
        if wanted == name:
            for old, new in changes:
                assert text.count(old) == 1, f"{name}.lua has {old!r} {text.count(old)} times"
                text = text.replace(old, new)
        return text

    with patch.object(scripts, "_read", changed):
        scripts.load.cache_clear()
        try:
            yield
        finally:
            scripts.load.cache_clear()


async def _nothing(*_: Any) -> None:
    pass


def _merging(self: Writer, frames: Sequence[calls.Frame]) -> Any:
    """As `Writer._send`, but that the last text of a call which is made again grows by what has come meanwhile."""
    run = self._run
    tries = 0

    async def ask(_call: Any) -> Any:
        nonlocal tries
        tries += 1
        for outbox in self._outboxes if tries > 1 else ():
            frame = outbox._frame
            if frame is not None and frame.events and frame.ending is None and any(frame is each for each in frames):
                outbox._close_text()
                frame.events = list(frame.events)
                while outbox._waiting and (grown := _grown(frame.events[-1], outbox._waiting[0])):
                    frame.events[-1] = grown
                    outbox._waiting.popleft()
        return await run(calls.append(self._keys, self._lease, frames))

    async def send() -> Any:
        with patch.object(self, "_run", ask):
            return await _SEND(self, frames)

    return send()


_SEND = Writer._send


def _grown(event: bytes, more: bytes) -> bytes | None:
    """Two texts as one event; None where one of them is something else."""
    (n, text), (m, rest) = _text(event), _text(more)
    return compact_text(text + rest, 0, n + m) if n and m else None


def _text(event: bytes) -> tuple[int, str]:
    item = msgspec.json.decode(event)
    return (1, item) if isinstance(item, str) else (item[1], item[2]) if isinstance(item, list) else (0, "")


def _forgetful(self: Outbox, frame: Any, seq: int) -> None:
    """As `Outbox._go_back`, but that what was acknowledged and lost is not sent again."""
    self.seq = seq
    self._waiting.extendleft(reversed(frame.events))


@dataclass(frozen=True)
class Mutation:
    """What is missing, how it is taken out, and the kinds of actions that call for it (None: any; []: calm weather)."""

    missing: str
    apply: Callable[[], AbstractContextManager[Any]]
    only: Sequence[str] | None = None


MUTATIONS = (
    Mutation("the fence", lambda: script("append", ("if s[1] ~= holder then", "if not s[1] then")), ["stop"]),
    Mutation(
        "the check for duplicates",
        lambda: script(
            "append",
            ("if last <= seq then", "if count == 0 then"),
            ("local start, stop = from + seq + 1 - first,", "local start, stop = from,"),
        ),
    ),
    Mutation("reading after subscribing", lambda: patch.object(Following, "reconnected", lambda *_: None), []),
    Mutation("the sweep", lambda: patch.object(Sweeper, "_sweep", _nothing), ["kill"]),
    Mutation("busy", lambda: script("claim", ("if left > 0 then", "if false then")), ["deliver again"]),
    Mutation("the frozen frame", lambda: patch.object(Writer, "_send", _merging)),
    Mutation("closed, for a cancel", lambda: script("cancel", ("if CLOSED[s[1]] then", "if false then")), []),
    Mutation(
        "closed, for a claim",
        lambda: script("claim", ("if CLOSED[status] then", "if false then")),
        ["deliver again"],
    ),
    Mutation(
        "the heartbeat's renewal",
        lambda: script("append", ("if kind ~= 'end' and", "if kind ~= 'end' and count > 0 and")),
        [],
    ),
    Mutation("sending again what was lost", lambda: patch.object(Outbox, "_go_back", _forgetful), ["lose the tail"]),
)
