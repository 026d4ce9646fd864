"""The lines of this worker's upstreams: when their next job is due, and when it is this worker's turn to ask. Pure.

Who asks is told its turn with the answer, so that of many workers one comes for each ticket. Of lines that others began
a worker learns by its look, once a second; it has no turn there yet, and asks when the line is due.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

SPREAD: Final = 0.1
"""Seconds over which workers spread that learn of a line at the same time."""

LATEST: Final = 1.0
"""Seconds a turn is at most after its line is due, as `_meter.lua` has it: then a dead worker's is taken over."""

BROKEN: Final = 60.0
"""Seconds that a meter is left alone whose keys in Redis are not the limiter's."""


@dataclass(slots=True)
class _Line:
    """`due`: when its first may get a ticket; `ask`: when this worker asks; `turn`: when it was told to."""

    due: float
    ask: float
    turn: float


class Lines:
    """All of a process, by the name of their meter. Times are the loop's."""

    def __init__(self, spread: Callable[[], float] = lambda: random.uniform(0, SPREAD)) -> None:
        self._spread = spread
        self._lines: dict[str, _Line] = {}
        self._broken: dict[str, float] = {}  # until when they are left alone

    def __contains__(self, name: str) -> bool:
        return name in self._lines

    def looked(self, waiting: Iterable[tuple[str, float]]) -> None:
        """All lines there are, and when each is due. A turn in one is kept, unless the line has come forward since."""
        found: dict[str, _Line] = {}
        for name, due in waiting:
            line = self._lines.get(name)
            if line is None:
                ask = due + self._spread()
                line = _Line(due, ask, ask)
            line.due, line.ask = due, min(line.ask, due + LATEST + self._spread())
            found[name] = line
        self._lines = found

    def turn(self, name: str, now: float) -> float:
        """Seconds until this worker's turn; 0.0 when it has come, or there is none."""
        line = self._lines.get(name)
        return max(0.0, line.turn - now) if line is not None else 0.0

    def answered(self, name: str, now: float, again: float | None, turn: float) -> None:
        """An acquire was answered: seconds until the line is due (None: it is empty), and until this worker's turn."""
        if again is None:
            self._lines.pop(name, None)
        else:
            self._lines[name] = _Line(now + again, now + turn, now + turn)

    def moves(self, name: str, now: float, again: float) -> None:
        """Something came back that it may have waited for: it is worth asking in so many seconds, turn or not."""
        line = self._lines.get(name)
        at = now + again
        if line is None:
            self._lines[name] = _Line(at, at, at)
        else:
            line.due, line.ask = min(line.due, at), min(line.ask, at)

    def breaks(self, name: str, now: float) -> bool:
        """Its keys are not the limiter's. Whether that is news."""
        if self._broken.get(name, 0.0) > now:
            return False
        self._broken[name] = now + BROKEN
        return True

    def busy_for(self, name: str, now: float) -> float:
        """At least so many seconds nobody more in line gets a ticket; 0.0 where that is not known."""
        line = self._lines.get(name)
        return max(0.0, line.due - now) if line is not None else 0.0

    def next(self, now: float) -> float | None:
        """When to ask for the first of them; None while there is nothing to ask for."""
        return min((line.ask for name, line in self._lines.items() if self._whole(name, now)), default=None)

    def to_ask(self, now: float) -> list[str]:
        """Those to ask for now."""
        return [name for name, line in self._lines.items() if line.ask <= now and self._whole(name, now)]

    def _whole(self, name: str, now: float) -> bool:
        return self._broken.get(name, now) <= now
