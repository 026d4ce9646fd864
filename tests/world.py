"""The world of a live test: a real server, a scripted upstream, real workers, and a look at what they left behind.

The fixtures that make worlds are in tests/conftest.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from local import guard
from millstream import Client, Event, Result, Settings
from millstream.events import AnyEvent, Chunk, Started, unpack
from tests.oracle import check_consumers, check_keys, check_log
from tests.tally import TALLY
from tests.upstream import DEFAULT_CHUNKS, Exchange, ScriptedUpstream, expected_text, seed_of
from tests.worker_process import PATIENCE, PROGRAM, WorkerProcess, wait_until

LEASE: Final = 2.0
"""Seconds, short so that a lost lease is found soon; the smallest that two busy cores renew without fail."""

SHORTEST: Final = 1.0
"""Seconds, for tests that wait for four leases to pass and hold none meanwhile."""

KEY: Final = "sk-canary-3f1c0a77d2"
"""The upstream's key. It may be in the workers' environment and in the requests, and nowhere else."""

SHORT: Final = {
    "OPENAI_API_KEY": KEY,
    "MILLSTREAM_MODEL": "scripted",
    "MILLSTREAM_LEASE": f"{LEASE:g}",
    "MILLSTREAM_GRACE": "20",
    "MILLSTREAM_CONNECT_TIMEOUT": "1",
    "MILLSTREAM_BREAKER": "0",  # tests about failing upstreams share a worker; those about the breaker turn it on
}


def timeless(events: Iterable[AnyEvent]) -> list[AnyEvent]:
    """The events with no time in them."""
    return [msgspec.structs.replace(event, at=0.0) for event in events]


def table(name: str, base_url: str, more: str = "") -> str:
    """An upstream in a file of several."""
    return f'[upstreams."{name}"]\nbase_url = "{base_url}"\n{more}\n'


def starts(log: list[AnyEvent]) -> list[tuple[int, str, str | None]]:
    """Attempt, upstream and reason of every beginning in a log."""
    return [(each.attempt, each.upstream, each.reason) for each in log if isinstance(each, Started)]


class World:
    """One Redis, one upstream and any number of workers."""

    def __init__(self, url: str, upstream: ScriptedUpstream, folder: Path, **environ: str) -> None:
        self.url = url
        self.upstream = upstream
        self.environ = {**SHORT, "REDIS_URL": url, "OPENAI_BASE_URL": upstream.base_url, **environ}
        self.settings = Settings.from_env(self.environ)
        self.client = Client(settings=self.settings)
        self.redis: Any = self.client.redis
        self.keys = self.settings.keys
        self.workers: list[WorkerProcess] = []
        self._folder = folder

    def start(self, *arguments: str, program: Sequence[str] = PROGRAM, **environ: str) -> WorkerProcess:
        """A worker on its way; `ready()` waits for it. `program` is another way to the same worker."""
        log = self._folder / f"worker-{len(self.workers) + 1}.log"
        worker = WorkerProcess(log, {**self.environ, **environ}, arguments, program)
        self.workers.append(worker)
        return worker

    def worker(self, *arguments: str, program: Sequence[str] = PROGRAM, **environ: str) -> WorkerProcess:
        """A worker that takes jobs."""
        return self.start(*arguments, program=program, **environ).ready()

    def make_client(self) -> Client:
        """A client of one's own, for a thread."""
        return Client(settings=self.settings)

    def submit(self, prompt: str, **asked: Any) -> str:
        return self.client.submit(prompt, **asked).id

    def cancel(self, job_id: str) -> str:
        TALLY.cancels += 1
        return self.client.cancel(job_id)

    def status(self, job_id: str) -> str:
        return self.client.status(job_id).status

    def outcome(self, job_id: str, within: float = PATIENCE) -> Result:
        return self.client.outcome(job_id, within)[0]

    def now(self) -> float:
        """The server's clock, by which events have their `at`: a test that is slow to look does not count."""
        seconds, micros = self.redis.time()
        return float(seconds) + float(micros) / 1e6

    def began_at(self, job_id: str, attempt: int = 1) -> float:
        """When this attempt of an ended job began, by the server's clock."""
        [found] = [
            each.at for each in self.client.follow(job_id) if isinstance(each, Started) and each.attempt == attempt
        ]
        return found

    def seq(self, job_id: str) -> int:
        return int(self.redis.hget(self.keys.state(job_id), "seq"))

    def wait_for_seq(self, job_id: str, seq: int) -> None:
        wait_until(lambda: self.seq(job_id) >= seq, f"event {seq} of {job_id}")

    def shows(self, job_id: str, attempt: int = 1) -> bool:
        """Whether the newest event is a chunk of this attempt: a break that comes now is no silent retry."""
        entries = self.redis.xrevrange(self.keys.log(job_id), count=1)
        newest = [event for entry in entries for event in unpack(*entry)]
        return bool(newest) and isinstance(newest[-1], Chunk) and newest[-1].attempt == attempt

    def wait_until_shown(self, job_id: str, attempt: int = 1) -> None:
        wait_until(lambda: self.shows(job_id, attempt), f"a chunk of attempt {attempt} of {job_id}")

    def wait_for_status(self, job_id: str, *statuses: str, within: float = PATIENCE) -> str:
        wait_until(lambda: self.status(job_id) in statuses, f"{job_id} is {' or '.join(statuses)}", within)
        return self.status(job_id)

    def starts(self, job_id: str) -> list[tuple[int, str | None]]:
        """Attempt and reason of every `started` of an ended job."""
        return [(each.attempt, each.reason) for each in self.client.follow(job_id) if isinstance(each, Started)]

    def held(self, gate: str, count: int = 1) -> list[Exchange]:
        """The exchanges held at this gate, once there are so many."""
        found: list[Exchange] = self.upstream.journal.wait_for(
            lambda journal: len(held := journal.waiting_for(gate)) >= count and held, PATIENCE
        )
        return found

    def check(self, job_id: str, seen: Iterable[Sequence[Event]] = ()) -> list[AnyEvent]:
        """The oracle on an ended job and what its consumers saw; returns the log, without the times.

        Only the times of events may change, when an ended log is moved into larger packs.
        """
        log = timeless(check_log(self.client, job_id))
        lists = [*seen, list(self.client.follow(job_id))]
        check_consumers(map(timeless, lists), log)
        TALLY.events += len(log) + sum(map(len, lists))
        return log

    def check_text(self, job_id: str, prompt: str, n_chunks: int = DEFAULT_CHUNKS) -> Result:
        """The job is completed and says exactly what the upstream wrote for this prompt."""
        result = self.outcome(job_id)
        assert (result.status, result.error) == ("completed", None)
        assert result.text == expected_text(n_chunks, seed_of(prompt))
        return result

    def last_text(self, job_id: str) -> str:
        """The text of the newest attempt."""
        return self.outcome(job_id).text

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
        self.client.close()

    def tell(self) -> None:
        """Print the end of every worker's log; pytest shows it when the test has failed."""
        for number, worker in enumerate(self.workers, 1):
            sys.stdout.write(f"--- worker {number}, pid {worker.pid}\n{guard.tail(worker.log, lines=60)}\n")

    def check_left(self) -> None:
        """Nothing is open, no worker complained, and every key of ours and every RQ job has a TTL."""
        assert self.redis.zrange(self.keys.open, 0, -1) == []
        complaints = [line for worker in self.workers for line in worker.complaints()]
        assert not complaints, f"workers complained: {complaints}"
        deadline = time.monotonic() + PATIENCE
        while not self._tidy() and time.monotonic() < deadline:  # RQ's books of what ended are written in batches
            time.sleep(0.02)
        check_keys(_WithoutRegistries(self.redis), self.keys)

    def _tidy(self) -> bool:
        try:
            check_keys(_WithoutRegistries(self.redis), self.keys)
        except AssertionError:
            return False
        return True


