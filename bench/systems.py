"""What can be put under test: the product, the naive baseline, and the floor. Each is processes that stream jobs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from rq import Queue

from . import proc
from .servers import ROOT

if TYPE_CHECKING:
    import subprocess

    from .world import World


class System(Protocol):
    """Processes under test.

    `pattern` is where its chunks are published, None where they are not; `jobs_before` is how many jobs `start` runs.
    """

    name: ClassVar[str]
    pattern: ClassVar[str | None]
    jobs_before: ClassVar[int]

    def start(self, world: World, streams: int) -> None:
        """Starts it with room for so many streams; returns once it would take a job."""

    def submit(self, model: str) -> str:
        """Hands it one job; returns the job's id."""

    def pids(self) -> list[int]:
        """All its processes now."""


def environment(world: World) -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {"REDIS_URL": world.valkey.url, "PYTHONPATH": path, **world.stub.environment()}


class Product:
    """`python -m worker`, one process. `settings` are further variables of its environment."""

    name: ClassVar[str] = "product"
    pattern: ClassVar[str | None] = "millstream:*:chunks"
    jobs_before: ClassVar[int] = 1

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        self._settings = dict(settings or {})
        self._process: subprocess.Popen[str] | None = None

    def start(self, world: World, streams: int) -> None:
        from millstream import Client

        self.client = Client(redis_url=world.valkey.url)
        self._process = self.spawn(world, streams)
        # Ready is what has done something: the first job pays the lazy imports and the first connections.
        first = self.submit("stub:rate=0,chunks=1")

        def ended() -> bool:
            return str(self.client.status(first).status) == "completed"

        world.processes.wait_until("the worker's first job to complete", ended, seconds=60)

    def spawn(self, world: World, streams: int, *more: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "worker", "--streams", str(streams), *more]
        return world.processes.start("worker", argv, env={**environment(world), **self._settings})

    def submit(self, model: str) -> str:
        return str(self.client.submit("Write a quicksort", model=model).id)

    def pids(self) -> list[int]:
        assert self._process is not None
        return proc.tree([self._process.pid])


class Naive:
    """Stock `rq worker` processes, one per stream, running `bench.naive.complete`."""

    name: ClassVar[str] = "naive"
    pattern: ClassVar[str | None] = "naive:*:chunks"
    jobs_before: ClassVar[int] = 0

    def __init__(self) -> None:
        self._workers: list[subprocess.Popen[str]] = []
        self._jobs = 0

    def start(self, world: World, streams: int) -> None:
        import redis

        # RQ's own serializer writes bytes: a connection that does not decode.
        self.queue = Queue("naive", connection=redis.Redis.from_url(world.valkey.url))
        self._workers = [self.spawn(world) for _ in range(streams)]

        def registered() -> bool:
            return world.valkey.client.scard("rq:workers") == streams

        world.processes.wait_until(f"{streams} rq workers to register", registered, seconds=120)

    def spawn(self, world: World, *more: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "rq.cli", "worker", "--url", world.valkey.url, "--quiet", *more, "naive"]
        return world.processes.start("rq", argv, env=environment(world))

    def submit(self, model: str) -> str:
        self._jobs += 1
        name = f"job{self._jobs}"
        self.queue.enqueue("bench.naive.complete", name, model, job_timeout=3600)
        return name

    def pids(self) -> list[int]:
        return proc.tree(worker.pid for worker in self._workers)


class Floor:
    """`bench.floor`: the requests alone."""

    name: ClassVar[str] = "floor"
    pattern: ClassVar[str | None] = None
    jobs_before: ClassVar[int] = 0

    def start(self, world: World, streams: int) -> None:
        self._process = self.spawn(world, streams)

    def spawn(self, world: World, streams: int) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "bench.floor", str(streams)]
        process = world.processes.start("floor", argv, env=environment(world), talk=True)
        assert process.stdout is not None
        if not process.stdout.readline():
            process.wait(timeout=5)
            world.processes.check()
        return process

    def submit(self, model: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(model + "\n")
        self._process.stdin.flush()
        return model

    def pids(self) -> list[int]:
        return proc.tree([self._process.pid])


def named(name: str, settings: Mapping[str, str] | None = None) -> Any:
    """A fresh system by its name."""
    return Product(settings) if name == "product" else Naive() if name == "naive" else Floor()
