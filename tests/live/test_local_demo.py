"""`local demo` with a real Valkey and a stand-in for the worker; and, at the end, the real thing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from local import guard, parts
from tests.live.local_processes import descendants_of, processes

STAND_IN = (sys.executable, "-m", "tests.live.local_stand_in")
ELSEWHERE = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}


def run_demo(
    folder: Path, environ: Mapping[str, str], worker: Sequence[str], patience: float = 60
) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a demo that ended by itself, in time, and left no process behind."""
    program = f"import os, sys; from local.demo import demo; sys.exit(demo(os.environ, {tuple(worker)!r}))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("REDIS_URL", "OPENAI_"))}
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        started = subprocess.Popen(
            [sys.executable, "-c", program], stdout=out, stderr=err, cwd=guard.ROOT, env={**clean, **environ}
        )
    seen: set[int] = set()
    deadline = time.monotonic() + patience
    try:
        while started.poll() is None:
            assert time.monotonic() < deadline, (folder / "out").read_text() + (folder / "err").read_text()
            seen.update(descendants_of(started.pid))
            time.sleep(0.02)
    finally:
        started.kill()
        started.wait()
    assert len(seen) >= 2
    assert seen.isdisjoint(processes())
    return started.returncode, (folder / "out").read_text(), (folder / "err").read_text()


def test_the_demo_shows_three_answers_and_proves_them(tmp_path: Path) -> None:
    """Exit status 0; each answer is shown live, and at the end compared with the log."""
    status, out, err = run_demo(tmp_path, ELSEWHERE, [*STAND_IN, "--text", "Mills stand by rivers. " * 9])
    assert (status, err) == (0, "")
    for number in (1, 2, 3):
        assert re.search(rf"^\[{number}\] Mills stand by rivers\.", out, re.MULTILINE)
        assert re.search(rf"^\[{number}\] completed .*  as in the log$", out, re.MULTILINE)


def test_a_failed_answer_fails_the_demo(tmp_path: Path) -> None:
    """Exit status 1, with the job's own error."""
    status, out, _ = run_demo(tmp_path, ELSEWHERE, [*STAND_IN, "--fail"])
    assert status == 1
    assert re.search(r"^\[1\] failed .*upstream_error: it was asked to$", out, re.MULTILINE)


def test_the_demo_leaves_a_given_redis_alone(tmp_path: Path) -> None:
    """Its worker must not take jobs meant for others: REDIS_URL is not even connected to."""
    status, _, err = run_demo(tmp_path, {**ELSEWHERE, "REDIS_URL": "redis://127.0.0.1:1/0"}, STAND_IN)
    assert (status, err) == (0, "")


@pytest.mark.timeout(240)
def test_the_real_demo_ends_by_itself_and_leaves_nothing(tmp_path: Path) -> None:
    """Real Valkey, real model, real worker: exit status 0 within the 3 minutes it promises."""
    status, out, err = run_demo(tmp_path, {}, parts.WORKER_COMMAND, patience=180)
    assert (status, err) == (0, ""), out
    assert len(re.findall(r"^\[\d\] (?:completed|incomplete) .*  as in the log$", out, re.MULTILINE)) == 3
