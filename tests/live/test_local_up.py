"""`local up` with a real Valkey and a stand-in for the worker, as a process that gets signals."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import pytest
import redis

from local import guard
from local.__main__ import main
from local.errors import PartFailed
from local.parts import Worker
from local.valkey import Valkey
from tests.live.local_processes import descendants_of, is_running, wait_until
from tests.live.local_stand_in import STOPPED_KEY

STAND_IN = (sys.executable, "-m", "tests.live.local_stand_in")
ELSEWHERE = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}  # so that no model is started; the stand-in asks none


class Up:
    """A running `up`. `lines` are those it has printed so far."""

    def __init__(self, data: Path, worker: Sequence[str], environ: Mapping[str, str], port: int | None) -> None:
        self.data = data
        program = (
            "import os, pathlib, sys\n"
            "from local.up import up\n"
            f"sys.exit(up(os.environ, pathlib.Path({str(data)!r}), {port}, {tuple(worker)!r}))\n"
        )
        clean = {name: value for name, value in os.environ.items() if name not in ("REDIS_URL", "OPENAI_API_KEY")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=guard.ROOT,
            env={**clean, **environ},
        )
        self.lines: list[str] = []
        self.children: list[int] = []

    @property
    def stdout(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def read_until(self, text: str) -> str:
        """The first line that has `text`."""
        for line in self.stdout:
            self.lines.append(line.rstrip("\n"))
            if text in line:
                return self.lines[-1]
        raise AssertionError(f"it ended without saying {text!r}: {self.lines} {self.process.communicate()[1]}")

    def wait_until_ready(self) -> None:
        self.read_until("psubscribe")
        self.children = descendants_of(self.process.pid)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send the signal and wait; the exit status and what was said after it."""
        self.process.send_signal(number)
        said, _ = self.process.communicate(timeout=30)
        return self.process.returncode, said

    @property
    def redis_url(self) -> str:
        return next(line.split()[1] for line in self.lines if line.startswith("  Redis"))

    def worker_pid(self) -> int:
        return int((self.data / "worker.log").read_text().split("pid ")[-1].split()[0])