class _WithoutRegistries:
    """Redis without RQ's registries and what a killed worker leaves in them, which RQ's own maintenance clears."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis

    def __getattr__(self, name: str) -> Any:
        return getattr(self._redis, name)

    def scan_iter(self, pattern: str, **options: Any) -> Iterator[bytes]:
        unfinished = {member.partition(b":")[0] for key in self._redis.scan_iter("rq:wip:*", _type="zset")
                      for member in self._redis.zrange(key, 0, -1)}  # fmt: skip
        taken = {rq_id for key in self._redis.scan_iter("rq:queue:*:intermediate", _type="list")
                 for rq_id in self._redis.lrange(key, 0, -1)}  # fmt: skip
        for key in self._redis.scan_iter(pattern, **options):
            parts = key.split(b":", 2)
            registry = key.startswith((b"rq:wip:", b"rq:finished:", b"rq:failed:", b"rq:clean_registries:"))
            of_a_dead_worker = key.startswith(b"rq:job:") and parts[2] in unfinished | taken
            if not (registry or of_a_dead_worker):
                yield key


@contextmanager
def a_world(url: str, folder: Path, **environ: str) -> Iterator[World]:
    """An empty database, an upstream, and no worker yet; all workers end with it."""
    with ScriptedUpstream(require_key=True) as upstream:
        world = World(url, upstream, folder, **environ)
        world.redis.flushdb()
        try:
            yield world
        finally:
            world.tell()
            world.close()
