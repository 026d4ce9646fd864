"""Starting and ending processes, so that none outlives the bench.

Every process of a bench is a descendant of the bench: it makes itself the reaper of orphans, because a killed RQ worker
leaves its work-horse behind. So ending all new descendants, by their ids, leaves nothing running.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from . import proc
from .toolchain import BenchError

_PR_SET_CHILD_SUBREAPER = 36
T = TypeVar("T")


def wait_until(what: str, question: Callable[[], T | None], *, seconds: float, pause: float = 0.02) -> T:
    """The first answer to `question` that is true. Raises BenchError naming `what` when none came in time."""
    until = time.monotonic() + seconds
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > until:
            raise BenchError(f"waited {seconds:g} s for {what}, in vain")
        time.sleep(pause)


class Processes:
    """The processes of one measurement and the folder of their outputs; leaving the context ends them all.

    Descendants of this process that were there before it was entered are none of its business.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[str]] = []
        self._names: dict[int, str] = {}
        self._strangers: set[int] = set()

    def __enter__(self) -> Self:
        self._strangers = set(proc.descendants(os.getpid()))
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise BenchError(f"cannot become the reaper of orphans: {os.strerror(ctypes.get_errno())}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # A second Ctrl-C must not stop the clearing up, which takes 3 s a name at most.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._end_started()
            self._end_orphans()
        finally:
            signal.signal(signal.SIGINT, interrupt)

    def _end_started(self) -> None:
        # The newest first. Those of one name together, as 25 take their time.
        while self._started:
            name = self._names[self._started[-1].pid]
            group = [process for process in self._started if self._names[process.pid] == name]
            for process in group:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
            for process in reversed(group):
                self.end(process)

    def _end_orphans(self) -> None:
        # Again until none is left: a grandchild becomes ours to bury only once its parent is dead.
        while orphans := set(proc.descendants(os.getpid())) - self._strangers:
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in orphans:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)

    def start(
        self,
        name: str,
        argv: Sequence[str],
        *,
        core: int | None = None,
        env: Mapping[str, str] | None = None,
        talk: bool = False,
    ) -> subprocess.Popen[str]:
        """Starts a process, pinned to `core`; it writes to NAME.log, or with `talk` its stdin and stdout are pipes."""
        # A group of its own: Ctrl-C reaches the bench alone, which then ends the others in order.
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talk else log,
                stderr=log,
                env={**os.environ, **(env or {})},
                text=True,
                start_new_session=True,
            )
        self._started.append(process)
        self._names[process.pid] = name
        if core is not None:
            proc.pin([process.pid], core)
        return process

    def end(self, process: subprocess.Popen[str], *, seconds: float = 3.0) -> None:
        """SIGTERM, then SIGKILL for it and for every child it had."""
        if process.poll() is None:
            family = proc.descendants(process.pid)
            process.terminate()
            try:
                process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pid in set(family) & set(proc.descendants(os.getpid())):  # still ours: no id was given away meanwhile
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        if process in self._started:
            self._started.remove(process)

    def check(self) -> None:
        """Raises BenchError with the end of its log if a process has ended that nobody ended."""
        for process in self._started:
            if process.poll() is not None:
                name = self._names[process.pid]
                raise BenchError(f"{name} ended with status {process.returncode}:\n{self.tail(name)}")

    def wait_until(self, what: str, question: Callable[[], T | None], *, seconds: float, pause: float = 0.02) -> T:
        """As the function of that name; ends at once if a process has ended, as its answer would never come."""

        def checked() -> T | None:
            self.check()
            return question()

        return wait_until(what, checked, seconds=seconds, pause=pause)

    def tail(self, name: str, size: int = 1500) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace")[-size:] if path.exists() else ""
