"""When a worker may judge others: only after an unbroken lease of its own connection to Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import redis.exceptions
import structlog

from millstream.calls import Call
from millstream.errors import RedisUnavailable
from millstream.keys import Keys
from worker.sweeper import Sweeper

LEASE = 0.2


class Watched(Sweeper):
    """Finds a job due at every look, of which the `slow`th takes as long as an outage; notes when it sweeps
    for the first time after that."""

    def __init__(self, slow: int) -> None:
        client: Any = SimpleNamespace(settings=SimpleNamespace(lease=LEASE, redis_url="redis://127.0.0.1/0"))
        super().__init__(client)
        self.slow, self.looks = slow, 0
        self.back_at = 0.0
        self.first = asyncio.Event()
        self.swept_at = 0.0

    async def _due(self) -> list[str]:
        self.looks += 1
        if self.looks == self.slow:
            await asyncio.sleep(2 * LEASE)
            self.back_at = asyncio.get_running_loop().time()
        return ["job"]

    async def _sweep(self, due: list[str]) -> None:
        if self.back_at and not self.first.is_set():
            self.swept_at = asyncio.get_running_loop().time()
            self.first.set()


async def test_a_look_that_outlasted_an_outage_begins_the_lease_anew() -> None:
    """The retries below a look may hide an outage: living holders must get to renew before anybody judges them."""
    sweeper = Watched(slow=8)
    task = asyncio.create_task(sweeper.run())
    await sweeper.first.wait()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert sweeper.swept_at - sweeper.back_at >= LEASE


class Replica:
    """Answers reads, with a job that is due, and refuses what may write until promoted; notes the first sweep."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(lease=LEASE, redis_url="redis://127.0.0.1/0")
        self.keys = Keys()
        self.redis: Any = self
        self.promoted_at = 0.0
        self.lines = False
        self.swept_at: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def run(self, call: Call[Any]) -> list[Any]:
        now = asyncio.get_running_loop().time()
        if not self.promoted_at:
            raise RedisUnavailable("Redis is a replica now")
        if self.keys.state("j") in call.keys and not self.swept_at.done():
            self.swept_at.set_result(now)
        return []

    async def run_many(self, calls: Sequence[Call[Any]]) -> list[Any]:
        return [await self.run(each) for each in calls]

    def pipeline(self, *, transaction: bool) -> Replica:
        return self

    def time(self) -> None: ...

    def zrange(self, *_args: Any, **_options: Any) -> None: ...

    def hget(self, *_args: Any) -> None:
        self.lines = True

    async def execute(self, **_options: Any) -> list[Any]:
        lines, self.lines = self.lines, False
        return [(2, 0), [], None] if lines else [(2, 0), [(b"j", 1.0)]]

    async def lindex(self, _key: str, _index: int) -> None:
        return None


async def test_reads_alone_are_no_unbroken_connection() -> None:
    """A demoted server answers them while no holder can renew: the lease begins when it takes writes."""
    replica = Replica()
    client: Any = replica
    task = asyncio.create_task(Sweeper(client).run())
    await asyncio.sleep(2 * LEASE)  # an outage, not a wait for something
    replica.promoted_at = asyncio.get_running_loop().time()
    swept_at = await replica.swept_at
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert swept_at - replica.promoted_at >= LEASE


class Troubled:
    """A server that answers every look as the test says."""

    def __init__(self, *causes: Exception) -> None:
        self.settings = SimpleNamespace(lease=LEASE, redis_url="redis://127.0.0.1/0")
        self.keys = Keys()
        self.left = list(causes)
        self.over = asyncio.Event()

    async def run(self, _call: Call[Any]) -> list[Any]:
        if not self.left:
            self.over.set()
            await asyncio.Event().wait()
        raise self.left.pop(0)


async def test_what_waiting_does_not_mend_is_told_once() -> None:
    """A missing right keeps lost jobs lost: in silence nobody would know. An outage is the writer's to tell."""
    denied = redis.exceptions.NoPermissionError("no right for LINDEX")
    troubled: Any = Troubled(redis.exceptions.ConnectionError("away"), denied, denied)
    with structlog.testing.capture_logs() as said:
        task = asyncio.create_task(Sweeper(troubled).run())
        await troubled.over.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    assert [line["event"] for line in said] == ["sweep.failed"]
    assert "LINDEX" in said[0]["reason"]
