"""The real intake of several workers on one server; what a relay would do takes as long as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from millstream import AsyncClient, Client, Settings, meters
from millstream.calls import Claim, Ending, Frame, append, claim, holder
from millstream.errors import SpecError
from millstream.events import compact
from millstream.job import Spec
from millstream.meters import Limits, Meter, learn
from millstream.redis_door import connect
from tests.oracle import end_cool_down, end_line
from worker.choice import GuardedUpstream, Upstreams
from worker.clerk import Clerk
from worker.intake import Intake
from worker.limiter import Grant, Limiter, TooLarge
from worker.line import Line
from worker.reservation import Reservation
from worker.rq_worker import Entry, StreamWorker
from worker.sweeper import Sweeper
from worker.tickets import Leave, Tickets
from worker.upstream import UpstreamSettings

LANES: Final = ("interactive", "batch")


@pytest.fixture
def backend() -> str:
    """A real server alone: several clients block on it at once."""
    return "valkey"


@dataclass
class Desk:
    """One worker's intake. Its jobs run until `ends` is set, or for a moment, and end as completed."""

    settings: Settings
    client: AsyncClient
    limiter: Limiter
    clerk: Clerk
    ends: asyncio.Event | None
    upstream: GuardedUpstream
    started: list[tuple[float, str, Leave]]
    intake: Intake = field(init=False)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def begin(self, entry: Entry, spec: Spec | SpecError, token: str, claim: Claim, leave: Leave) -> None:
        assert isinstance(spec, Spec)
        self.started.append((asyncio.get_running_loop().time(), entry.job_id, leave))
        task = asyncio.create_task(self._run(entry, token, claim, leave))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _run(self, entry: Entry, token: str, claim: Claim, leave: Leave) -> None:
        await (self.ends.wait() if self.ends else asyncio.sleep(0.01))
        keys = self.settings.keys
        done, ending = compact("completed", finish_reasons={0: "stop"}), Ending("completed", b'{"0":"stop"}')
        by = holder(token, claim.attempt)
        frame = Frame(entry.job_id, keys.written(entry.job_id), by, claim.seq + 1, [done], b"", ending)
        await self.client.run(append(keys, self.settings.lease, [frame]))
        if isinstance(leave, Grant):
            self.limiter.settle(leave, 10, 5)
        self.clerk.ended(entry, "completed")
        self.intake.free()


@asynccontextmanager
async def fleet(
    settings: Settings,
    limits: Limits,
    *,
    workers: int = 1,
    slots: int = 200,
    ends: asyncio.Event | None = None,
    called: str = "up",
    **more: Limits,
) -> AsyncIterator[tuple[list[Desk], list[tuple[float, str, Leave]]]]:
    """Intakes that run, and the list of what began: when, which job, with what leave."""
    desks: list[Desk] = []
    started: list[tuple[float, str, Leave]] = []
    running: list[asyncio.Task[Any]] = []
    intakes: list[asyncio.Task[None]] = []
    lines: list[Line] = []
    upstream = GuardedUpstream(
        UpstreamSettings(name=called, base_url="http://127.0.0.1:9/v1", limits=limits, models_limits=more),
        connections=1, connect_timeout=1,
    )  # fmt: skip
    for number in range(workers):
        client = AsyncClient(settings=settings)
        queues = [settings.keys.queue(lane) for lane in LANES]
        worker = StreamWorker(queues, connect(settings.redis_url), f"w{number}")
        line = Line(settings.redis_url)
        lines.append(line)
        limiter = Limiter(
            line.run, settings.keys, lease=settings.lease, asker=f"w{number}", upstreams=[upstream], lanes=LANES,
            intermediate=[worker.intermediate_of(queue) for queue in queues],
        )  # fmt: skip
        clerk = Clerk(worker)
        desk = Desk(settings, client, limiter, clerk, ends, upstream, started)
        tickets = Tickets(client, Upstreams([upstream]), limiter)
        desk.intake = Intake(client, worker, clerk, slots, desk.begin, tickets)
        desks.append(desk)
        running += map(asyncio.create_task, (limiter.run(), clerk.run()))
        intakes.append(asyncio.create_task(desk.intake.run(burst=False)))
    try:
        yield desks, started
    finally:
        for desk in desks:
            desk.intake.stop()
        await asyncio.gather(*intakes)
        await until(lambda: not any(desk.tasks for desk in desks))
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for desk in desks:
            await desk.limiter.flush()
            await desk.clerk.flush()
            desk.clerk._thread.shutdown()  # once it has written what it had in hand
        await desks[0].client.redis.delete(*(f"rq:finished:{settings.keys.queue(lane)}" for lane in LANES))
        for desk in desks:
            await desk.client.close()
        for line in lines:
            line.close()
        await upstream.close()


async def until(holds: Callable[[], Any], within: float = 20.0) -> None:
    async with asyncio.timeout(within):
        while not holds():  # noqa: ASYNC110 - what is waited for is in another client's hands, or in Redis
            await asyncio.sleep(0.005)


def submit(client: Client, count: int, **asked: Any) -> list[str]:
    return [client.submit("x", id=f"{asked.get('lane', 'job')}-{number}", **asked).id for number in range(count)]


async def test_the_line_is_served_in_order_by_all(client: Client, settings: Settings) -> None:
    """Three workers, one limit: every job runs once, with a ticket, and none before one that was submitted earlier."""
    limits = Limits(requests=80, window=2.0)
    client.run(learn(client.keys, Meter("up", "m", limits), cool=60))
    submit(client, 60, model="m")
    async with fleet(settings, limits, workers=3) as (_, started):
        await until(lambda: client.limits()[0].waiting["interactive"] == 60)
        end_cool_down(client.redis, client.keys, "up/m")
        await until(lambda: len(started) == 60)
    asked = sorted((leave.asked_at, job_id) for _, job_id, leave in started if isinstance(leave, Grant))
    order = [int(job_id.partition("-")[2]) for _, job_id in asked]  # by ticket: who has one begins when it has its turn
    assert sorted(order) == list(range(60))
    assert max(abs(place - number) for place, number in enumerate(order)) <= 6, "but for those of one call"
    assert client.limits()[0].streams.used == 0
    assert client.limits()[0].requests.limit == 80


async def test_a_full_meter_is_in_nobodys_way(client: Client, settings: Settings) -> None:
    """Two slots, a hundred jobs that wait for a limit: a job of another model begins at once."""
    submit(client, 100, model="tight", lane="batch")
    ends = asyncio.Event()
    async with fleet(settings, Limits(), slots=2, ends=ends, tight=Limits(streams=1)) as (_, started):
        await until(lambda: started and client.redis.llen("rq:queue:millstream-batch") == 0)
        client.submit("x", id="other", model="other")
        await until(lambda: "other" in [job_id for _, job_id, _ in started])
        assert [job_id for _, job_id, _ in started] == ["batch-0", "other"]
        assert client.redis.llen("rq:queue:millstream-batch") == 0
        for number in range(100):
            client.cancel(f"batch-{number}")
        ends.set()
    (other,) = [leave for _, job_id, leave in started if job_id == "other"]
    assert other is None, "without a limit no ticket is asked for"


async def test_a_cancelled_job_in_line_gives_its_ticket_back(client: Client, settings: Settings) -> None:
    """It ends at once, never begins, and uses nothing up."""
    submit(client, 30, model="m")
    ends = asyncio.Event()
    async with fleet(settings, Limits(streams=1), ends=ends) as (_, started):
        await until(lambda: started and client.redis.llen("rq:queue:millstream-interactive") == 0)
        for number in range(1, 29):
            assert client.cancel(f"job-{number}") == "cancelled"
        ends.set()
        await until(lambda: len(started) == 2)
        assert [job_id for _, job_id, _ in started] == ["job-0", "job-29"]
    gauge = client.limits()[0]
    assert (gauge.requests.used, gauge.streams.used, gauge.waiting["interactive"]) == (2, 0, 0)


async def test_no_look_outlives_its_intake(client: Client, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where redis-py loses the cancellation: the connection it would make again is one that nobody closes."""
    looks = 0

    async def deaf(*_: Any) -> None:
        nonlocal looks
        looks += 1
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    monkeypatch.setattr("redis.asyncio.Redis.blmove", deaf)
    before = asyncio.all_tasks()
    async with fleet(settings, Limits()):
        await until(lambda: looks == len(LANES))
    assert asyncio.all_tasks() == before


async def test_a_job_too_large_is_claimed_to_fail(client: Client, settings: Settings) -> None:
    """Its relay ends it; it never waits."""
    client.submit("x", id="large", model="m", max_tokens=2000)
    async with fleet(settings, Limits(tokens=1000)) as (_, started):
        await until(lambda: started)
    assert isinstance(started[0][2], TooLarge)


async def test_ten_thousand_waiting_jobs_cost_next_to_nothing(client: Client, settings: Settings) -> None:
    """Each delivery is moved once; afterwards a worker asks a few times a second, whatever waits."""
    client.submit_many([{"prompt": "x", "id": f"b{number}", "model": "m", "lane": "batch"} for number in range(2000)])
    async with fleet(settings, Limits(requests=8), workers=2) as (_, started):
        await until(lambda: client.limits() and client.limits()[0].waiting["batch"] >= 1996)
        (began, _), before = client.redis.time(), client.redis.info("commandstats")
        await asyncio.sleep(2.0)
        after, (ended, _) = client.redis.info("commandstats"), client.redis.time()
        calls = {name: after[name]["calls"] - before.get(name, {"calls": 0})["calls"] for name in after}
        assert calls["cmdstat_evalsha"] <= 2 * (ended - began) * 10, calls
        assert calls.get("cmdstat_hgetall", 0) <= 2 * len(started), "no job is read again while it waits"
    end_line(client.redis, client.keys, "up/m", "batch")
    for number in range(2000):
        client.cancel(f"b{number}")


async def test_a_broken_meter_is_in_nobodys_way(client: Client, settings: Settings) -> None:
    """Somebody wrote to its key: its jobs wait and are not lost, those of other models begin, and settle."""
    meter = client.keys.meter("up/tight")
    client.redis.set(meter[2], "x", ex=60)
    submit(client, 3, model="tight")
    async with fleet(settings, Limits(streams=2), tight=Limits(streams=1)) as (desks, started):
        learned = Meter("up", "tight", Limits(streams=1))
        desks[0].limiter.refused(learned, 1.0, meters.Count(), meters.Count())
        for number in range(10):
            client.submit("x", id=f"other-{number}", model="other")
        await until(lambda: len(started) == 10)
        assert {job_id.partition("-")[0] for _, job_id, _ in started} == {"other"}
        assert client.status("job-0").status == "queued"
        assert not desks[0].limiter.lines, "it is left alone for a while"
        client.redis.delete(meter[2])
        for number in range(3):
            assert client.cancel(f"job-{number}") == "cancelled"
    assert client.limits()[-1].streams.used == 0 or client.limits()[0].streams.used == 0


@pytest.mark.parametrize("name", ["waiting", "learned"])
async def test_a_broken_list_of_meters_stops_no_worker(client: Client, settings: Settings, name: str) -> None:
    """Jobs without a limit go on."""
    client.redis.set(getattr(client.keys, name), "x", ex=60)
    async with fleet(settings, Limits()) as (_, started):
        submit(client, 1, model="m")
        await until(lambda: started)
        await asyncio.sleep(1.2)  # it has looked again by then
        client.submit("x", id="second", model="m")
        await until(lambda: len(started) == 2)
    client.redis.delete(getattr(client.keys, name))


async def test_a_lowered_limit_refuses_who_is_too_large_for_it_now(client: Client, settings: Settings) -> None:
    """Of those in line, one that says how long its answer may be fails; one whose answer is estimated still runs."""
    before = Meter("up", "m", Limits(tokens=2000))
    client.run(learn(client.keys, before, cool=60))
    client.submit("x", id="large", model="m", max_tokens=1500)
    client.submit("x", id="open", model="m")
    async with fleet(settings, before.limits) as _:
        await until(lambda: client.limits() and client.limits()[0].waiting["interactive"] == 2)
    async with fleet(settings, Limits(tokens=200)) as (_, started):
        end_cool_down(client.redis, client.keys, "up/m")
        await until(lambda: len(started) == 2)
    found = {job_id: leave for _, job_id, leave in started}
    assert isinstance(found["large"], TooLarge)
    assert isinstance(found["open"], Grant)
    assert found["open"].tokens == 200


async def test_a_running_job_keeps_its_place_before_the_line(client: Client, settings: Settings) -> None:
    """It asks again with the ticket it waits for; given up, nothing of it stays."""
    limits = Limits(streams=1)
    async with fleet(settings, limits) as (desks, _):
        limiter = desks[0].limiter
        front = client.keys.meter("up/m")[6]
        up, spec = desks[0].upstream, Spec(model="m", messages=[{"role": "user", "content": "x"}])
        holds, waits, gone = (Reservation(limiter, spec, None) for _ in range(3))
        assert await holds.have(up, 5.0, again=True) == 0.0
        for _ in range(2):
            assert await waits.have(up, 5.0, again=True) > 0
        assert await gone.have(up, 5.0, again=True) > 0
        assert client.redis.zcard(front) == 2
        gone.give_back()
        holds.give_back()
        await until(lambda: client.redis.zcard(front) == 1 and client.limits()[0].streams.used == 0)
        assert await waits.have(up, 5.0, again=True) == 0.0
        assert client.redis.zcard(front) == 0
        waits.give_back()
        await until(lambda: client.limits()[0].streams.used == 0)
        client.redis.set(client.keys.meter("up/m")[6], "x", ex=60)
        assert await waits.have(up, 5.0, again=True) > 5, "a broken meter is no leave: the job goes back to the queue"
        client.redis.delete(client.keys.meter("up/m")[6])
        waits.give_back()


async def test_names_that_are_no_text_stop_no_worker(client: Client, settings: Settings) -> None:
    """Somebody wrote them among the meters, the lines and into a line: the jobs behind them begin, the sweep sweeps."""
    odd, keys = b"up/\xff\xfe", client.keys
    client.redis.zadd(keys.waiting, {odd: 0})
    client.redis.zadd(keys.learned, {odd: 2**43})
    line = keys.line("up/m", "interactive")
    client.redis.zadd(line, {"no delivery:5": 0})
    for name in (keys.waiting, keys.learned, line):
        client.redis.expire(name, 60)
    submit(client, 2, model="m")
    async with fleet(settings, Limits(streams=5)) as (desks, started):
        await until(lambda: len(started) == 2)
        client.redis.zadd(keys.open, {"job-0": 1})
        client.redis.hset(keys.state("job-0"), "line", odd)
        await Sweeper(desks[0].client, ["up"])._sweep(["job-0"])
    for name in (keys.waiting, keys.learned, line):
        client.redis.delete(name)
    client.redis.zrem(keys.open, "job-0")
    tickets, held = keys.meter("up/m")[2:4]
    client.redis.delete(tickets, held)


@pytest.mark.parametrize("lost", ["settings", "waiting"])
async def test_jobs_in_a_line_that_nobody_serves_are_delivered_again(
    client: Client, settings: Settings, lost: str
) -> None:
    """Their upstream has another name since a deploy, or the list of lines is gone: they join another line, or run."""
    submit(client, 3, model="m")
    client.run(learn(client.keys, Meter("up", "m", Limits(streams=1)), cool=60))
    async with fleet(settings, Limits(streams=1)):
        await until(lambda: client.limits() and client.limits()[0].waiting["interactive"] == 3)
    line = client.keys.line("up/m", "interactive")
    client.redis.zadd(client.keys.waiting, {"up/m": 0})
    called = "renamed"
    if lost == "waiting":
        client.redis.delete(client.keys.waiting)
        end_cool_down(client.redis, client.keys, "up/m")
        client.redis.zrem(client.keys.waiting, "up/m")
        called = "up"
    async with fleet(settings, Limits(streams=1), called=called) as (desks, started):
        sweeper = Sweeper(desks[0].client, [called])
        client.redis.zadd(client.keys.open, {f"job-{number}": 1 for number in range(3)})
        await sweeper._sweep([f"job-{number}" for number in range(3)])
        await until(lambda: len(started) == 3)
    assert sorted(job_id for _, job_id, _ in started) == ["job-0", "job-1", "job-2"]
    end_line(client.redis, client.keys, "up/m", "interactive")
    assert not client.redis.exists(line)


async def test_a_lost_job_that_waits_for_a_limit_is_not_delivered_again(client: Client, settings: Settings) -> None:
    """Its worker died, its delivery stands in line: each lease would put another one beside it, with a ticket each."""
    submit(client, 1, model="m")
    state = client.keys.state("job-0")
    client.run(claim(client.keys, "job-0", "dead", 0.001))
    client.run(learn(client.keys, Meter("up", "m", Limits(streams=1)), cool=60))
    async with fleet(settings, Limits(streams=1)) as (desks, started):
        await until(lambda: client.limits() and client.limits()[0].waiting["interactive"] == 1)
        await until(lambda: client.redis.hexists(state, "place"))
        for _ in range(3):
            client.redis.zadd(client.keys.open, {"job-0": 1})
            await Sweeper(desks[0].client, ["up"])._sweep(["job-0"])
        assert client.redis.llen("rq:queue:millstream-interactive") == 0
        assert client.limits()[0].waiting["interactive"] == 1
        end_cool_down(client.redis, client.keys, "up/m")
        await until(lambda: started)
        await until(lambda: client.status("job-0").ended)
    assert client.status("job-0").attempt == 2
    assert not client.redis.hexists(state, "place")


async def test_a_line_that_others_serve_is_left_to_them(client: Client, settings: Settings) -> None:
    """A worker of another upstream sweeps, too: what is asked for in time is in good hands."""
    submit(client, 1, model="m")
    client.run(learn(client.keys, Meter("up", "m", Limits(streams=1)), cool=60))
    async with fleet(settings, Limits(streams=1)) as (desks, _):
        await until(lambda: client.limits() and client.limits()[0].waiting["interactive"] == 1)
        client.redis.zadd(client.keys.open, {"job-0": 1})
        await Sweeper(desks[0].client, ["other"])._sweep(["job-0"])
        client.redis.zadd(client.keys.waiting, {"up/m": 1})
        client.redis.zadd(client.keys.open, {"job-0": 1})
        await Sweeper(desks[0].client, ["up"])._sweep(["job-0"])
        assert client.redis.llen("rq:queue:millstream-interactive") == 0
        assert client.limits()[0].waiting["interactive"] == 1
        client.cancel("job-0")
        end_cool_down(client.redis, client.keys, "up/m")
        await until(lambda: client.limits()[0].waiting["interactive"] == 0)
