"""What a batch shows while it runs, and at its end: one line for people, JSON lines for programs, both on stderr."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from millstream.batch.course import Course
from millstream.terminal import printable

from .batch_input import Rows
from .batch_ledger import KINDS, Lines
from .batch_tally import Tally
from .standard import Standard

REFRESH: Final = 0.2
"""Seconds between two looks of the line on a terminal."""
REPORT: Final = 5.0
"""Seconds between two JSON lines."""
WIDTH: Final = 100


class Progress:
    """Draws or reports now and then. `as_json`: JSON lines even on a terminal."""

    def __init__(
        self, standard: Standard, course: Course, rows: Rows, lines: Lines, tally: Tally, *, as_json: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._standard, self._course, self._rows, self._lines, self._tally = standard, course, rows, lines, tally
        self._json = as_json or not standard.stderr.isatty()
        self._clock = clock
        self._next = clock() + (REPORT if self._json else REFRESH)
        self._drawn = False

    def turn(self) -> None:
        """Show how it stands, if it is time."""
        if self._clock() < self._next:
            return
        self._next = self._clock() + (REPORT if self._json else REFRESH)
        if self._json:
            self._write_json("progress", self.state())
        else:
            self._draw(in_words(self.state()))

    def say(self, text: str) -> None:
        """A line of its own."""
        self._wipe()
        self._standard.say(text)

    def end(self) -> None:
        """The summary."""
        state = self.state() | {"reasons": dict(self._tally.reasons.most_common())}
        if self._json:
            self._write_json("summary", state)
            return
        self._wipe()
        for line in summary(state):
            self._standard.say(line)

    def state(self) -> dict[str, Any]:
        """All figures. Rows are those of the input; tokens and money are those of everything in the output."""
        tally, before = self._tally, self._lines.before
        statuses, waits = self._course.window.counts()
        rows, tokens = tally.speed()
        state: dict[str, Any] = {
            "answered": before["answered"] + tally.rows["answered"],
            "failed": before["failed"] + tally.rows["failed"],
            "cancelled": before["cancelled"] + tally.rows["cancelled"],
            "before": sum(before.values()),
            "open": self._course.window.running,
            "in_progress": statuses["in_progress"],
            "queued": statuses["queued"],
            "waiting": dict(waits),
            "rows": self._total(),
            "rows_per_second": round(rows, 2),
            "tokens_per_second": round(tokens, 1),
            "prompt_tokens": tally.tokens_in,
            "completion_tokens": tally.tokens_out,
            "elapsed": round(tally.elapsed, 1),
        }
        left = None if state["rows"] is None else max(0, state["rows"] - before.total() - tally.written)
        state["seconds_left"] = round(left / rows) if left is not None and rows > 0 else None
        if tally.currency:
            state |= {"cost": round(tally.money, 6), "currency": tally.currency, "unpriced": sorted(tally.unpriced)}
        if self._course.trouble:
            state["trouble"] = self._course.trouble
        if self._course.stopped:
            state["stopping"] = True
        return state

    def _total(self) -> int | None:
        """Rows of the input: counted, else estimated from its size; None for a pipe."""
        rows, source = self._rows, self._rows.source
        if rows.dry:
            return rows.rows
        if source.size is None or not source.taken:
            return rows.limit
        estimate = max(rows.rows, round(rows.rows * source.size / source.taken))
        return estimate if rows.limit is None else min(rows.limit, estimate)

    def _write_json(self, event: str, state: Mapping[str, Any]) -> None:
        self._standard.say_json({"event": event, **state})

    def _draw(self, line: str) -> None:
        width = self._standard.width or shutil.get_terminal_size((WIDTH, 24)).columns
        text = printable(" ".join(line.split()))
        self._standard.stderr.write("\r\x1b[K" + (text if len(text) < width else text[: width - 2] + "…"))
        self._standard.stderr.flush()
        self._drawn = True

    def _wipe(self) -> None:
        if self._drawn:
            self._standard.stderr.write("\r\x1b[K")
            self._drawn = False


def in_words(state: Mapping[str, Any]) -> str:
    """How it stands, the most wanted first, since a narrow terminal cuts the end off."""
    total = "" if state["rows"] is None else f" of {state['rows']:,}"
    done = state["answered"] + state["failed"] + state["cancelled"]
    parts = [f"{done:,}{total} rows", f"{state['failed']:,} failed"]
    if state["cancelled"]:
        parts.append(f"{state['cancelled']:,} cancelled")
    waits = ", ".join(f"{count:,} wait for {what}" for what, count in state["waiting"].items())
    parts.append(f"{state['open']:,} open" + (f" ({waits})" if waits else ""))
    parts += [f"{state['rows_per_second']:,.1f} rows/s", f"{state['tokens_per_second']:,.0f} tokens/s"]
    if state["seconds_left"] is not None:
        parts.append(f"{duration(state['seconds_left'])} left")
    parts.append(f"{state['prompt_tokens'] + state['completion_tokens']:,} tokens")
    if "cost" in state:
        parts.append(money(state))
    line = " · ".join(parts)
    if state.get("stopping"):
        line = "stopping · " + line
    return f"{state['trouble']} · {line}" if "trouble" in state else line


def summary(state: Mapping[str, Any]) -> list[str]:
    """What is said at the end."""
    earlier = f" ({state['before']:,} of them before this run)" if state["before"] else ""
    done = state["answered"] + state["failed"] + state["cancelled"]
    total = "" if state["rows"] in (None, done) else f" of {state['rows']:,}"
    speed = (done - state["before"]) / state["elapsed"] if state["elapsed"] else 0.0
    counted = ", ".join(f"{state[kind]:,} {kind}" for kind in KINDS if kind)
    lines = [
        f"{done:,}{total} rows{earlier}: {counted}",
        f"{duration(state['elapsed'])}, {speed:,.1f} rows/s; {state['prompt_tokens']:,} prompt tokens, "
        f"{state['completion_tokens']:,} completion tokens" + (f", {money(state)}" if "cost" in state else ""),
    ]
    lines += [f"  {count:,} x {code}" for code, count in state["reasons"].items()]
    if state.get("unpriced"):
        lines.append(f"no price for: {', '.join(state['unpriced'])}")
    return lines


def money(state: Mapping[str, Any]) -> str:
    """An amount with its currency; small ones with more digits."""
    cost = state["cost"]
    return f"{cost:,.2f} {state['currency']}" if cost >= 10 else f"{cost:.4f} {state['currency']}"


def duration(seconds: float) -> str:
    """A span of time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