@contextlib.contextmanager
def running(
    data: Path,
    worker: Sequence[str] = STAND_IN,
    environ: Mapping[str, str] = ELSEWHERE,
    port: int | None = None,
) -> Iterator[Up]:
    started = Up(data, worker, environ, port)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
        started.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_everything_in_order(number: signal.Signals, tmp_path: Path) -> None:
    """Exit status 0, no process left, and the worker, stopped first, could still write to Redis, which kept it."""
    with running(tmp_path) as up:
        up.wait_until_ready()
        assert len(up.children) == 2
        status, said = up.end(number)
        assert (status, said.splitlines()[-1]) == (0, "stopped; nothing is left running")
        assert not any(map(is_running, up.children))
    assert "stopped in order" in (tmp_path / "worker.log").read_text()
    with Valkey.start(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        assert client.exists(STOPPED_KEY)


def test_the_summary_can_be_typed_in_as_it_stands(tmp_path: Path) -> None:
    """It names the Redis that answers, and says to export its address where that is not the usual one."""
    with running(tmp_path) as up:
        up.wait_until_ready()
        with redis.Redis.from_url(up.redis_url) as client:
            assert client.ping()
        assert f"  export REDIS_URL={up.redis_url}" in up.lines
        assert any("-m producer submit" in line and "--follow" in line for line in up.lines)
        assert any("http://127.0.0.1:9/v1, because OPENAI_BASE_URL is set" in line for line in up.lines)


def test_a_free_port_is_taken_and_a_taken_one_avoided(tmp_path: Path) -> None:
    """The port that was asked for if it is free, else another; both said."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with running(tmp_path / "a", port=port) as up:
            up.wait_until_ready()
            assert not up.redis_url.endswith(f":{port}/0")
    with running(tmp_path / "b", port=port) as up:
        up.wait_until_ready()
        assert up.redis_url == f"redis://127.0.0.1:{port}/0"


@pytest.mark.parametrize("part", ["the worker", "Valkey"])
def test_a_part_that_dies_is_started_again(part: str, tmp_path: Path) -> None:
    """kill -9 of the worker or the server: said, started again, at the same address."""
    with running(tmp_path) as up:
        up.wait_until_ready()
        with redis.Redis.from_url(up.redis_url) as client:
            victim = up.worker_pid() if part == "the worker" else client.info("server")["process_id"]
        os.kill(victim, signal.SIGKILL)
        assert up.read_until("has died") == f"{part} has died (signal 9); it is started again in 0.5 s"
        up.read_until(f"{part} runs again")
        assert not is_running(victim)
        with redis.Redis.from_url(up.redis_url) as client:
            assert client.ping()
        assert len(descendants_of(up.process.pid)) == 2
        assert up.end(signal.SIGTERM)[0] == 0


def test_kill_9_of_up_leaves_no_process(tmp_path: Path) -> None:
    """Not even then."""
    with running(tmp_path) as up:
        up.wait_until_ready()
        up.process.kill()
        up.process.communicate()
        wait_until(lambda: not any(map(is_running, up.children)))


def test_a_second_signal_ends_a_slow_stop_at_once(tmp_path: Path) -> None:
    """A worker that does not end holds `up` only until the second Ctrl-C."""
    endless = (sys.executable, "-c", ENDLESS)
    with running(tmp_path, worker=endless) as up:
        up.wait_until_ready()
        up.process.send_signal(signal.SIGINT)
        up.read_until("stopping")
        assert up.process.poll() is None
        up.process.send_signal(signal.SIGINT)
        up.process.communicate(timeout=30)
        wait_until(lambda: not any(map(is_running, up.children)))


ENDLESS = """
import os, signal, sys, time, redis
signal.signal(signal.SIGTERM, signal.SIG_IGN)
redis.Redis.from_url(os.environ["REDIS_URL"]).hset("rq:worker:" + sys.argv[2], "birth", "now")
while True:
    time.sleep(1000)
"""


def test_a_worker_that_cannot_start_is_one_clear_line_and_its_log(tmp_path: Path) -> None:
    """Exit status not 0, the reason at hand, nothing left running."""
    broken = (sys.executable, "-c", "raise SystemExit('no such setting')")
    with running(tmp_path, worker=broken) as up:
        _, errors = up.process.communicate(timeout=30)
        assert up.process.returncode != 0
        assert f"the worker ended at its start, exit status 1; its log is {tmp_path}/worker.log\n" in errors
        assert "  | no such setting" in errors
    server = re.search(r"pid=(\d+)", (tmp_path / "valkey.log").read_text())
    assert server is not None
    assert not is_running(int(server[1]))


def test_a_worker_is_a_failed_part_while_redis_is_away(tmp_path: Path) -> None:
    """An error of this room's own, which `up` answers by trying again later; the half-started worker is gone."""
    idle = (sys.executable, "-c", "import time; time.sleep(1000)")
    worker = Worker(tmp_path / "worker.log", idle, {"REDIS_URL": "redis://127.0.0.1:1/0"})
    with pytest.raises(PartFailed, match="whether the worker is ready cannot be seen"):
        worker.start()
    assert not worker.alive


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    """Two servers on one append-only file would ruin it: the second `up` names the first and leaves it alone."""
    with running(tmp_path) as first:
        first.wait_until_ready()
        with running(tmp_path) as second:
            _, errors = second.process.communicate(timeout=30)
            assert f"{tmp_path} is in use by process {first.process.pid}: end that `local up`" in errors
        with redis.Redis.from_url(first.redis_url) as client:
            assert client.ping()


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found, and what to do; no traceback."""
    (tmp_path / "file").touch()
    assert main(["up", "--data", str(tmp_path / "file" / "x")]) == 1
    expected = f"local up: {tmp_path}/file/x cannot be used (Not a directory): choose another folder with --data\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("port", ["99999", "0", "-1", "x"])
def test_a_port_that_is_none_is_wrong_usage(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, before anything is started."""
    with pytest.raises(SystemExit) as end:
        main(["up", "--port", port])
    assert end.value.code == 2
    assert f"--port: found '{port}', expected a port, 1 to 65535" in capsys.readouterr().err


def test_a_given_redis_is_used_and_its_password_not_shown(tmp_path: Path) -> None:
    """REDIS_URL set: only the worker is started, and the one line about Redis has no secret in it."""
    with Valkey.start() as server, redis.Redis.from_url(server.url) as client:
        client.config_set("requirepass", "canary")
        url = server.url.replace("redis://", "redis://:canary@")
        with running(tmp_path, environ={**ELSEWHERE, "REDIS_URL": url}) as up:
            up.wait_until_ready()
            assert len(up.children) == 1
            assert up.end(signal.SIGTERM)[0] == 0
        assert "canary" not in "".join(up.lines)
        client.config_set("requirepass", "")  # so that the server's own probe gets an answer again


def test_a_given_redis_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    """Said before anything else is started."""
    with running(tmp_path, environ={**ELSEWHERE, "REDIS_URL": "redis://127.0.0.1:1/0"}) as up:
        _, errors = up.process.communicate(timeout=30)
        assert up.process.returncode != 0
        assert "REDIS_URL is set, but" in errors
        assert not (tmp_path / "worker.log").exists()
