"""The producer as a process: on pipes, or on a terminal of its own; and the server it talks to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import secrets
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from millstream import Client, Settings
from tests.worker_process import PATIENCE

ROOT = Path(__file__).parents[2]


def wait_until(holds: Callable[[], Any]) -> None:
    """Return as soon as `holds()` does."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold"
        time.sleep(0.005)


class Room:
    """A prefix of its own on a server: a client in this process, and commands as processes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.prefix = f"t-{secrets.token_hex(4)}"
        self.client = Client(settings=Settings(redis_url=url, prefix=self.prefix))

    def environment(self, **more: str) -> dict[str, str]:
        """What a command is started with, and nothing else of ours."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPYCACHEPREFIX") if name in os.environ}
        return (
            kept | {"REDIS_URL": self.url, "MILLSTREAM_PREFIX": self.prefix, "TERM": "xterm", "LANG": "C.UTF-8"} | more
        )

    def start(self, *argv: str, env: dict[str, str] | None = None, **how: Any) -> subprocess.Popen[bytes]:
        """The command on pipes, running."""
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, "-m", "producer", *argv]
        return subprocess.Popen(command, cwd=ROOT, env=self.environment(**(env or {})), **{**pipes, **how})

    @contextlib.contextmanager
    def running(self, *argv: str, **how: Any) -> Iterator[subprocess.Popen[bytes]]:
        """The command on pipes; it does not outlive the block, whatever fails there."""
        with self.start(*argv, **how) as process:
            try:
                yield process
            finally:
                process.kill()

    def run(
        self, *argv: str, stdin: bytes = b"", env: dict[str, str] | None = None, **how: Any
    ) -> subprocess.CompletedProcess[bytes]:
        """The command on pipes, to its end."""
        with self.running(*argv, env=env, **how) as process:
            out, err = process.communicate(stdin, timeout=PATIENCE)
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def followed(self, job_id: str) -> None:
        """Return when somebody is subscribed to the job."""
        channel = self.client.keys.chunks(job_id)
        wait_until(lambda: self.client.redis.pubsub_numsub(channel)[0][1] > 0)


def read_until(stream: Any, ending: bytes) -> bytes:
    """What a pipe gave, up to and with `ending`."""
    read, deadline = b"", time.monotonic() + PATIENCE
    while not read.endswith(ending):
        assert time.monotonic() < deadline, f"expected {ending!r}, got {read!r}"
        if select.select([stream], [], [], 0.1)[0]:
            more = os.read(stream.fileno(), 1)
            assert more, f"expected {ending!r}, it ended with {read!r}"
            read += more
    return read


def is_silent(stream: Any) -> bool:
    """Whether a pipe has nothing to give now."""
    return not select.select([stream], [], [], 0)[0]


class Screen:
    """A command on a terminal of its own, 80 columns by 24 lines, with somebody looking at it all the time."""

    def __init__(self, room: Room, *argv: str, **env: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        how = {"stdin": slave, "stdout": slave, "stderr": slave, "start_new_session": True}
        self.process = room.start(*argv, env=env, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), **how)
        os.close(slave)
        self._raw = b""
        self._reader = threading.Thread(target=self._look)
        self._reader.start()

    @property
    def raw(self) -> str:
        """Everything that was written so far."""
        return self._raw.decode(errors="replace")  # the last character may be on its way

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def to_the_end(self) -> str:
        """Everything that was written until the command ended."""
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return self.raw

    def _look(self) -> None:
        """Without a reader a terminal takes 4 KB and then makes the command wait."""
        with contextlib.suppress(OSError):  # Linux's word for: the last one has closed the other side
            while more := os.read(self._master, 65_536):
                self._raw += more

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE)
        os.close(self._master)
