"""After a job's end its log is moved into large packs, in bounded steps, in the background.

A job that ends is noted by the script that ends it, so that whatever dies, the next worker finds what is left to do.
"""

from __future__ import annotations

import asyncio
from typing import Final

import redis.exceptions
import structlog

from millstream import calls
from millstream.async_client import AsyncClient
from millstream.errors import RedisUnavailable
from millstream.job import ids_among, is_id

EVERY: Final = 1.0
"""Seconds between looks when there is nothing to do."""

BATCH: Final = 50

log = structlog.get_logger()


class Repacker:
    """Takes ended jobs in the order of their ends. Several at once do no harm: a step takes up where the last ended."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                busy = await self._look()
            except (RedisUnavailable, redis.exceptions.RedisError):
                busy = False
            if not busy:
                await asyncio.sleep(EVERY)

    async def _look(self) -> bool:
        keys = self._client.keys
        noted = await self._client.redis.zrange(keys.repack, 0, BATCH - 1)
        if strange := [member for member in noted if not is_id(member)]:
            await self._client.redis.zrem(keys.repack, *strange)
        found = ids_among(noted)
        for job_id in found:
            while await self._client.run(calls.repack(keys, job_id)) == "more":
                pass  # each step is a call of its own, between which whoever waits is served
        return len(noted) == BATCH
