"""The report of the fault suite: what was counted where it was done, by experiment and in all."""

from __future__ import annotations

from tests.faults.report import Experiment, as_json, as_lines
from tests.tally import Tally

RAN = [
    Experiment(31, "test_b", Tally(trials=200, cancels=200, events=900), seconds=5.0),
    Experiment(16, "test_a", Tally(trials=3, worker_kills=3, events=1000), seconds=16.04, notes=["2.7 s"]),
    Experiment(16, "test_c", Tally(worker_kills=5), violations=1, seconds=6.0),
]


def test_counts_are_added_up_by_experiment_and_in_all() -> None:
    """In the order of the experiments, whatever the order of the tests; the notes stand below their experiment."""
    head, *rows = as_lines(RAN)
    assert head.split("  ")[2] == "kills of workers"
    assert [row.split() for row in rows] == [
        ["16", "3", "8", "0", "0", "0", "0", "1000", "1", "22.0"],
        ["2.7", "s"],
        ["31", "200", "0", "0", "0", "0", "200", "900", "0", "5.0"],
        ["all", "203", "8", "0", "0", "0", "200", "1900", "1", "27.0"],
    ]


def test_the_json_has_the_same_counts_and_every_test() -> None:
    """What compares runs: the totals, and a record for each test."""
    found = as_json(RAN, soak=True)
    assert found["round"] == "long"
    assert (found["total"]["worker_kills"], found["total"]["violations"], found["total"]["seconds"]) == (8, 1, 27.0)
    assert [each["test"] for each in found["experiments"]] == ["test_a", "test_c", "test_b"]
    assert found["experiments"][0]["notes"] == ["2.7 s"]


def test_a_tally_knows_what_came_since() -> None:
    """A test's share is the difference of two looks at the counts of the whole run."""
    tally = Tally(trials=2, worker_kills=1)
    before = tally.copy()
    tally.worker_kills += 4
    assert tally.since(before) == Tally(worker_kills=4)
