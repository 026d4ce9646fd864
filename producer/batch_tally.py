"""What a batch has come to: rows by what became of them, reasons, tokens, money, and how fast it goes. Pure."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from millstream.batch.answer import Answer

from .batch_ledger import kind_of
from .prices import Prices, count

SPAN: Final = 30.0
"""Seconds over which speed is measured."""


class Tally:
    """Counts what was written. `prices` None: nothing is said of money."""

    def __init__(self, prices: Prices | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._prices, self._clock = prices, clock
        self.rows: Counter[str] = Counter()
        """Rows that this run wrote, by kind."""
        self.reasons: Counter[str] = Counter()
        """Why rows have no answer, by code; those of earlier runs too."""
        self.tokens_in = self.tokens_out = 0
        self.money = 0.0
        self.unpriced: set[str] = set()
        self.began = clock()
        self._marks: deque[tuple[float, int, int]] = deque([(self.began, 0, 0)])
        self._spent = 0  # tokens of this run

    def saw(self, code: str | None, model: str, usage: Mapping[str, Any] | None) -> None:
        """A line of an earlier run."""
        if code is not None:
            self.reasons[code] += 1
        self._add(model, usage)

    def take(self, answer: Answer) -> None:
        """An answer that is written now."""
        self.rows[kind_of(answer)] += 1
        if not answer.answered:
            self.reasons[str((answer.error or {}).get("code", "unknown"))] += 1
        before = self.tokens_in + self.tokens_out
        self._add(str((answer.completion or {}).get("model", "")), answer.usage)
        self._spent += self.tokens_in + self.tokens_out - before

    def _add(self, model: str, usage: Mapping[str, Any] | None) -> None:
        if not usage:
            return
        self.tokens_in += count(usage, "prompt_tokens")
        self.tokens_out += count(usage, "completion_tokens")
        if self._prices is not None:
            price = self._prices.price(model)
            if price is None:
                self.unpriced.add(model)
            else:
                self.money += price.of(usage)

    @property
    def written(self) -> int:
        """Rows that this run wrote."""
        return sum(self.rows.values())

    def speed(self) -> tuple[float, float]:
        """Rows and tokens a second, over the last half minute."""
        now = self._clock()
        self._marks.append((now, self.written, self._spent))
        while len(self._marks) > 2 and self._marks[1][0] <= now - SPAN:
            self._marks.popleft()
        at, rows, tokens = self._marks[0]
        passed = now - at
        return ((self.written - rows) / passed, (self._spent - tokens) / passed) if passed > 0 else (0.0, 0.0)

    @property
    def currency(self) -> str | None:
        """What money is counted in; None without prices."""
        return self._prices.currency if self._prices else None

    @property
    def elapsed(self) -> float:
        """Seconds of this run."""
        return self._clock() - self.began
