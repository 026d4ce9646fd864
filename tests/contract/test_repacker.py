"""The worker's part in repacking: what is gained, what survives the worker, and what must not stop it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from millstream import AsyncClient, Client
from millstream.events import compact_text
from tests.contract.conftest import COMPLETED, DONE, Hands
from tests.contract.kept_logs import Kept, end_a_log
from tests.oracle import check_log
from worker.repacker import Repacker

only_valkey = pytest.mark.parametrize("backend", ["valkey"], indirect=True)


@only_valkey
@pytest.mark.parametrize("tokens", [100, 1000])
async def test_an_ended_log_takes_little_memory(
    client: Client, async_client: AsyncClient, hands: Hands, tokens: int, say: Callable[[str], None]
) -> None:
    """Its text, 8 B an event and 1 KB, by MEMORY USAGE, once the repacker has seen it; one event a pack before."""
    client.submit("Hi", id="j")
    hands.begin("j")
    for seq in range(2, tokens + 2):
        hands.append("j", seq, compact_text(f"t{seq % 1000:03d}"))
    hands.append("j", tokens + 2, DONE, ending=COMPLETED)
    log = client.keys.log("j")
    live = client.redis.memory_usage(log, samples=0)
    await Repacker(async_client)._look()
    kept = client.redis.memory_usage(log, samples=0)
    allowed = 4 * tokens + 8 * (tokens + 2) + 1024
    say(f"{tokens} tokens of 4 B: {live} B live ({live / tokens:.1f} B each), {kept} B kept, {allowed} B allowed")
    assert kept <= allowed
    assert kept < live
    check_log(client, "j")


@contextlib.asynccontextmanager
async def working(repacker: Repacker) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(repacker.run())
    try:
        yield task
    finally:
        while not task.done():  # once is not enough on Python 3.11, see `end` in worker/ending.py
            task.cancel()
            await asyncio.wait([task], timeout=0.1)


async def emptied(client: Client, task: asyncio.Task[None]) -> None:
    """Wait until the list of jobs to repack is empty."""
    async with asyncio.timeout(10):
        while client.redis.zcard(client.keys.repack):
            assert not task.done(), task
            await asyncio.sleep(0.005)


async def test_the_next_worker_finishes_what_a_dead_one_began(
    client: Client, async_client: AsyncClient, hands: Hands, say: Callable[[str], None]
) -> None:
    """A worker dies after any of its steps: the jobs stay listed, another takes up the copy, and nothing is amiss."""
    kept = []
    for number in range(6):
        end_a_log(hands, f"j{number}", 200, random.Random(number))
        kept.append(Kept(client, f"j{number}"))
    before = [each.packs for each in kept]
    run, steps = async_client.run, 0
    for dies_after in (1, 2, 3):

        async def dying(call: Any, limit: int = dies_after) -> Any:
            nonlocal steps
            if steps == limit:
                raise asyncio.CancelledError
            steps += 1
            return await run(call)

        async_client.run, steps = dying, 0  # type: ignore[method-assign]
        with contextlib.suppress(asyncio.CancelledError):
            await Repacker(async_client)._look()
        assert list(client.redis.scan_iter("*:building")) or dies_after == 3
        for each in kept:
            each.check([0, 100])
    async_client.run = run  # type: ignore[method-assign]
    assert client.redis.zcard(client.keys.repack)
    async with working(Repacker(async_client)) as task, working(Repacker(async_client)):
        await emptied(client, task)
    for each, packs in zip(kept, before, strict=True):
        each.check([0, 100])
        assert each.packs < packs / 10
    say("3 repackers died, 2 finished side by side")


async def test_a_broken_log_does_not_hold_up_the_others(
    client: Client, async_client: AsyncClient, hands: Hands
) -> None:
    """Keys of other types, entries that are no packs, members that are no ids: put aside; good jobs are repacked."""
    for number in range(3):
        end_a_log(hands, f"bad{number}", 30, random.Random(number))
    end_a_log(hands, "good", 100, random.Random(9))
    redis, keys = client.redis, client.keys
    redis.set(keys.log("bad0"), "no stream", ex=60)
    redis.set(keys.building("bad1"), "no stream", ex=60)
    redis.delete(keys.log("bad2"))
    redis.xadd(keys.log("bad2"), {"some": "thing"}, id="5-0")
    redis.expire(keys.log("bad2"), 60)
    for member in (b"\xff\xfe", "a:b", ""):
        redis.zadd(keys.repack, {member: 1})
    kept = Kept(client, "good")
    packs = kept.packs
    async with working(Repacker(async_client)) as task:
        await emptied(client, task)
    kept.check([0, 50])
    assert kept.packs < packs
    redis.delete(keys.building("bad2"))
