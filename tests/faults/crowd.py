"""Many jobs at once, each of whose attempts says something of its own, so that a mixture of two would be seen."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from millstream import Client
from millstream.errors import JobExpired, JobNotFound, LogRewound, RedisUnavailable
from millstream.events import Event
from millstream.job import new_id
from tests.contract.consumers import Consumer
from tests.oracle import check_consumers, check_log
from tests.upstream import Text, answer, expected_text, seed_of
from tests.worker_process import wait_until
from tests.world import World, timeless

ATTEMPTS: Final = 6
"""Answers in store for a prompt; the last one serves all further attempts."""

LOST: Final = (LogRewound, JobExpired, JobNotFound)
"""What a consumer is told when Redis lost what it had acknowledged."""


class Crowd:
    """`count` jobs of `chunks` chunks, one every `pace` seconds."""

    def __init__(self, world: World, name: str, count: int, *, chunks: int = 100, pace: float = 0.015) -> None:
        self.world, self.chunks = world, chunks
        self.prompts = [f"{name} {number}" for number in range(count)]
        for prompt in self.prompts:
            seed = seed_of(prompt)
            world.upstream.on(*(answer(Text(chunks, pace, seed=seed + i)) for i in range(ATTEMPTS)), prompt=prompt)
        made = world.client.submit_many([{"prompt": prompt, "max_attempts": ATTEMPTS} for prompt in self.prompts])
        self.jobs = [job.id for job in made]

    def streams(self, count: int | None = None) -> None:
        """Wait until the answers of the first `count` jobs flow, or of all."""
        wanted = set(self.prompts[:count])
        self.world.upstream.journal.wait_for(
            lambda journal: wanted <= {each.request.prompt for each in journal if each.chunks_sent}, 30
        )

    def texts(self, prompt: str) -> list[str]:
        """What an attempt at it may have said, whole."""
        return [expected_text(self.chunks, seed_of(prompt) + i) for i in range(ATTEMPTS)]

    def check(self, lists: dict[str, list[Sequence[Event]]] | None = None) -> None:
        """Every job is completed and whole, and each of these lists of events equals its log."""
        for job_id, prompt in zip(self.jobs, self.prompts, strict=True):
            result = self.world.outcome(job_id, 60)
            assert (result.status, result.error) == ("completed", None), f"{job_id}: {result}"
            assert result.text in self.texts(prompt), f"{job_id}: no attempt said this: {result.text[:200]!r}"
            self.world.check(job_id, (lists or {}).get(job_id, []))


class Watcher(Consumer):
    """Follows one job; `ended_at` is the moment, by the monotonic clock, when it saw the end."""

    def __init__(self, make: Callable[[], Client], job_id: str) -> None:
        self.job_id = job_id
        self.ended_at: float | None = None
        super().__init__(make, [job_id], on_event=self._note)

    def _note(self, event: Event) -> None:
        if event.terminal:
            self.ended_at = time.monotonic()

    def told(self) -> Exception | None:
        """Wait for its end; what it was told of a loss, or None. Any other error is raised."""
        try:
            self.join()
        except LOST as error:
            return error
        return None

    def check(self, world: World, killed_at: Sequence[float]) -> None:
        """What it saw to the end is the log, unless it had seen the end before a server died that then forgot it."""
        seen = timeless(self.events[self.job_id])
        if self.ended_at is not None and any(self.ended_at < at for at in killed_at):
            return
        check_consumers([seen], timeless(check_log(world.client, self.job_id)))


class Submitter:
    """Submits in a thread without pause and without retries: `accepted` ids were returned, `refused` ones were not."""

    def __init__(self, world: World, make: Callable[[], Client], prompt: str, pause: float = 0.02) -> None:
        self.prompt = prompt
        self.accepted: list[str] = []
        self.refused: list[str] = []
        self._world, self._make, self._pause = world, make, pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="submitter", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._make() as client:
            while not self._stop.wait(self._pause):
                job_id = new_id()
                try:
                    client.submit(self.prompt, id=job_id)
                except RedisUnavailable:
                    self.refused.append(job_id)
                else:
                    self.accepted.append(job_id)

    def wait_for_more(self, count: int) -> None:
        """Until so many more ids were returned from now on."""
        known = len(self.accepted)
        wait_until(lambda: len(self.accepted) >= known + count, f"{count} more submits")

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def check_refused(self) -> int:
        """An id that was not returned is wholly there, and runs, or is not there at all; how many are there."""
        redis, keys = self._world.redis, self._world.keys
        queued = [rq_id.decode() for rq_id in redis.lrange(f"rq:queue:{keys.queue('interactive')}", 0, -1)]
        there = 0
        for job_id in self.refused:
            parts = [redis.exists(keys.spec(job_id)), redis.exists(keys.state(job_id))]
            assert parts in ([1, 1], [0, 0]), f"{job_id} is there by half: spec, state {parts}"
            if parts == [1, 1]:
                there += 1
                self.check_one(job_id)
            else:
                assert redis.zscore(keys.open, job_id) is None, f"{job_id} is open and has no state"
                assert not [each for each in queued if each.startswith(job_id)], f"{job_id} is delivered, with no state"
        return there

    def check_one(self, job_id: str) -> None:
        """The job ran as any other."""
        self._world.check_text(job_id, self.prompt)
        self._world.check(job_id)
