"""Two small line charts as SVG, written by hand: readable on light and dark pages, no dependency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 50, 50
_COLOURS = ("#2f81f7", "#d9730d", "#3fa45b")  # each at least 3:1 against white and against #0d1117
_GREY = "#808890"

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Points (x, y), both above 0, by the line's name."""


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last at or below `low` to the first at or above `high`."""
    steps = [
        m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)
    ]
    first = max(step for step in steps if step <= low * 1.0001)
    last = min(step for step in [*steps, steps[-1] * 2] if step >= high * 0.9999)
    return [step for step in steps if first <= step <= last]


def chart(title: str, x_name: str, y_name: str, series: Series, *, limit: tuple[str, float] | None = None) -> str:
    """An SVG document, both axes logarithmic; `limit` is a named horizontal line. ValueError without any point."""
    points = [point for line in series.values() for point in line]
    if not points:
        raise ValueError("a chart needs at least one point")
    xs = ticks(min(x for x, _ in points), max(x for x, _ in points))
    heights = [y for _, y in points] + ([limit[1]] if limit else [])
    ys = ticks(min(heights), max(heights))

    def across(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * _share(x, xs)

    def down(y: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * _share(y, ys)

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
            f' font-family="sans-serif" font-size="12" fill="{_GREY}"><title>{escape(title)}</title>'
        ),
        _text(_LEFT, 20, title, size=15),
        _text(_WIDTH - _RIGHT, _HEIGHT - 10, x_name, anchor="end"),
        _text(_LEFT, 40, y_name),
    ]
    for x in xs:
        parts += [
            _line(across(x), _TOP, across(x), _HEIGHT - _BOTTOM),
            _text(across(x), _HEIGHT - _BOTTOM + 16, f"{x:g}", "middle"),
        ]
    for y in ys:
        parts += [_line(_LEFT, down(y), _WIDTH - _RIGHT, down(y)), _text(_LEFT - 6, down(y) + 4, f"{y:g}", "end")]
    if limit:
        parts.append(_line(_LEFT, down(limit[1]), _WIDTH - _RIGHT, down(limit[1]), dashed=True))
        parts.append(_text(_WIDTH - _RIGHT - 4, down(limit[1]) - 5, limit[0], "end"))
    for colour, (name, line) in zip(_COLOURS, series.items(), strict=False):
        placed = [(across(x), down(y)) for x, y in sorted(line)]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{_path(placed)}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in placed]
        if placed:
            parts.append(_text(placed[0][0] + 6, placed[0][1] - 8, name, colour=colour))
    return "\n".join([*parts, "</svg>", ""])


def _share(value: float, axis: list[float]) -> float:
    """Where on the axis, 0 to 1."""
    if len(axis) == 1:
        return 0.5
    return math.log(value / axis[0]) / math.log(axis[-1] / axis[0])


def _path(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _line(x1: float, y1: float, x2: float, y2: float, *, dashed: bool = False) -> str:
    style = ' stroke-dasharray="6 4"' if dashed else ' stroke-opacity="0.25"'
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{_GREY}"{style}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", *, size: int = 12, colour: str = _GREY) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )
