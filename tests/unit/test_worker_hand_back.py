"""A job whose upstream is spared for long goes back to the queue, once and with its time, whatever Redis does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import pytest

from millstream.calls import Call, Claim
from millstream.errors import RedisUnavailable
from millstream.job import Spec
from millstream.settings import Settings
from tests.unit.writer_desk import KEYS, Desk, Line, flown, leaping, turns
from worker.breaker import Ticket
from worker.choice import GuardedUpstream, Upstreams
from worker.clocks import Ticker
from worker.relay import AWAY, Relay, Services
from worker.turns import Turns
from worker.upstream import UpstreamSettings

JOB: Final = "j" * 32
SPEC: Final = Spec(model="m", messages=[{"role": "user", "content": "x"}])
LONG: Final = 60.0
"""Seconds that no job waits for in memory."""

SHORT: Final = 3.0


@dataclass
class Released:
    """Takes release calls, each after `takes` seconds; the first `away` of them fail."""

    away: int = 0
    takes: float = 0.0
    calls: list[Call[Any]] = field(default_factory=list)

    async def run(self, call: Call[Any]) -> Any:
        self.calls.append(call)
        await asyncio.sleep(self.takes)
        if len(self.calls) <= self.away:
            raise RedisUnavailable("away")
        return "released"


@asynccontextmanager
async def relay(line: Line, redis: Released, *, cooling: float) -> AsyncIterator[Relay]:
    """A relay whose only upstream is to be left alone for so many seconds."""
    settings = UpstreamSettings(name="up", base_url="http://127.0.0.1:9/v1")
    upstream = GuardedUpstream(settings, connections=1, connect_timeout=1)
    upstream.guard.cool("m", cooling)
    async with Desk(line) as desk:
        line.logs[JOB] = []
        services = Services(
            redis.run, KEYS, Settings(), desk.writer, Ticker(), Turns(), Upstreams([upstream]), "worker"
        )
        yield Relay(services, JOB, SPEC, "t", Claim("claimed", attempt=1, max_attempts=3))
    await upstream.close()


@pytest.mark.parametrize("error", [RecursionError(), ValueError("a bug")])
def test_a_request_that_ends_in_no_answer_at_all_frees_its_probe(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A breaker whose probe never tells would stay open until the worker is started anew. Too deep a job just fails."""
    dropped: list[Ticket] = []

    class Broken:
        async def __aenter__(self) -> Any:
            raise error

        async def __aexit__(self, *_: object) -> None: ...

    def note(ticket: Ticket) -> None:
        dropped.append(ticket)

    async def stream() -> None:
        async with relay(Line(), Released(), cooling=0.0) as job:
            if isinstance(error, RecursionError):
                assert await job.run() == "failed"
            else:
                with pytest.raises(ValueError, match="a bug"):
                    await job.run()

    monkeypatch.setattr(GuardedUpstream, "ask", lambda *_: Broken())
    monkeypatch.setattr(Ticket, "dropped", note)
    leaping(stream())
    assert len(dropped) == 1


def nothing_written(line: Line) -> bool:
    return all(part.events == () and part.kind == "" for call in line.calls for part in call)


@flown
async def test_a_job_is_handed_back_when_redis_is_away() -> None:
    """The same release, again until it is answered: let go of, the job would lose an attempt."""
    line, redis = Line(), Released(away=4)
    async with relay(line, redis, cooling=LONG) as job:
        began = asyncio.get_running_loop().time()
        assert await job.run() == "released"
        assert asyncio.get_running_loop().time() - began == pytest.approx(4 * AWAY)
    first, *others = redis.calls
    assert len(others) == 4
    assert all(each is first for each in others)
    _, holder, delay, look_again, waits_for = first.args
    assert holder == "t:1"
    assert LONG * 1000 - 1000 < delay == look_again < LONG * 1000 * 1.1 + 2000
    assert msgspec.json.decode(waits_for) == {"what": "upstream", "upstream": "up"}
    assert line.calls, "its lease is kept meanwhile"
    assert nothing_written(line)


@flown
async def test_a_heartbeat_beside_the_release_does_no_harm() -> None:
    """It is answered `fenced` once the job is released; what the release says counts, and nothing is written."""
    line, redis = Line(replies={JOB: ("fenced", 0, "")}), Released(takes=2.0)
    async with relay(line, redis, cooling=LONG) as job:
        assert await job.run() == "released"
        assert line.replies == {}, "the heartbeat was answered"
    assert len(redis.calls) == 1
    assert nothing_written(line)


@flown
async def test_a_shutdown_does_not_release_a_second_time() -> None:
    """The release that is on its way is enough; it keeps its time."""
    line, redis = Line(), Released(takes=1.0)
    async with relay(line, redis, cooling=LONG) as job:
        running = asyncio.create_task(job.run())
        await turns()
        job.hand_over()
        assert await running == "released"
    assert len(redis.calls) == 1


@flown
async def test_a_process_that_ends_stops_asking() -> None:
    """A cancellation that is not the relay's own is not taken for one: the lease brings the job back."""
    line, redis = Line(), Released(away=1000)
    async with relay(line, redis, cooling=LONG) as job:
        running = asyncio.create_task(job.run())
        await asyncio.sleep(10 * AWAY)
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()


@flown
async def test_a_cancel_ends_a_wait_in_memory() -> None:
    """The next heartbeat says `closed`; there is nothing to release and nothing to write."""
    line, redis = Line(replies={JOB: ("closed", 0, "")}), Released()
    async with relay(line, redis, cooling=SHORT) as job:
        began = asyncio.get_running_loop().time()
        assert await job.run() == "closed"
        assert asyncio.get_running_loop().time() - began < 0.5
    assert redis.calls == []
    assert nothing_written(line)
