"""Producers and consumers: what they ask for, what they are answered, what they hear."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from millstream import AsyncClient
from millstream.errors import JobExpired, JobNotFound, LogRewound, MillstreamError, RedisUnavailable
from millstream.events import Event

from .loop import ACTOR, VirtualLoop
from .weather import Reader, Wanted, Weather

TRIES = 20
WAIT = 60.0
"""Virtual seconds after the weather's end that a reader waits for its job to be accepted."""


@dataclass
class Heard:
    """What one consumer got of one job."""

    who: str
    job_id: str
    steady: bool = False
    """Whether it stays connected as long as it can."""
    resumed: bool = False
    """Whether it went on from a bare number, by which nobody can tell that the log below it was written anew."""
    events: list[Event] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each of them came."""
    done: bool = False
    began: float = 0.0
    lost: str = ""
    """How it was told that data are gone."""


@dataclass
class People:
    """Everybody outside of the workers. `connect` gives the client of a name."""

    loop: VirtualLoop
    rng: random.Random
    weather: Weather
    connect: Callable[[str], AsyncClient]
    note: Callable[..., None]
    accepted: dict[str, float] = field(default_factory=dict)
    cancels: dict[str, list[str]] = field(default_factory=dict)
    heard: list[Heard] = field(default_factory=list)

    async def ask(self, job: Wanted) -> None:
        """Submit a job, and cancel it as the plan says."""
        async with self.connect(str(ACTOR.get())) as client:
            await asyncio.sleep(job.at)
            await asyncio.gather(*(self._submit(client, job) for _ in range(job.submits)))
            for at in job.cancels:
                await asyncio.sleep(max(0.0, at - self.loop.time()))
                await self._cancel(client, job.job_id)

    async def _submit(self, client: AsyncClient, job: Wanted) -> None:
        wanted = {"messages": [{"role": "user", "content": job.job_id}], "id": job.job_id, "model": "m", **job.options}
        for _ in range(TRIES):
            try:
                if job.in_batch:
                    await client.submit_many([wanted])
                else:
                    await client.submit(**wanted)
            except RedisUnavailable:
                await asyncio.sleep(self.rng.random())
            else:
                self.note("user", "accepted", job.job_id)
                self.accepted.setdefault(job.job_id, self.loop.time())
                return

    async def _cancel(self, client: AsyncClient, job_id: str) -> None:
        said = self.cancels.setdefault(job_id, [])
        self.note("user", "cancels", job_id)
        try:
            said.append(await client.cancel(job_id))
        except RedisUnavailable:
            pass  # perhaps it is, perhaps not
        except JobNotFound:
            said.append("JobNotFound")

    # Consumers ---------------------------------------------------------------------------------------------------

    async def read(self, reader: Reader) -> None:
        """Follow a job to its end, or until data are gone."""
        heard = Heard(str(ACTOR.get()), reader.job_id, steady=not reader.every)
        self.heard.append(heard)
        await asyncio.sleep(reader.delay)
        heard.done = not await self._all_accepted([reader.job_id])
        heard.began = self.loop.time()
        async with self.connect(heard.who) as client:
            while not heard.done:
                try:
                    await self._listen(client, heard, reader.every)
                except RedisUnavailable:
                    await asyncio.sleep(0.5)
                except (JobNotFound, JobExpired, LogRewound) as error:
                    self._end(heard, error)

    async def _all_accepted(self, job_ids: Sequence[str]) -> bool:
        while not all(job_id in self.accepted for job_id in job_ids):
            if self.loop.time() > self.weather.until + WAIT:
                return False
            await asyncio.sleep(0.1)
        return True

    async def _listen(self, client: AsyncClient, heard: Heard, every: int) -> None:
        heard.resumed = heard.resumed or bool(heard.events)
        after, count = heard.events[-1].seq if heard.events else 0, 0
        async with aclosing(client.follow(heard.job_id, after)) as events:
            async for event in events:
                self._hear(heard, event)
                if (count := count + 1) == every:
                    return
        heard.done = True

    def _hear(self, heard: Heard, event: Event) -> None:
        self.note(heard.who, "hears", heard.job_id, event.seq, event.type)
        heard.events.append(event)
        heard.times.append(self.loop.time())

    def _end(self, heard: Heard, error: MillstreamError) -> None:
        self.note(heard.who, repr(error))
        heard.lost, heard.done = type(error).__name__, True

    async def read_all(self) -> None:
        """All jobs over one subscription; a cursor for many is one for all, so that it cannot go on where it stood."""
        ids = [job.job_id for job in self.weather.jobs]
        if not await self._all_accepted(ids):
            return
        mine = {job_id: Heard("reader-all", job_id) for job_id in ids}
        self.heard += mine.values()
        async with self.connect("reader-all") as client:
            while not any(each.events for each in mine.values()):
                try:
                    async for job_id, event in client.follow_many(ids):
                        self._hear(mine[job_id], event)
                    break
                except RedisUnavailable:
                    await asyncio.sleep(0.5)
                except (JobNotFound, JobExpired, LogRewound) as error:
                    for each in mine.values():
                        self._end(each, error)
                    break
        for each in mine.values():
            if not each.events or not each.events[-1].terminal:
                each.lost = each.lost or "RedisUnavailable"
            each.done = True
