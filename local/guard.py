"""Starts children that never outlive this process, however it ends, kill -9 included. See tether.py for the how."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Final

Child = subprocess.Popen[bytes]

ROOT: Final = Path(__file__).resolve().parent.parent
"""The checkout: where `python -m worker` and its kind are started."""

_TETHER: Final = Path(__file__).with_name("tether.py")
_KERNEL_TETHERS: Final = sys.platform.startswith("linux")


def spawn(
    command: Sequence[str],
    *,
    log: Path,
    environ: Mapping[str, str] | None = None,
    read_stdout: bool = False,
    by_kernel: bool = _KERNEL_TETHERS,
) -> Child:
    """Start `command` in a session of its own; it gets SIGKILL when this process ends.

    stderr is appended to `log`, and so is stdout unless `read_stdout` makes it a pipe. `environ` replaces the
    environment. A session of its own, so that Ctrl-C reaches this process alone, which then stops things in order.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        pipe = -1 if by_kernel else _pipe.read_end()
        tether = [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid()), str(pipe)]

        def start() -> Child:
            return subprocess.Popen(
                [*tether, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if read_stdout else output,
                stderr=output,
                env=environ,
                cwd=ROOT,
                start_new_session=True,
                pass_fds=() if pipe < 0 else (pipe,),
            )

        return _spawner.run(start)


class _Spawner:
    """One thread that starts all children and lives as long as the process.

    The kernel's tether holds on to the parent *thread*: a child started by a short-lived one would die with it.
    """

    def __init__(self) -> None:
        self._requests: SimpleQueue[tuple[Callable[[], Child], Future[Child]]] = SimpleQueue()
        self._lock = threading.Lock()
        self._started = False

    def run(self, start: Callable[[], Child]) -> Child:
        with self._lock:
            if not self._started:
                threading.Thread(target=self._serve, name="spawner", daemon=True).start()
                self._started = True
        future: Future[Child] = Future()
        self._requests.put((start, future))
        return future.result()

    def _serve(self) -> None:
        while True:
            start, future = self._requests.get()
            try:
                future.set_result(start())
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever asked
                future.set_exception(error)


class _Pipe:
    """A pipe that nobody writes to; its write end closes when this process ends. One serves all children."""

    def __init__(self) -> None:
        self._ends: tuple[int, int] | None = None

    def read_end(self) -> int:
        if self._ends is None:
            self._ends = os.pipe()  # neither end is inherited, but for the one in pass_fds
        return self._ends[0]


_spawner = _Spawner()
_pipe = _Pipe()


def _forget_what_a_fork_lacks() -> None:
    global _spawner, _pipe  # threads do not survive a fork, and the pipe is the parent's
    _spawner, _pipe = _Spawner(), _Pipe()


os.register_at_fork(after_in_child=_forget_what_a_fork_lacks)


def tail(log: Path, lines: int = 8, since: int = 0) -> str:
    """The last lines of what was written to `log` after its first `since` bytes."""
    try:
        with log.open("rb") as file:
            file.seek(max(since, file.seek(0, os.SEEK_END) - 16_384))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def how_it_ended(child: Child) -> str:
    """`exit status 1` or `signal 9`, for messages."""
    code = child.poll()
    if code is None:
        return "still running"
    return f"exit status {code}" if code >= 0 else f"signal {-code}"
