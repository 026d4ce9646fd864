"""What the worker says, and that it works on when nobody can hear it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.live.producer_processes import ROOT
from tests.valkey import Valkey
from tests.worker_process import PATIENCE, environment, wait_until
from tests.world import World

SAY = """
import structlog
from worker.log import configure
configure({style!r})
structlog.get_logger().warning("intake.put_aside", rq_job="\\x1b]0;pwn\\x07\\x1b[2J", number=7)
"""


@contextmanager
def _worker(world: World, stderr: int) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that writes there, alone, and is gone afterwards."""
    command = [sys.executable, "-m", "worker"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(world.environ), stderr=stderr) as worker:
        os.close(stderr)
        try:
            yield worker
        finally:
            worker.kill()


def _ends_in_order(world: World, worker: subprocess.Popen[bytes]) -> None:
    """It does its jobs in their first attempt, and a signal ends it."""
    for number in range(3):
        job_id = world.submit(f"unheard {number}")
        world.check_text(job_id, f"unheard {number}")
        assert world.client.status(job_id).attempt == 1
    worker.terminate()
    assert worker.wait(PATIENCE) == 0


def test_a_worker_whose_log_nobody_reads_works_on(world: World) -> None:
    """`millstream-worker 2>&1 | head -1`: a lost log costs log lines only."""
    reader, writer = os.pipe()
    with _worker(world, writer) as worker:
        assert b"worker.ready" in os.read(reader, 65_536)
        os.close(reader)
        _ends_in_order(world, worker)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_worker_whose_log_disk_is_full_works_on(world: World) -> None:
    """Every write fails."""
    with _worker(world, os.open("/dev/full", os.O_WRONLY)) as worker:
        for number in range(3):
            world.check_text(world.submit(f"unheard {number}"), f"unheard {number}")
        worker.terminate()
        worker.wait(PATIENCE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_start_ends_it_in_silence(world: World, number: signal.Signals, seed: int) -> None:
    """At any moment from its first line of code: the status is the signal's, or that of an end in order."""
    for trial in range(6):
        reader, writer = os.pipe()
        with _worker(world, writer) as worker, os.fdopen(reader) as said:
            wait_until(partial(_handles_signals, worker.pid), "it handles signals")  # before, it is Python that starts
            time.sleep(0.05 * (trial + seed % 10 / 10))
            worker.send_signal(number)
            assert worker.wait(PATIENCE) in (0, 128 + number)
            assert all(json.loads(line)["event"].startswith("worker.") for line in said)


def _handles_signals(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM, by the kernel's account; for SIGINT Python itself has one."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def test_what_libraries_say_is_json_too(world: World) -> None:
    """RQ complains in its own words while Redis is away; a reader of the log meets objects only."""
    with Valkey.start() as own:
        world.environ["REDIS_URL"] = own.url
        reader, writer = os.pipe()
        with _worker(world, writer), os.fdopen(reader) as said:
            assert json.loads(said.readline())["event"] == "worker.ready"
            own.kill()
            lines: list[dict[str, Any]] = []
            while not any("logger" in line for line in lines):
                lines.append(json.loads(said.readline()))
        assert next(line for line in lines if "logger" in line)["logger"].startswith("rq")


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_field_cannot_drive_the_terminal(style: str) -> None:
    """The name of a queue entry is anybody's: in neither form a control character gets through."""
    done = subprocess.run(
        [sys.executable, "-c", SAY.format(style=style)], capture_output=True, check=True, timeout=60
    )  # fmt: skip
    said = done.stderr.decode()
    assert all(char.isprintable() or char == "\n" for char in said)
    if style == "json":
        assert json.loads(said)["rq_job"] == "\x1b]0;pwn\x07\x1b[2J"
    else:
        assert "\\x1b]0;pwn\\x07\\x1b[2J" in said
