"""The frame of the experiments: each test says which one it is part of, and what it did is counted and reported.

@pytest.mark.experiment(16)
def test_a_fact(world: World, experiment: Experiment, soak: bool) -> None: ...
    TALLY.trials += 1                       # a test counts what it tried; kills, stops, cancels, and the events
    experiment.note("median 1.2 s")         # that `world.check` saw, are counted where they are done
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from local.valkey import AppendFsync
from tests.faults.report import Experiment, as_json, as_lines
from tests.tally import TALLY
from tests.valkey import Valkey

_RAN: Final = pytest.StashKey[list[Experiment]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "experiment(number): the experiment of the fault list that a test is part of")


@pytest.fixture(autouse=True)
def experiment(request: pytest.FixtureRequest) -> Iterator[Experiment]:
    """This test's line of the report."""
    marker = request.node.get_closest_marker("experiment")
    assert marker is not None, "which experiment is this part of? @pytest.mark.experiment(number)"
    made = Experiment(marker.args[0], request.node.name)
    request.config.stash.setdefault(_RAN, []).append(made)
    request.node.stash[_RAN] = [made]
    before, began = TALLY.copy(), time.monotonic()
    yield made
    made.tally, made.seconds = TALLY.since(before), round(time.monotonic() - began, 2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for each in item.stash.get(_RAN, []):
            each.violations += 1
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    ran = config.stash.get(_RAN, [])
    if not ran:
        return
    terminalreporter.section("fault experiments")
    for line in as_lines(ran):
        terminalreporter.write_line(line)
    if config.getoption("soak"):
        path: Path = config.getoption("soak_report")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(as_json(ran, soak=True), indent=2) + "\n")
        terminalreporter.write_line(f"written to {path}")


@pytest.fixture
def make_valkey() -> Iterator[Callable[..., Valkey]]:
    """Servers of the test's own, which it may kill: `make_valkey(appendfsync="always", options=[...])`."""
    with ExitStack() as stack:

        def make(*, options: Sequence[str] = (), appendfsync: AppendFsync = "everysec") -> Valkey:
            server = Valkey.start(options=options, appendfsync=appendfsync)
            stack.callback(server.close)
            return server

        yield make
