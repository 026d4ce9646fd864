"""What a course may ask, answered by a few dictionaries: jobs, their one-pack logs, and a capped feed of endings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
import redis.exceptions

from millstream import Settings
from millstream.batch.answer import Answer
from millstream.batch.course import Course, Hand, Listen, Pipe, Sleep, Take
from millstream.batch.source import Source
from millstream.errors import RedisUnavailable
from millstream.scripts import NAMES, load

CAP: Final = 4
"""Entries the feed keeps."""

_SCRIPTS: Final = {load(name, header=True).sha: name for name in NAMES}


def job_in(key: str) -> str:
    found = re.search("{(.*)}", key)
    assert found
    return found.group(1)


class Model:
    """Redis as far as a batch sees it. `now` is its clock and everybody's."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.jobs: dict[str, str] = {}
        self.asked: Counter[str] = Counter()
        """How often each job was created."""
        self.most = 0
        """The most jobs there were at once."""
        self.feed: list[tuple[bytes, dict[bytes, bytes]]] = []
        self.full: bool | str = False
        """Whether it refuses rows: true as a server at maxmemory does, `nearly` as the script does before."""
        self._endings = 0

    @property
    def open(self) -> list[str]:
        return [job for job, status in self.jobs.items() if status == "queued"]

    def end(self, job: str, status: str = "completed") -> None:
        self.jobs[job] = status
        self._endings += 1
        self.feed.append((f"{self._endings}-0".encode(), {b"id": job.encode(), b"status": status.encode()}))
        del self.feed[:-CAP]

    def submit(self, job: str) -> list[bytes] | Exception:
        if job in self.jobs:
            return [b"exists", self.jobs[job].encode()]
        if self.full == "nearly":
            return [b"full", b"9", b"10"]
        if self.full:
            return redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
        self.jobs[job] = "queued"
        self.asked[job] += 1
        self.most = max(self.most, len(self.jobs))
        return [b"created", b"queued"]

    def cancel(self, job: str) -> list[bytes]:
        if job not in self.jobs:
            return [b"unknown"]
        if self.jobs[job] != "queued":
            return [b"closed", self.jobs[job].encode()]
        self.end(job, "cancelled")
        return [b"cancelled"]

    def forget(self, job: str) -> list[bytes]:
        assert self.jobs.get(job) != "queued", "an open job is never dropped"
        return [b"unknown" if self.jobs.pop(job, None) is None else b"forgotten"]

    def log(self, job: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
        status = self.jobs.get(job, "queued")
        if status == "queued":
            return []
        text, code = f"answer of {job}", status
        end: dict[str, Any] = {"type": status, "finish_reasons": {"0": "stop"}}
        if status == "failed":
            end["error"] = {"code": code, "message": "scripted"}
        items = [{"type": "started", "model": "m"}, text, end]
        return [(b"3-0", {b"a": b"1", b"t": b"1000", b"e": msgspec.json.encode(items)})]


class Pipeline:
    """Takes commands as redis-py's pipeline does; `execute` gives their replies."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._commands: list[Callable[[], Any]] = []

    def evalsha(self, sha: str, _count: int, *args: Any) -> None:
        name, model = _SCRIPTS[sha], self._model
        job = job_in(next(arg for arg in args if isinstance(arg, str) and "{" in arg))
        self._commands.append(lambda: getattr(model, name)(job))

    def xrevrange(self, _key: str, count: int) -> None:
        self._commands.append(lambda: self._model.feed[::-1][:count])

    def hmget(self, key: str, *fields: Any) -> None:
        def state() -> list[bytes | None]:
            status = self._model.jobs.get(job_in(key))
            known = {"status": status and status.encode(), "seq": status and b"3"}
            names = fields[0] if not isinstance(fields[0], str) else fields
            return [known.get(name) or None for name in names]

        self._commands.append(state)

    def xrange(self, key: str, **_: Any) -> None:
        self._commands.append(lambda: self._model.log(job_in(key)))

    def execute(self) -> list[Any]:
        return [command() for command in self._commands]


def unavailable() -> RedisUnavailable:
    error = RedisUnavailable("Redis at here cannot be reached")
    error.__cause__ = redis.exceptions.ConnectionError("gone")
    return error


class Run:
    """One producer's life: a course on a model, whose asks the test answers one at a time."""

    def __init__(self, model: Model, source: Source, window: int, **options: Any) -> None:
        settings = Settings()
        self.course = Course(settings.keys, settings, window, clock=lambda: model.now, **options)
        self._model, self._source = model, source

    def lists(self, around: Callable[[], bool] = lambda: False) -> Iterator[list[Answer]]:
        """The answers it hands over. `around()` is called at each ask: the world moves, and true loses the reply."""
        steps = self.course.steps()
        reply: Any = None
        while True:
            try:
                ask = steps.throw(reply) if isinstance(reply, RedisUnavailable) else steps.send(reply)
            except StopIteration:
                return
            reply = None
            lost = around()
            if isinstance(ask, Hand):
                yield ask.answers
            elif isinstance(ask, Take):
                reply = self._source.take(ask.most)
            elif isinstance(ask, Sleep):
                self._model.now += ask.seconds
            else:
                reply = self._reply(ask)
                if lost:
                    reply = unavailable()

    def _reply(self, ask: Pipe | Listen) -> Any:
        if isinstance(ask, Pipe):
            pipe = Pipeline(self._model)
            ask.fill(pipe)
            return pipe.execute()
        self._model.now += ask.seconds
        after = int(ask.cursor.partition("-")[0])
        return [entry for entry in self._model.feed if int(entry[0].partition(b"-")[0]) > after]
