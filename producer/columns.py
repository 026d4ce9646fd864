"""Columns: on a terminal two blanks between them, and never a cell that is cut or folded; else TSV."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from millstream.terminal import printable

GAP: Final = "  "


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, its cells below those of the row before."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return [GAP.join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]


def tsv(row: Sequence[str]) -> str:
    """A line of tab-separated values: what would end a cell is written as an escape."""
    return "\t".join(map(_cell, row)) + "\n"


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def utc(at: float) -> str:
    """A time (Unix seconds) for programs, such as `2026-02-01T09:30:00.125Z`."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"


def width(lines: Sequence[str]) -> int:
    """Characters of the longest line."""
    return max(map(len, lines), default=0)
