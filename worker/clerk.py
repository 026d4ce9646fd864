"""Keeps RQ's books beside the loop: what began and what ended, in batches, from one thread.

The books are for people and dashboards. When Redis is away they wait; the log is the truth meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import redis.exceptions
import structlog

from .rq_worker import Entry, StreamWorker

GATHER: Final = 0.02
"""Seconds between batches: ends of short jobs come in crowds, and a batch costs three round trips whatever its size."""

MAX_BATCH: Final = 200
AWAY: Final = 1.0
"""Seconds between tries while Redis is away."""

BEAT: Final = 20.0
"""Seconds between heartbeats towards RQ, a third of the time after which RQ takes an execution for abandoned."""

log = structlog.get_logger()


class Clerk:
    """Collects entries and writes them down."""

    def __init__(self, worker: StreamWorker) -> None:
        self._worker = worker
        self._started: list[Entry] = []
        self._ended: list[tuple[Entry, str]] = []
        self._work = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="clerk")

    def started(self, entry: Entry) -> None:
        """This entry's job runs now."""
        self._started.append(entry)
        self._work.set()

    def ended(self, entry: Entry, status: str) -> None:
        """This entry needs nothing more."""
        self._ended.append((entry, status))
        self._work.set()

    async def do(self, work: Callable[..., Any], *args: Any) -> Any:
        """Run something of the worker in the clerk's thread, after what is there already."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._work.wait()
            await asyncio.sleep(GATHER if await self.flush() else AWAY)

    async def flush(self) -> bool:
        """Write everything collected so far; whether Redis took it."""
        self._work.clear()
        while self._started or self._ended:
            started, ended = self._started[:MAX_BATCH], self._ended[:MAX_BATCH]
            # Out of the lists first: whoever cancels this does not stop the thread, and nothing is to be written twice.
            del self._started[: len(started)], self._ended[: len(ended)]
            try:
                await asyncio.shield(self.do(self._worker.book, started, ended))
            except redis.exceptions.RedisError as error:
                self._started[:0], self._ended[:0] = started, ended
                if isinstance(error, redis.exceptions.WatchError):
                    continue  # a dependent came meanwhile: look again
                log.warning("rq.books_wait", reason=str(error)[:200], waiting=len(self._started) + len(self._ended))
                self._work.set()
                return False
        return True

    async def beat(self) -> None:
        """RQ's heartbeats and maintenance, until cancelled."""
        while True:
            try:
                await self.do(self._worker.beat)
            except redis.exceptions.RedisError as error:
                log.warning("rq.heartbeat_missed", reason=str(error)[:200])
            try:
                await self.do(self._worker.maintain)
            except Exception as error:  # noqa: BLE001 - RQ's code on what anybody may have written into its keys
                log.warning("rq.maintenance_failed", reason=f"{type(error).__name__}: {error}"[:200])
            await asyncio.sleep(BEAT)

    async def close(self) -> None:
        """Write what is left, sign off; not both in vain, since each takes the retries of a client (3 s)."""
        if await self.flush():
            try:
                await self.do(self._worker.teardown)
            except redis.exceptions.RedisError as error:
                log.warning("rq.sign_off_failed", reason=str(error)[:200])
        self._thread.shutdown(wait=False)
