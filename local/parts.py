"""The parts that `up` and `demo` run. Each starts, ready when `start` returns, may be started again, and stops."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Final, Protocol

from rq.defaults import RQ_KEY_PREFIX

from millstream.errors import RedisUnavailable
from millstream.redis_door import connect, translated

from . import guard
from .errors import PartFailed, PortTaken
from .valkey import Valkey

USUAL_PORT: Final = 6379
WORKER_COMMAND: Final = (sys.executable, "-m", "worker")

_MODEL_PATIENCE: Final = 90.0  # seconds
_WORKER_PATIENCE: Final = 30.0
_STOP_PATIENCE: Final = 5.0
_POLL: Final = 0.01

# RQ's own name for the record of a living worker (BaseWorker.redis_worker_namespace_prefix), written when it is ready.
_REGISTRATION: Final = RQ_KEY_PREFIX + ":worker:{}"


class Part(Protocol):
    """Something that runs beside us. `name` is how people are told about it."""

    name: str

    def start(self) -> None:
        """Start, or start again at the same address; ready on return. Raises LocalError."""

    def stop(self) -> None:
        """End it in order, by force where it does not listen. May be called at any time."""

    @property
    def alive(self) -> bool: ...

    def how_it_ended(self) -> str: ...


class Server:
    """Valkey or Redis, started here."""

    name = "Valkey"

    def __init__(self, folder: Path, port: int | None) -> None:
        """`port` is tried first, then any other; None is any."""
        self._folder, self._port = folder, port
        self._server: Valkey | None = None

    def start(self) -> None:
        if self._server is not None:
            self._server.restart()
            return
        try:
            self._server = Valkey.start(self._folder, port=self._port)
        except PortTaken:
            self._server = Valkey.start(self._folder)

    def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    @property
    def url(self) -> str:
        return self._server.url if self._server else ""

    @property
    def alive(self) -> bool:
        return self._server is not None and self._server.alive

    def how_it_ended(self) -> str:
        return self._server.how_it_ended() if self._server else "never started"


class Process:
    """What the model and the worker have in common: a child with a log."""

    name = "a process"

    def __init__(self, log: Path) -> None:
        self.log = log
        self._child: guard.Child | None = None
        self._logged = 0  # bytes, when the current child was started

    def start(self) -> None:
        raise NotImplementedError

    def stop(self, patience: float | None = _STOP_PATIENCE) -> None:
        """SIGTERM, and SIGKILL after `patience` seconds; None waits as long as it takes."""
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(patience)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if self._child.stdout:
            self._child.stdout.close()

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def how_it_ended(self) -> str:
        return guard.how_it_ended(self._child) if self._child else "never started"

    def tail(self) -> str:
        """The last lines it logged since it was started."""
        return guard.tail(self.log, since=self._logged)

    def _spawn(
        self, command: Sequence[str], environ: Mapping[str, str] | None = None, *, read_stdout: bool = False
    ) -> guard.Child:
        self.stop(patience=0)  # what is left of an earlier one that did not become ready
        self._logged = self.log.stat().st_size if self.log.exists() else 0
        self._child = guard.spawn(command, log=self.log, environ=environ, read_stdout=read_stdout)
        return self._child

    def _failed(self, patience: float) -> PartFailed:
        what = f"was not ready within {patience:g} s" if self.alive else f"ended at its start, {self.how_it_ended()}"
        tail = self.tail()
        self.stop(patience=0)
        return PartFailed(f"{self.name} {what}; its log is {self.log}", tail)


class Model(Process):
    """The local model. `url` is its base URL, the same after every start."""

    name = "the model"

    def __init__(self, log: Path) -> None:
        super().__init__(log)
        self.url = ""
        self._port = "0"

    def start(self) -> None:
        command = [sys.executable, "-m", "local.model", "--port", self._port]
        child = self._spawn(command, read_stdout=True)
        assert child.stdout is not None
        # Readable means that the line is there, or that the end is: the child died.
        readable = select.select([child.stdout], (), (), _MODEL_PATIENCE)[0]
        line = child.stdout.readline() if readable else b""
        if not line:
            self._reap_if_ending(bool(readable))
            raise self._failed(_MODEL_PATIENCE)
        self.url = line.decode().strip()
        self._port = self.url.rpartition(":")[2].removesuffix("/v1")

    def _reap_if_ending(self, at_end_of_file: bool) -> None:
        """A child whose stdout has ended is about to end, and then says how."""
        if at_end_of_file and self._child:
            self._child.wait(_STOP_PATIENCE)


class Worker(Process):
    """One worker. It is ready when RQ knows it."""

    name = "the worker"

    def __init__(self, log: Path, command: Sequence[str], environ: Mapping[str, str]) -> None:
        super().__init__(log)
        self._command, self._environ = command, environ

    def start(self) -> None:
        # A new name each time: RQ refuses one whose owner was killed until its record has expired.
        name = f"local-{token_hex(4)}"
        child = self._spawn([*self._command, "--name", name], self._environ)
        deadline = time.monotonic() + _WORKER_PATIENCE
        try:
            while not self._is_known(name):
                if child.poll() is not None or time.monotonic() > deadline:
                    raise self._failed(_WORKER_PATIENCE)
                time.sleep(_POLL)
        except RedisUnavailable as error:
            self.stop(patience=0)
            raise PartFailed(f"whether {self.name} is ready cannot be seen: {error}") from None

    def _is_known(self, name: str) -> bool:
        url = self._environ["REDIS_URL"]
        with connect(url) as connection, translated(url):
            return bool(connection.exists(_REGISTRATION.format(name)))


def check_redis(url: str) -> None:
    """Raise PartFailed unless the Redis that was given answers."""
    try:
        with connect(url) as connection, translated(url):
            connection.ping()
    except RedisUnavailable as error:
        raise PartFailed(f"REDIS_URL is set, but {error}; or unset it, and a server is started here") from None
