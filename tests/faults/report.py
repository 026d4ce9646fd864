"""What the experiments of a run did, as a table for people and as JSON for whoever compares runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.tally import Tally

_COLUMNS = {
    "trials": "trials", "worker_kills": "kills of workers", "redis_kills": "of Redis", "stops": "stops",
    "shutdowns": "shutdowns", "cancels": "cancels", "events": "events checked",
}  # fmt: skip


@dataclass
class Experiment:
    """One test, and the number of the experiment it is part of. A violation is a test that failed."""

    number: int
    test: str
    tally: Tally = field(default_factory=Tally)
    violations: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        """Something measured, for the report."""
        self.notes.append(line)


def totals(experiments: Iterable[Experiment]) -> Experiment:
    """All of them as one, numbered 0."""
    total = Experiment(0, "all")
    for each in experiments:
        total.tally.add(each.tally)
        total.violations += each.violations
        total.seconds += each.seconds
        total.notes += each.notes
    return total


def as_json(experiments: Sequence[Experiment], *, soak: bool) -> dict[str, Any]:
    total = totals(experiments)
    counted = {**asdict(total.tally), "violations": total.violations, "seconds": round(total.seconds, 1)}
    ordered = sorted(experiments, key=lambda each: (each.number, each.test))
    return {"round": "long" if soak else "short", "total": counted, "experiments": [asdict(each) for each in ordered]}


def as_lines(experiments: Sequence[Experiment]) -> list[str]:
    """A row for each experiment, its notes below it, and the total."""
    by_number: dict[int, list[Experiment]] = {}
    for each in sorted(experiments, key=lambda each: each.number):
        by_number.setdefault(each.number, []).append(each)
    heads = ["experiment", *_COLUMNS.values(), "violations", "seconds"]
    lines = ["  ".join(heads)]
    for number, tests in by_number.items():
        one = totals(tests)
        lines += [_row(str(number), one, heads), *(f"    {note}" for note in one.notes)]
    return [*lines, _row("all", totals(experiments), heads)]


def _row(name: str, experiment: Experiment, heads: Sequence[str]) -> str:
    counts = [getattr(experiment.tally, column) for column in _COLUMNS]
    cells = [name, *map(str, counts), str(experiment.violations), f"{experiment.seconds:.1f}"]
    return "  ".join(cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True))
