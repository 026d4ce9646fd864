"""Children end with their parent, however it ends. Real processes, tethered by the kernel and by a watcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from local import guard
from tests.live.local_processes import children_of, is_running, wait_until

LINUX = sys.platform.startswith("linux")
MECHANISMS = [
    pytest.param(True, id="kernel", marks=pytest.mark.skipif(not LINUX, reason="only Linux has PR_SET_PDEATHSIG")),
    pytest.param(False, id="watcher"),
]


def start_parent(program: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A Python process that runs `program`, which prints the pids it started on one line, and then waits."""
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, cwd=guard.ROOT
    )
    assert parent.stdout is not None
    return parent, [int(pid) for pid in parent.stdout.readline().split()]


def kill(parent: subprocess.Popen[str]) -> None:
    parent.kill()
    parent.communicate()


@pytest.mark.parametrize("by_kernel", MECHANISMS)
def test_a_child_dies_with_a_killed_parent(by_kernel: bool, tmp_path: Path) -> None:
    """kill -9 of the parent leaves no child, not even one that ignores every signal it may ignore."""
    parent, pids = start_parent(f"""
        import pathlib, sys, time
        from local.guard import spawn
        deaf = "trap '' HUP INT TERM; while :; do sleep 1000; done"
        children = [spawn(["sh", "-c", deaf], log=pathlib.Path({str(tmp_path / "log")!r}), by_kernel={by_kernel})
                    for _ in range(2)]
        print(*(child.pid for child in children), flush=True)
        time.sleep(1000)
    """)
    assert len(pids) == 2
    assert all(map(is_running, pids))
    kill(parent)
    wait_until(lambda: not any(map(is_running, pids)))


def test_a_server_dies_with_a_killed_parent() -> None:
    """kill -9 of a test run or of `local up` leaves no Valkey."""
    parent, pids = start_parent("""
        import time
        from local.valkey import Valkey
        print(Valkey.start().pid, flush=True)
        time.sleep(1000)
    """)
    assert is_running(pids[0])
    kill(parent)
    wait_until(lambda: not is_running(pids[0]))


@pytest.mark.parametrize("by_kernel", MECHANISMS)
def test_a_child_outlives_the_thread_that_asked_for_it(by_kernel: bool, tmp_path: Path) -> None:
    """The tether is to the process: a child started in a short-lived thread goes on when the thread has ended."""
    script = "trap 'echo still here; exit 0' TERM; echo ready; while :; do sleep 0.01; done"
    children: list[guard.Child] = []

    def start() -> None:
        child = guard.spawn(["sh", "-c", script], log=tmp_path / "log", read_stdout=True, by_kernel=by_kernel)
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"  # so it is tethered before the thread ends

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    wait_until(lambda: not Path(f"/proc/self/task/{thread.native_id}").exists())  # the system's thread, not Python's
    (child,) = children
    child.terminate()
    assert child.communicate(timeout=10)[0] == b"still here\n"
    assert child.returncode == 0


def test_a_child_that_ends_takes_its_watcher_along(tmp_path: Path) -> None:
    """Where a watcher process does the tethering, it goes when its work is done."""
    child = guard.spawn(["sleep", "1000"], log=tmp_path / "log", by_kernel=False)
    wait_until(lambda: bool(children_of(child.pid)))
    (watcher,) = children_of(child.pid)
    child.kill()
    child.wait()
    wait_until(lambda: not is_running(watcher))


@pytest.mark.parametrize("by_kernel", MECHANISMS)
def test_a_child_starts_with_ordinary_signals(by_kernel: bool, tmp_path: Path) -> None:
    """Nothing of what Python or the parent did to signals reaches the child: no mask, SIGPIPE as a shell gives it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        child = guard.spawn(["sleep", "1000"], log=tmp_path / "log", by_kernel=by_kernel)
        piped = guard.spawn(["sh", "-c", "kill -PIPE $$; exit 0"], log=tmp_path / "log", by_kernel=by_kernel)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert piped.wait(10) == -signal.SIGPIPE
    child.terminate()
    assert child.wait(10) == -signal.SIGTERM


def test_output_goes_to_the_log_and_a_piped_stdout_to_the_reader(tmp_path: Path) -> None:
    """Logs are appended to; with `read_stdout` the parent reads to the end, which comes when the child has ended."""
    log = tmp_path / "made" / "log"
    script = ["sh", "-c", "echo out; echo err >&2"]
    assert guard.spawn(script, log=log).wait(10) == 0
    for by_kernel in {LINUX, False}:
        child = guard.spawn(script, log=log, read_stdout=True, by_kernel=by_kernel)
        assert child.communicate(timeout=10)[0] == b"out\n"
    assert sorted(guard.tail(log).split()) == ["err"] * (2 + LINUX) + ["out"]


def test_a_command_that_does_not_exist_is_named(tmp_path: Path) -> None:
    """The log says what could not be run."""
    child = guard.spawn(["no-such-program"], log=tmp_path / "log")
    assert child.wait(10) == 1
    assert guard.tail(tmp_path / "log") == "cannot run no-such-program: No such file or directory"


def test_a_forked_process_can_start_children_too(tmp_path: Path) -> None:
    """The thread that starts children is not carried over by a fork; the fork makes its own."""
    assert guard.spawn(["true"], log=tmp_path / "log").wait(10) == 0
    pid = os.fork()
    if pid == 0:
        os._exit(guard.spawn(["sh", "-c", "exit 7"], log=tmp_path / "log").wait(10))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
