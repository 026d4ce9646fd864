"""The surroundings of a measurement, all on one core: Valkey, the stub upstream and the subscriber."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import msgspec
import redis

from local import valkey

from . import proc
from .processes import Processes
from .toolchain import BenchError, build_stub


class Valkey:
    """A private Valkey as the guarantees want it, for baseline and product alike: noeviction, AOF with `everysec`.

    Automatic AOF rewrites are off, so that no run pays for what another has written.
    """

    OPTIONS: Final = ("--auto-aof-rewrite-percentage", "0")

    def __init__(self, server: valkey.Valkey, core: int) -> None:
        proc.pin([server.pid], core)
        self.pid, self.url = server.pid, server.url
        self.host, self.port = valkey.HOST, server.port
        self.client = redis.Redis.from_url(server.url, decode_responses=True)

    def info(self) -> dict[str, Any]:
        return dict(self.client.info("everything"))

    def cpu_us(self) -> int:
        """User and system time of the server, us, by its own account."""
        info = dict(self.client.info("cpu"))
        return round((float(info["used_cpu_user"]) + float(info["used_cpu_sys"])) * 1e6)


class Stub:
    """The upstream: see stub.c. With `tls` it speaks TLS, and `ca` is the certificate to trust."""

    def __init__(self, processes: Processes, core: int, *, tls: bool = False) -> None:
        argv = [str(build_stub(tls=tls))]
        self.ca: Path | None = processes.folder / "stub.pem" if tls else None
        self.process = processes.start("stub", argv + ([str(self.ca)] if self.ca else []), core=core, talk=True)
        assert self.process.stdout is not None
        word, _, port = self.process.stdout.readline().partition(" ")
        if word != "ready":
            raise BenchError(f"the stub did not start:\n{processes.tail('stub')}")
        self.port = int(port)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}/v1"
        self._trust = ssl.create_default_context(cafile=str(self.ca)) if self.ca else None
        self._http = self.connect()

    def connect(self) -> http.client.HTTPConnection:
        """A fresh connection to it."""
        if self._trust:
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=self._trust)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def _get(self, path: str) -> Any:
        self._http.request("GET", path)
        return json.loads(self._http.getresponse().read())

    def stats(self) -> dict[str, int]:
        return dict(self._get("/stats"))

    def go(self) -> None:
        """Starts every held stream."""
        self._get("/go")

    def finish(self) -> None:
        """Ends every running stream as a model would."""
        self._get("/finish")

    def close(self) -> None:
        """Gives up the connection its words go over; whoever started the process ends it."""
        self._http.close()

    def environment(self) -> dict[str, str]:
        """What a process needs to reach this upstream with the openai package."""
        trust = {"SSL_CERT_FILE": str(self.ca)} if self.ca else {}
        return {"OPENAI_BASE_URL": self.url, "OPENAI_API_KEY": "sk-bench", **trust}


class Heard(msgspec.Struct, frozen=True):
    """What the subscriber heard since it was asked last; jobs, ended, gaps, duplicates and odd since its start."""

    chunks: int
    events: int
    p50_us: int
    p99_us: int
    max_us: int
    jobs: int
    ended: int
    completed: int
    gaps: int
    duplicates: int
    odd: int
    cpu_us: int


class Subscriber:
    """The subscriber process: `python -m bench.subscriber`."""

    def __init__(self, processes: Processes, core: int, valkey: Valkey, pattern: str) -> None:
        argv = [sys.executable, "-m", "bench.subscriber", valkey.host, str(valkey.port), pattern]
        env = {"PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)}
        self._processes = processes
        self.process: subprocess.Popen[str] = processes.start("subscriber", argv, core=core, env=env, talk=True)
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(timeout=5)
            self._processes.check()
        return line

    def _ask(self, word: str) -> Heard:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return msgspec.json.decode(self._answer(), type=Heard)

    def look(self) -> Heard:
        return self._ask("look")

    def take(self) -> Heard:
        """As `look`, and the counts and latencies begin anew."""
        return self._ask("take")


ROOT = Path(__file__).parent.parent
"""The checkout, where `python -m worker` is run from."""
