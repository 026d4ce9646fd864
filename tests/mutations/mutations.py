"""What must not be missing, each taken out in turn: a script's text as it is loaded, or a method of the product.

Nothing is written to a file. Each is undone when its context ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from millstream import calls, scripts
from millstream.reading import Following
from worker.outbox import Outbox
from worker.sweeper import Sweeper
from worker.writer import Writer

Mutation = Callable[[], Any]


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
    """As `Writer._send`, but that a call which is made again takes along what has come meanwhile."""
    run = self._run
    tries = 0

    async def ask(_call: Any) -> Any:
        nonlocal tries
        tries += 1
        for outbox in self._outboxes if tries > 1 else ():
            frame = outbox._frame
            if frame is not None and any(frame is each for each in frames) and outbox.waiting:
                outbox._close_text()
                frame.events = [*frame.events, *outbox._waiting]
                frame.ending = outbox._ending
                outbox._waiting.clear()
        return await run(calls.append(self._keys, self._lease, frames))

    async def send() -> Any:
        with patch.object(self, "_run", ask):
            return await _SEND(self, frames)

    return send()


_SEND = Writer._send


def _forgetful(self: Outbox, frame: Any, seq: int) -> None:
    """As `Outbox._go_back`, but that what was acknowledged and lost is not sent again."""
    self.seq = seq
    self._waiting.extendleft(reversed(frame.events))


MUTATIONS: dict[str, Mutation] = {
    "the fence": lambda: script("append", ("if s[1] ~= holder then", "if not s[1] then")),
    "the check for duplicates": lambda: script(
        "append",
        ("if last <= seq then", "if count == 0 then"),
        ("local start, stop = from + seq + 1 - first, from + count - 1", "local start, stop = from, from + count - 1"),
    ),
    "reading after subscribing": lambda: patch.object(Following, "reconnected", lambda *_: None),
    "the sweep": lambda: patch.object(Sweeper, "_sweep", _nothing),
    "busy": lambda: script("claim", ("if left > 0 then", "if false then")),
    "the frozen frame": lambda: patch.object(Writer, "_send", _merging),
    "closed, for a cancel": lambda: script("cancel", ("if CLOSED[s[1]] then", "if false then")),
    "closed, for a claim": lambda: script("claim", ("if CLOSED[status] then", "if false then")),
    "the heartbeat's renewal": lambda: script("append", ("if kind ~= 'end' and", "if kind ~= 'end' and count > 0 and")),
    "sending again what was lost": lambda: patch.object(Outbox, "_go_back", _forgetful),
}
"""By the name of what is missing."""
