"""Columns on a terminal: two blanks between them, and never a cell that is cut or folded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from millstream.terminal import printable

GAP: Final = "  "


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, its cells below those of the row before."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return [GAP.join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]


def width(lines: Sequence[str]) -> int:
    """Characters of the longest line."""
    return max(map(len, lines), default=0)
