"""A Valkey or Redis server as a child of this process, on 127.0.0.1 or a unix socket, with AOF and without eviction.

When `start` returns, the server answers. It dies with this process, however that ends.

    with Valkey.start() as server:          # a temporary folder, a free port
        redis.Redis.from_url(server.url)
        server.kill()                       # SIGKILL, as a crash
        server.restart()                    # the same data at the same address
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias

from . import guard
from .errors import LocalError, PartFailed, PortTaken
from .server_binary import find_server

AppendFsync: TypeAlias = Literal["everysec", "always", "no"]

HOST: Final = "127.0.0.1"

# Below the range in which Linux (32768) and macOS (49152) number outgoing connections: while a killed server is away,
# no reconnecting client can be given its port, which would keep it from coming back.
_PORTS: Final = range(20_000, 32_768)
_TRIES: Final = 20
_POLL: Final = 0.004  # seconds
_STOP_PATIENCE: Final = 10.0  # seconds from SIGTERM to SIGKILL; a stop takes 0.1 s, the period of the server's own look
_SOCKET_PATH_MAX: Final = 103  # bytes, macOS; Linux has 107


class Valkey:
    """A server. `start` makes one; leaving the `with` block, or `close`, stops it and removes a temporary folder."""

    def __init__(
        self, folder: Path | None, port: int | None, *, unix: bool, options: Sequence[str],
        environ: Mapping[str, str] | None,
    ) -> None:  # fmt: skip
        """Not for callers: `start` is the way in."""
        self._temporary = tempfile.TemporaryDirectory(prefix="valkey-") if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary else Path(folder or ".").absolute()
        self.log = self.folder / "valkey.log"
        self._port = port
        self._socket = self.folder / "valkey.sock" if unix else None
        self._options = list(options)
        self.environ: Mapping[str, str] = environ or {}
        """Laid over this process's environment at the next start."""
        self._child: guard.Child | None = None

    @classmethod
    def start(
        cls,
        folder: Path | None = None,
        *,
        port: int | None = None,
        unix: bool = False,
        appendfsync: AppendFsync = "everysec",
        options: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        patience: float = 30.0,
    ) -> Self:
        """A server that answers, its data in `folder` (default: a temporary one).

        `port` is the one to listen on (default: any free one), `unix` asks for a socket in the folder instead, and
        `options` are more arguments of the server, such as `("--maxmemory", "64mb")`; `environ` is laid over this
        process's environment. `patience` is in seconds and includes loading the data. Raises PortTaken, PartFailed or
        Missing.
        """
        durable = ("--appendonly", "yes", "--appendfsync", appendfsync, "--save", "")
        options = [*durable, "--maxmemory-policy", "noeviction", *options]
        server = cls(folder, port, unix=unix, options=options, environ=environ)
        try:
            server._start(patience)
        except BaseException:
            server.close()
            raise
        return server

    @property
    def url(self) -> str:
        """As redis-py takes it: `redis://127.0.0.1:PORT/0` or `unix://PATH?db=0`."""
        return f"unix://{self._socket}?db=0" if self._socket else f"redis://{HOST}:{self._port}/0"

    @property
    def port(self) -> int:
        """The one it listens on; 0 where that is a socket."""
        return self._port or 0

    @property
    def pid(self) -> int:
        """The server's process id; after `kill` or `stop` the one it had."""
        return self._running.pid

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def kill(self) -> None:
        """SIGKILL, as a crash; returns when the process is gone. What AOF has not written is lost."""
        self._running.kill()
        self._running.wait()

    def stop(self) -> None:
        """SIGTERM, so that everything is written; returns when the process is gone. `restart` brings it back."""
        self._running.terminate()
        try:
            self._running.wait(_STOP_PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()

    def restart(self, patience: float = 30.0) -> None:
        """Start again on the same folder and address, after a `stop` if it runs. Raises as `start` does."""
        if self.alive:
            self.stop()
        self._start(patience)

    def close(self) -> None:
        """Stop for good and remove a temporary folder. May be called twice."""
        if self.alive:
            self.stop()
        if self._temporary:
            self._temporary.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def how_it_ended(self) -> str:
        """`exit status 1` or `signal 9`."""
        return guard.how_it_ended(self._running)

    @property
    def _running(self) -> guard.Child:
        if self._child is None:
            raise LocalError("this server was never started: make one with Valkey.start()")
        return self._child

    def _start(self, patience: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._socket or self._port is not None:
            self._start_once(patience)
            return
        # The server itself finds out whether a port is free, by listening: any check before that could be overtaken.
        for tries_left in reversed(range(_TRIES)):
            self._port = secrets.choice(_PORTS)
            try:
                self._start_once(patience)
                return
            except PortTaken:
                if tries_left == 0:
                    raise

    def _start_once(self, patience: float) -> None:
        written = self.log.stat().st_size if self.log.exists() else 0
        command = [str(find_server().path), *self._address(), *self._options]
        self._child = guard.spawn(command, log=self.log, environ={**os.environ, **self.environ})
        deadline = time.monotonic() + patience
        while not self._answers(self._child.pid):
            if self._child.poll() is not None:
                raise self._failure(guard.tail(self.log, since=written))
            if time.monotonic() > deadline:
                self.kill()
                raise PartFailed(f"{self.url} did not answer within {patience:g} s", guard.tail(self.log))
            time.sleep(_POLL)

    def _address(self) -> list[str]:
        where = ["--bind", HOST, "--port", str(self._port), "--dir", str(self.folder), "--daemonize", "no"]
        if self._socket is None:
            return where
        if len(os.fsencode(self._socket)) > _SOCKET_PATH_MAX:
            raise LocalError(f"{self._socket} is too long for a socket's path: choose a folder nearer to the root")
        where[3] = "0"
        return [*where, "--unixsocket", str(self._socket), "--unixsocketperm", "700"]

    def _answers(self, pid: int) -> bool:
        """Whether process `pid`, not somebody else at its address, says PONG, which no server says while it loads."""
        said = _ask(self._socket or (HOST, self._port or 0), b"PING\r\nINFO server\r\n", until=rb"process_id:\d+\r\n")
        return said.startswith(b"+PONG") and b"process_id:%d\r\n" % pid in said

    def _failure(self, log_tail: str) -> LocalError:
        bind = re.search(r"listening socket \S+ bind: (.+)", log_tail)
        if bind is None or self._socket is not None:
            return PartFailed(f"the server ended at its start, {self.how_it_ended()}", log_tail)
        return PortTaken(f"cannot listen on {HOST}:{self._port} ({bind[1].strip()}): {_who_listens(self._port or 0)}")


def _ask(address: Path | tuple[str, int], question: bytes, until: bytes) -> bytes:
    """What a server answers until it has said the pattern, is silent for 1 s or hangs up; nothing if nobody listens."""
    said = b""
    try:
        with socket.socket(socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET) as connection:
            connection.settimeout(1.0)
            connection.connect(str(address) if isinstance(address, Path) else address)
            connection.sendall(question)
            while not re.search(until, said) and (more := connection.recv(65_536)):
                said += more
    except OSError:
        pass  # not yet there, or gone again: the caller looks at what was said
    return said


def _who_listens(port: int) -> str:
    said = _ask((HOST, port), b"PING\r\n", until=rb"\r\n")
    if said.startswith(b"+PONG"):
        what, remedy = "a Redis or Valkey server answers there", f"use it (REDIS_URL=redis://{HOST}:{port}/0)"
    elif said.startswith(b"-"):
        what, remedy = "a Redis or Valkey server that asks for a password answers there", "use it by REDIS_URL"
    else:
        what, remedy = "something else listens there", "end it"
    return f"{what}; {remedy} or choose another port"
