"""What one acquire of the limiter costs while a thousand jobs wait."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any, Final

import uvloop

from millstream import AsyncClient, Settings, meters
from millstream.calls import Call
from millstream.keys import LANES
from worker.line import Line

from .world import world

WAITING: Final = 1000
BOOKED: Final = 50
"""Calls after which the intermediate lists are empty again."""

_LIMITS: Final = meters.Limits(requests=10**6, tokens=10**9, streams=10**6)
_NUMBERS: Final = itertools.count(1)
_METER: Final = meters.Meter("up", "model", _LIMITS)
_INTERMEDIATE: Final = ("bench:interactive", "bench:batch")


@dataclass(frozen=True)
class Acquire:
    """CPU in us for one call that lets a job join the line and takes the ticket of the first: the client's (the very
    one a worker uses), and the server's.
    """

    waiting: int
    calls: int
    client_us: float
    valkey_us: float

    @property
    def both_us(self) -> float:
        return self.client_us + self.valkey_us


def measure(*, calls: int = 4000, runs: int = 7) -> Acquire:
    """One call at a time; every one holds all three limits against the first of the line.

    Of so many runs the median, each on a server of its own: one differs from the next by a tenth.
    """
    return sorted((_run(calls) for _ in range(runs)), key=lambda each: each.both_us)[runs // 2]


def _run(calls: int) -> Acquire:
    with world() as here:
        here.settle(())
        return uvloop.run(_measure(here.valkey.url, calls))  # as a worker does


async def _measure(url: str, calls: int) -> Acquire:
    line = Line(url)  # as in a worker
    async with AsyncClient(settings=Settings(redis_url=url)) as client:
        await line.run(_call(client, range(WAITING), want=0))
        for number in range(200):  # warm: scripts loaded, connection made
            await line.run(_call(client, [WAITING + number], want=1))
        spent = served = 0.0
        for start in range(2 * WAITING, 2 * WAITING + calls, BOOKED):
            await client.redis.delete(*_INTERMEDIATE)  # as a worker books what it was given
            server, began = await _server_cpu(client.redis), time.process_time()
            for number in range(start, start + BOOKED):
                await line.run(_call(client, [number], want=1))
            spent += time.process_time() - began
            served += await _server_cpu(client.redis) - server
        (gauge,) = await client.limits()
        line.close()
    return Acquire(sum(gauge.waiting.values()), calls, spent / calls * 1e6, served / calls * 1e6)


def _call(client: AsyncClient, numbers: Any, want: int) -> Call[meters.Acquired]:
    places = [meters.Place(f"job{n}-00000000", f"job{n}", "batch", float(n), 100, 500) for n in numbers]
    return meters.acquire(
        client.keys, _METER, places, lease=15.0, asker="bench", number=next(_NUMBERS), want=want, lanes=LANES,
        intermediate=_INTERMEDIATE,
    )  # fmt: skip


async def _server_cpu(redis: Any) -> float:
    found = await redis.info("cpu")
    return float(found["used_cpu_user_main_thread"]) + float(found["used_cpu_sys_main_thread"])
