"""The clocks of a stream: first token, between contents, in all. Measured by the loop, not by the socket.

One ticker looks at all streams, since a timer set anew for each chunk would cost more than the chunk. The clocks stand
still while *we* pause the reading because Redis is slow: that time is not the upstream's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

TICK: Final = 0.1
"""Seconds between looks; a clock strikes at most this late."""

HELD_UP: Final = 0.5
"""Seconds: a look that comes later than this finds a process that stood still, stopped or starved, not an upstream."""

TAIL: Final = 5.0
"""Seconds that a finished answer is waited for its usage and the end of its stream."""


class Clock:
    """One request's clocks. `strike(code)` is called once, when the first of them runs out."""

    __slots__ = ("_first", "_idle", "_loop", "_paused_at", "_seen", "_started", "_total", "strike", "struck")

    def __init__(self, first: float, idle: float, total: float, strike: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._first, self._idle, self._total = first, idle, total
        self._started = self._loop.time()
        self._seen: float | None = None
        self._paused_at: float | None = None
        self.strike = strike
        self.struck: str | None = None

    def content(self) -> float:
        """Content has come; returns the time."""
        self._seen = self._loop.time()
        return self._seen

    def tail(self) -> None:
        """Every choice has ended; what may still come comes soon."""
        self._seen = self._loop.time()
        self._idle = min(self._idle, TAIL)

    def pause(self) -> None:
        """We stop reading."""
        self._paused_at = self._loop.time()

    def resume(self) -> None:
        """We read again."""
        if self._paused_at is not None:
            paused = self._loop.time() - self._paused_at
            self._paused_at = None
            self._started += paused
            if self._seen is not None:
                self._seen += paused

    def excuse(self, late: float) -> None:
        """For so many seconds nobody looked, and nobody read: what came meanwhile is still to be seen."""
        if self._paused_at is None:
            self._started += late
            if self._seen is not None:
                self._seen = min(self._seen + late, self._loop.time())

    @property
    def spent(self) -> float:
        """Seconds since the request, pauses of ours not counted."""
        return self._loop.time() - self._started

    def look(self, now: float) -> str | None:
        """The name of the clock that has run out, if one has."""
        if self._paused_at is not None:
            return None
        if now - self._started > self._total:
            return "total_timeout"
        if self._seen is None:
            return "first_token_timeout" if now - self._started > self._first else None
        return "idle_timeout" if now - self._seen > self._idle else None


class Ticker:
    """Looks at every clock now and then."""

    def __init__(self) -> None:
        self._clocks: set[Clock] = set()

    def add(self, clock: Clock) -> None:
        self._clocks.add(clock)

    def remove(self, clock: Clock) -> None:
        self._clocks.discard(clock)

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK
            await asyncio.sleep(TICK)
            now = loop.time()
            if now - due > HELD_UP:
                for clock in self._clocks:
                    clock.excuse(now - due)
            for clock in [each for each in self._clocks if each.struck is None]:
                if code := clock.look(now):
                    clock.struck = code
                    clock.strike()
