"""A writer at work on a line that does what the test says, on a loop whose time leaps to whatever is due next."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import msgspec

from millstream.calls import Call
from millstream.errors import RedisUnavailable
from millstream.keys import Keys
from worker.outbox import Outbox
from worker.writer import Writer

KEYS: Final = Keys()
LEASE: Final = 15.0


class LeapingLoop(asyncio.SelectorEventLoop):
    """Time stands still while there is something to do, and leaps to the next timer when there is not."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready:  # type: ignore[attr-defined]
            timers = [each.when() for each in self._scheduled if not each.cancelled()]  # type: ignore[attr-defined]
            self._now = max(self._now, min(timers, default=0.0))
        super()._run_once()  # type: ignore[misc]


def leaping(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=LeapingLoop) as runner:
        runner.run(main)


@dataclass(slots=True)
class Sent:
    """One job's part of a call, read from the script's arguments."""

    job_id: str
    first: int
    events: tuple[bytes, ...]
    kind: str
    extras: tuple[Any, ...]

    @property
    def size(self) -> int:
        return sum(map(len, self.events))

    @property
    def seqs(self) -> range:
        return range(self.first, self.first + len(self.events))


_EXTRAS: Final = {"": 0, "usage": 1, "end": 4}


def parts_of(call: Call[Any]) -> list[Sent]:
    """What an append call carries."""
    assert call.args[0] == LEASE * 1000
    rest = iter(call.args[2:])
    found = []
    for number in range(call.args[1]):
        state = call.keys[3 + 2 * number]
        _, first, count, kind = itertools.islice(rest, 4)
        events, extras = tuple(itertools.islice(rest, count)), tuple(itertools.islice(rest, _EXTRAS[kind]))
        found.append(Sent(KEYS.job_of(state), first, events, kind, extras))
    assert list(rest) == []
    return found


@dataclass
class Line:
    """Takes calls. `held` makes them wait for `answer`; else each is answered at once, or after `takes` seconds.

    `failures` are taken first, one a call: whether the server got the call before the line failed. `calls`, their
    `times` and the numbers of those that `failed` are what happened; `logs` is what the server has.
    """

    held: bool = False
    takes: float = 0.0
    failures: list[bool] = field(default_factory=list)
    replies: dict[str, tuple[str, int, str]] = field(default_factory=dict)
    calls: list[list[Sent]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    logs: dict[str, list[bytes]] = field(default_factory=dict)
    waiting: asyncio.Queue[asyncio.Future[None]] = field(default_factory=asyncio.Queue)

    async def run(self, call: Call[Any]) -> Any:
        loop = asyncio.get_running_loop()
        self.calls.append(parts_of(call))
        self.times.append(loop.time())
        if self.held:
            released: asyncio.Future[None] = loop.create_future()
            self.waiting.put_nowait(released)
            await released
        if self.takes:
            await asyncio.sleep(self.takes)
        if self.failures:
            self.failed.append(len(self.calls) - 1)
            if self.failures.pop(0):
                self._take(self.calls[-1])
            raise RedisUnavailable("away")
        return self._take(self.calls[-1])

    def _take(self, parts: Sequence[Sent]) -> list[tuple[str, int, str]]:
        return [self.replies.pop(part.job_id) if part.job_id in self.replies else self._append(part) for part in parts]

    def _append(self, part: Sent) -> tuple[str, int, str]:
        """As append.lua does for the newest holder."""
        log = self.logs.setdefault(part.job_id, [])
        if part.first > len(log) + 1:
            return "gap", len(log), ""
        new = part.events[len(log) + 1 - part.first :]
        log += new
        return ("ok" if new or not part.events else "duplicate"), len(log), ""

    async def answer(self) -> None:
        """Release the call in flight, once there is one, and let the writer begin the next."""
        (await self.waiting.get()).set_result(None)
        await turns()


async def turns(count: int = 10) -> None:
    """Let everything that can run do so."""
    for _ in range(count):
        await asyncio.sleep(0)


class Desk:
    """A writer at work on a scripted line, with outboxes."""

    def __init__(self, line: Line, flush: float | None = None) -> None:
        self.line, self.writer = line, Writer(line.run, KEYS, LEASE, flush)
        self.stops: list[tuple[str, str]] = []
        self._task = asyncio.create_task(self.writer.run())

    async def __aenter__(self) -> Self:
        await turns()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        assert self._task.cancelled(), self._task.exception()

    def outbox(self, job_id: str, seq: int = 0) -> Outbox:
        def stopped(code: str) -> None:
            self.stops.append((job_id, code))

        made = Outbox(job_id, KEYS.written(job_id), "t", 1, seq, stopped)
        self.line.logs[job_id] = [b"old"] * seq
        self.writer.add(made)
        return made

    def say(self, outbox: Outbox, text: str) -> None:
        outbox.text(0, text)
        self.writer.notify(outbox)


def text_of(events: Sequence[bytes]) -> str:
    """The content of compact chunk events."""
    items = [msgspec.json.decode(event) for event in events if not event.startswith(b"{")]
    return "".join(item if isinstance(item, str) else item[2] for item in items)


def flown(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test's coroutine on a loop whose time leaps."""

    def run() -> None:
        leaping(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run
