"""Brings back the jobs nobody works on: leases that ran out at once, vanished deliveries after long patience.

Every worker sweeps; the script rescores what it hands out, so that several sweeps take different jobs. A process
sweeps only after a whole lease of unbroken connection: after an outage of Redis the living holders must get to renew
first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any, Final

import redis.exceptions
import structlog

from millstream import calls
from millstream.async_client import AsyncClient
from millstream.calls import patience_ms
from millstream.delivery import job_of, queue_key
from millstream.errors import RedisUnavailable
from millstream.job import ids_among, is_id
from millstream.keys import LANES, text_of
from millstream.redis_door import passes, translated

EVERY: Final = 1.0
BATCH: Final = 200

log = structlog.get_logger()


class Sweeper:
    """Looks at the open jobs that are due."""

    def __init__(self, client: AsyncClient, upstreams: Collection[str] = ()) -> None:
        self._client = client
        self._upstreams = upstreams  # those whose lines this worker serves
        self._healthy_since: float | None = None

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        lease = self._client.settings.lease
        told = False
        while True:
            await asyncio.sleep(min(EVERY, lease / 4))
            asked = loop.time()
            try:
                with translated(self._client.settings.redis_url):
                    due = await self._due()
                    # A look that took long outlasted an outage, by the retries below it: no unbroken connection.
                    if self._healthy_since is None or loop.time() - asked > lease / 4:
                        self._healthy_since = loop.time()
                    if loop.time() - self._healthy_since >= lease:
                        if due:
                            await self._sweep(due)
                        told = False
            except RedisUnavailable as error:
                self._healthy_since = None
                if not (told or passes(error)):  # an outage is the writer's to tell
                    log.warning("sweep.failed", reason=str(error)[:200])
                    told = True

    async def _due(self) -> list[str]:
        # A script that may write: a replica or a disk in trouble still answers reads while no holder can renew.
        await self._client.run(calls.sweep(self._client.keys, self._client.settings.lease, (), {}))
        pipe = self._client.redis.pipeline(transaction=False)
        pipe.time()
        pipe.zrange(self._client.keys.open, 0, BATCH - 1, withscores=True)
        (seconds, micros), scored = await pipe.execute()
        now = seconds * 1000 + micros // 1000
        due = [member for member, score in scored if score <= now]
        if strange := [member for member in due if not is_id(member)]:
            await self._client.redis.zrem(self._client.keys.open, *strange)
        return ids_among(due)

    async def _sweep(self, due: list[str]) -> None:
        keys, lease = self._client.keys, self._client.settings.lease
        oldest = {lane: await self._oldest(lane) for lane in LANES}
        found = await self._client.run(calls.sweep(keys, lease, due, oldest, await self._lines(due)))
        await self._client.run_many(
            [calls.redeliver(keys, job_id, lane, last=why == "due") for job_id, lane, why in found]
        )
        for job_id, lane, why in found:
            log.info("sweep.delivered_again", job=job_id, lane=lane, because=why)

    async def _lines(self, due: list[str]) -> dict[str, str]:
        """The lines of limits in which some of the due jobs wait, but for those that nobody serves."""
        keys = self._client.keys
        pipe = self._client.redis.pipeline(transaction=False)
        pipe.time()
        pipe.zrange(keys.waiting, 0, -1, withscores=True)
        for job_id in due:
            pipe.hget(self._client.keys.state(job_id), "line")
        clock, waiting, *found = await pipe.execute(raise_on_error=False)
        served = self._served(clock, waiting)
        named = [(job_id, text_of(line)) for job_id, line in zip(due, found, strict=True) if isinstance(line, bytes)]
        return {job_id: line for job_id, line in named if line in served}

    def _served(self, clock: Any, waiting: Any) -> set[str]:
        """The lines that somebody serves.

        Not one that no worker could know of, nor one of an upstream that is none of this worker's and that nobody else
        has asked for long after its time: it was taken out of the settings, or has another name now.
        """
        if not isinstance(clock, tuple | list) or not isinstance(waiting, list):
            return set()
        settings, keys = self._client.settings, self._client.keys
        old = clock[0] * 1000 - patience_ms(settings.lease)
        names = [
            name for name, at in ((text_of(name), at) for name, at in waiting)
            if at > old or name.partition("/")[0] in self._upstreams
        ]  # fmt: skip
        return {keys.line(name, lane) for name in names for lane in LANES}

    async def _oldest(self, lane: str) -> int | None:
        """Since when the first delivery of a lane has its place (ms), 0 when unknown; None for an empty lane."""
        keys, connection = self._client.keys, self._client.redis
        try:
            if not (head := await connection.lindex(queue_key(keys, lane), 0)):
                return None
            job_id = job_of(text_of(head))
            times = await connection.hmget(keys.state(job_id), "queued", "created") if job_id else []
        except redis.exceptions.NoPermissionError:
            raise
        except redis.exceptions.ResponseError:  # somebody else's data under one of the names
            times = []
        # Nobody knows how old a head is whose job is gone: whoever serves the lane takes it away; until then all wait.
        return next((int(each) for each in times if each and each.isdigit()), 0)
