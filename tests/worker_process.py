"""A worker in a process of its own, as `python -m worker` runs it: watched by its log, always ended by pid."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from local import guard
from tests.tally import TALLY

PATIENCE: Final = 30.0
"""Seconds a test waits for what must happen soon; only a failing test waits this long."""

_INHERITED: Final = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV")

PROGRAM: Final = (sys.executable, "-m", "worker")

_BROKEN: Final = ("worker.broken", "job.broken", "writer.refused")
"""What a worker says when something in it is wrong, whatever the world did to it."""


def wait_until(holds: Callable[[], Any], what: str, within: float = PATIENCE) -> Any:
    """Poll until it holds and return what it said; AssertionError after `within` seconds."""
    deadline = time.monotonic() + within
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        time.sleep(0.002)
    return found


def stands_still(pid: int) -> None:
    """Wait until a process that was sent SIGSTOP has stopped."""
    if (stat := Path(f"/proc/{pid}/stat")).exists():
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", f"process {pid} stands still")


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """What a process of a test sees: these settings, and of ours only what it needs to run."""
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {**kept, **settings}


def memory_of(pid: int) -> int:
    """The process's own memory in bytes: what it shares with nobody, be it in RAM or not."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "VmSwap")))


class WorkerProcess:
    """One worker. Its log holds a JSON object per line, and whatever else went to stderr."""

    def __init__(
        self, log: Path, settings: Mapping[str, str], arguments: Sequence[str], program: Sequence[str] = PROGRAM
    ) -> None:
        self.log = log
        self._child = guard.spawn([*program, *arguments], log=log, environ=environment(settings))
        self.pid = self._child.pid

    @property
    def name(self) -> str:
        """Its name in RQ."""
        return str(self.said("worker.ready")[0]["worker"])

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def said(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The lines of its log with this event and these fields."""
        return [
            line for line in self._lines()
            if line.get("event") == event and all(line.get(name) == value for name, value in fields.items())
        ]  # fmt: skip

    def wait_for(self, event: str, within: float = PATIENCE, **fields: Any) -> dict[str, Any]:
        """The first such line, once it is there."""

        def look() -> list[dict[str, Any]]:
            assert self.alive or self.said(event, **fields), f"it ended ({guard.how_it_ended(self._child)}) first"
            return self.said(event, **fields)

        found: dict[str, Any] = wait_until(look, f"{event} {fields} in {self.log}", within)[0]
        return found

    def ready(self) -> WorkerProcess:
        """Wait until it takes jobs."""
        self.wait_for("worker.ready")
        return self

    def kill(self) -> None:
        """SIGKILL, as a crash; returns when it is gone."""
        TALLY.worker_kills += 1
        self._child.kill()
        self._child.wait()

    def freeze(self) -> None:
        """SIGSTOP; returns when it stands still."""
        TALLY.stops += 1
        os.kill(self.pid, signal.SIGSTOP)
        stands_still(self.pid)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def terminate(self) -> None:
        TALLY.shutdowns += 1
        self._child.terminate()

    def wait(self, within: float = PATIENCE) -> int:
        """Its exit status, once it has ended; negative for a signal."""
        return self._child.wait(within)

    def end(self) -> None:
        """However it stands: gone when this returns."""
        if self.alive:
            self._child.kill()
        self._child.wait()

    def complaints(self) -> list[str]:
        """Lines that no worker may write, whatever happens to it: tracebacks and its own words for a bug."""
        return [
            line for line in self.log.read_text(errors="replace").splitlines()
            if "Traceback" in line or "never retrieved" in line or any(f'"event": "{word}"' in line for word in _BROKEN)
        ]  # fmt: skip

    def _lines(self) -> list[dict[str, Any]]:
        text = self.log.read_bytes().decode(errors="replace")
        whole = text[: text.rfind("\n") + 1]
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]
