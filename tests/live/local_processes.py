"""Looking at processes from outside, for the tests of `local`. By /proc where it exists: a slim image has no `ps`."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.worker_process import PATIENCE

_PROC = Path("/proc")


def wait_until(holds: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Return as soon as `holds()` does; fail after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold"
        time.sleep(0.005)


def processes() -> dict[int, int]:
    """The parent of every process that runs. A zombie, which nobody in a container may reap, does not run."""
    rows = [_read(path) for path in _PROC.glob("[0-9]*/stat")] if (_PROC / "self").exists() else _ps()
    return {int(pid): int(parent) for pid, state, parent in filter(None, rows) if not state.startswith("Z")}


def is_running(pid: int) -> bool:
    return pid in processes()


def children_of(pid: int) -> list[int]:
    return [child for child, parent in processes().items() if parent == pid]


def descendants_of(pid: int) -> list[int]:
    """Its children, their children and so on."""
    found = children_of(pid)
    return found + [below for child in found for below in descendants_of(child)]


def _read(path: Path) -> list[str]:
    try:
        text = path.read_text()
    except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
        return []
    return [path.parent.name, *text.rpartition(")")[2].split()[:2]]  # the name in (...) may hold anything


def _ps() -> list[list[str]]:
    said = subprocess.run(["ps", "-A", "-o", "pid=,stat=,ppid="], capture_output=True, text=True, check=True).stdout
    return [row.split() for row in said.splitlines()]
