"""Runs one schedule: the product's own workers and clients, the server, the network and the upstream on one loop."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import fakeredis
import structlog

from millstream import AsyncClient, Client, Settings, calls
from millstream.delivery import deliver
from millstream.errors import JobExpired, JobNotFound, LogRewound, MillstreamError, RedisUnavailable
from millstream.events import Event
from tests.oracle import read_log

from . import server as servers
from . import workers
from .loop import ACTOR, Actor, OutOfTimeError, VirtualLoop
from .network import Faults, Network
from .server import Peer, Server
from .upstream import Model
from .watch import Watch
from .weather import Reader, Wanted, Weather

LONGEST = 600.0
"""Virtual seconds a schedule may take in all: patience, breakers, retries and long waits fit in; a lost job does not."""


@dataclass
class Heard:
    """What one consumer got."""

    who: str
    job_id: str
    events: list[Event] = field(default_factory=list)
    done: bool = False
    steady: bool = False
    """Whether it stays connected as long as it can."""
    began: float = 0.0
    ended: float = 0.0
    lost: str = ""
    """How it was told that the server lost data."""


@dataclass
class Running:
    """One worker process, living or not."""

    name: str
    actor: Actor
    task: asyncio.Task[Any] | None = None
    desk: Any = None
    leaving: bool = False


class Schedule:
    """One run. `play` it; what happened stays in its attributes for the judge."""

    def __init__(self, weather: Weather) -> None:
        self.weather = weather
        self.rng = random.Random(f"{weather.seed} world")
        self.trace: list[tuple[float, str, str]] = []
        self.complaints: list[str] = []
        self.loop = VirtualLoop(random.Random(f"{weather.seed} turns"), LONGEST)
        self.model = Model(weather.seed, weather.temper, self.note)
        self.server = Server(self.loop, Actor("server"))
        self.server.seen = self._seen
        self.watch = Watch(self.server, self.complain)
        self.server.ran = self.watch.look
        self.network = Network(
            self.loop, random.Random(f"{weather.seed} network"), self.server.actor, self.server.serve, self.note
        )
        self.loop.connect = self.network.connect
        self.workers: list[Running] = []
        self.accepted: dict[str, float] = {}
        self.uncertain: set[str] = set()
        self.cancels: dict[str, list[str]] = {}
        self.stopped_by_rq: set[str] = set()
        self.forgotten: set[str] = set()
        self.heard: list[Heard] = []
        self.before_loss: dict[str, list[Any]] | None = None
        self.lost_since = self.lost_at = 0.0
        self._numbers = itertools.count(1)
        self._sync = Client(connection=fakeredis.FakeRedis(server=self.server.fake), script_header=False)
        self.keys = self._sync.keys

    @property
    def client(self) -> Client:
        """An eye on the data, outside of the world."""
        return self._sync

    # The record ---------------------------------------------------------------------------------------------------

    def note(self, who: object, *what: object) -> None:
        self.trace.append((self.loop.time(), str(who), " ".join(map(str, what))))

    def _seen(self, peer: Peer, fields: list[bytes], refused: bool) -> None:
        if peer.wire is None:
            return
        name = fields[0].decode()
        if name == "EVALSHA":
            name = _SHAS.get(fields[1].decode(), "script")
            shown = 10 if name in ("append", "claim", "release") else 2  # a delivery has today's date in it
            said = fields[3 + int(fields[2]) :][:shown]
            name += " " + " ".join(each.decode("utf-8", "replace")[:40] for each in said)
        elif name in ("CLIENT", "TIME", "ZRANGE", "EVAL"):
            return
        self.note(peer.wire.owner, "->", name[:160], "REFUSED" if refused else "")

    def complain(self, what: str) -> None:
        self.note("judge", what)
        self.complaints.append(what)

    def _log(self, _logger: Any, level: str, event: Any) -> Any:
        words = " ".join(f"{name}={value}" for name, value in event.items() if name not in ("event", "exc_info"))
        self.note(ACTOR.get(self.loop.world), event["event"], words)
        if level == "error":
            self.complain(f"{ACTOR.get(self.loop.world)} logs {event['event']} {words} {event.get('exc_info')!r}")
        raise structlog.DropEvent

    # Playing ------------------------------------------------------------------------------------------------------

    def play(self) -> None:
        """From the first submit to the last worker's end."""
        with self._world():
            main = self.loop.create_task(self._main())
            try:
                self.loop.run_until_complete(main)
            except OutOfTimeError as error:
                self.complain(f"{error}: {self._unfinished()}")
            self._bury()

    @contextmanager
    def _world(self) -> Iterator[None]:
        seen = structlog.get_config()
        kept = random.getstate()
        random.seed(f"{self.weather.seed} product")
        tokens = random.Random(f"{self.weather.seed} tokens")
        structlog.configure(processors=[self._log])
        gc.disable()
        gc.freeze()  # what was there before need not be looked at when this world is taken apart
        try:
            with servers.clock(self.loop.wall), workers.product_on(self.model, lambda n: tokens.randbytes(n).hex()):
                yield
        finally:
            gc.unfreeze()
            gc.enable()
            structlog.configure(**seen)
            random.setstate(kept)

    async def _main(self) -> None:
        weather = self.weather
        self.network.faults = weather.faults
        for _ in range(weather.workers):
            self._start_worker()
        users = self._spawn("user", *(self._ask(job) for job in weather.jobs))
        for number, reader in enumerate(weather.readers):
            users += self._spawn(f"reader-{number}", self._read(reader))
        if self.rng.random() < 0.3:
            users += self._spawn("reader-all", self._read_all())
        for at, kind, chance in weather.actions:
            await asyncio.sleep(max(0.0, at - self.loop.time()))
            await self._act(kind, chance)
        await asyncio.sleep(max(0.0, weather.until - self.loop.time()))
        await self._calm_down()
        await asyncio.wait(users)
        for each in users:
            if (error := each.exception()) is not None:
                self.complain(f"{each.get_name()}: {error!r}")
        await self._end_workers()

    async def _calm_down(self) -> None:
        self.network.faults = Faults()
        self.network.down = False
        self.server.refusal = None
        for each in self.workers:
            self.loop.go_on(each.actor)
        if not any(not each.leaving and not each.actor.dead for each in self.workers):
            self._start_worker()

    async def _end_workers(self) -> None:
        """Whatever was asked must end; then the workers leave."""
        while any(self._state(job_id) in ("queued", "in_progress") for job_id in self.weather_ids()):
            await asyncio.sleep(0.2)
        while self.client.redis.zcard(self.keys.repack):
            await asyncio.sleep(0.5)
        left = [each for each in self.workers if not each.actor.dead and each.task is not None]
        for each in left:
            self.loop.signal(each.actor, signal.SIGTERM)
        for each in left:
            assert each.task is not None
            with suppress(asyncio.CancelledError):
                if await each.task is not True:
                    self.complain(f"{each.name} did not end well")

    def weather_ids(self) -> list[str]:
        return [job.job_id for job in self.weather.jobs]

    def _state(self, job_id: str) -> str:
        found = self.client.redis.hget(self.keys.state(job_id), "status")
        return found.decode() if found else ""

    def _unfinished(self) -> str:
        states = {job_id: self.client.redis.hgetall(self.keys.state(job_id)) for job_id in self.weather_ids()}
        readers = [each.who for each in self.heard if not each.done]
        return f"readers that wait: {readers}; states: {states}; workers: {[each.name for each in self.workers]}"

    def _bury(self) -> None:
        """Take the processes apart that were killed, without their last words."""
        self.loop.world.dead = True
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        asyncio._set_running_loop(self.loop)  # cleaning up, they ask for it
        try:
            for task in self.loop.tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                task._log_traceback = False  # type: ignore[attr-defined]
                if not task.done():
                    _close(task.get_coro())
            self._let_go()
            with warnings.catch_warnings():  # their connections were not closed, of course
                warnings.simplefilter("ignore")
                gc.collect()
        finally:
            asyncio._set_running_loop(None)
            sys.unraisablehook = hook
        for fault in self.loop.faults:
            self.complain(f"unhandled: {fault.get('message')} {fault.get('exception')!r}")

    def _let_go(self) -> None:
        """Of everything that leads to a process."""
        self.loop.tasks.clear()
        self.loop.close()
        self.network.wires.clear()
        for each in self.workers:
            each.desk = each.task = None
            each.actor.ready.clear()
            each.actor.signals.clear()

    def _spawn(self, name: str, *coroutines: Any) -> list[asyncio.Task[Any]]:
        actor = Actor(name)
        return [self.loop.spawn(actor, each) for each in coroutines]

    # Workers ------------------------------------------------------------------------------------------------------

    def _settings(self, who: str) -> Settings:
        return Settings(
            redis_url=f"redis://{who}:6379/0?protocol=2", lease=self.weather.lease, streams=self.weather.streams,
            grace=self.weather.grace, first_token_timeout=3.0, idle_timeout=1.5, total_timeout=60.0, retries=3,
        )  # fmt: skip

    def _start_worker(self) -> None:
        running = Running(f"w{next(self._numbers)}", Actor(""))
        running.actor.name = running.name
        self.workers.append(running)

        async def live() -> bool:
            process, running.desk = workers.make(
                running.name, self._settings(running.name), self.server, self.network, self.weather.dialect
            )
            return await process.run(burst=False)

        running.task = self.loop.spawn(running.actor, live())
        self.note(running.name, "born")

    def _kill(self, each: Running) -> None:
        self.note(each.name, "killed")
        self.loop.kill(each.actor)
        self.network.cut_all(of=each.actor)
        for request in self.model.all:
            if request.asker is each.actor and request.open:
                request.open, request.closed_at = False, self.loop.time()

    def _living(self) -> list[Running]:
        return [each for each in self.workers if not each.actor.dead and not each.leaving and not each.actor.stopped]

    # People -------------------------------------------------------------------------------------------------------

    def _client(self, who: str) -> AsyncClient:
        return AsyncClient(settings=self._settings(who), clock=self.loop.time)

    async def _ask(self, job: Wanted) -> None:
        async with self._client(str(ACTOR.get())) as client:
            await asyncio.sleep(job.at)
            if not await self._submit(client, job):
                return
            for at in job.cancels:
                await asyncio.sleep(max(0.0, at - self.loop.time()))
                await self._cancel(client, job.job_id)

    async def _submit(self, client: AsyncClient, job: Wanted) -> bool:
        self.uncertain.add(job.job_id)
        for _ in range(20):
            try:
                messages = [{"role": "user", "content": job.job_id}]
                await client.submit(messages=messages, id=job.job_id, model="m", **job.options)
            except RedisUnavailable:
                await asyncio.sleep(self.rng.random())
            else:
                self.note("user", "accepted", job.job_id)
                self.accepted[job.job_id] = self.loop.time()
                return True
        return False

    async def _cancel(self, client: AsyncClient, job_id: str) -> None:
        self.cancels.setdefault(job_id, [])
        self.note("user", "cancels", job_id)
        try:
            self.cancels[job_id].append(await client.cancel(job_id))
        except RedisUnavailable:
            pass  # perhaps it is, perhaps not
        except JobNotFound:
            self._told_of_loss(job_id, "JobNotFound")

    def _told_of_loss(self, job_id: str, word: str) -> None:
        if self.before_loss is None and job_id not in self.forgotten:
            self.complain(f"{job_id}: {word}, and nothing was lost")

    async def _read(self, reader: Reader) -> None:
        heard = Heard(str(ACTOR.get()), reader.job_id, steady=not reader.every)
        self.heard.append(heard)
        await asyncio.sleep(reader.delay)
        if not await self._known([reader.job_id]):
            heard.done = True
            return
        heard.began = self.loop.time()
        async with self._client(heard.who) as client:
            while not heard.done:
                try:
                    await self._listen(client, heard, reader.every)
                except RedisUnavailable:
                    await asyncio.sleep(0.5)
                except (JobNotFound, JobExpired, LogRewound) as error:
                    self._end_reading(heard, error)

    async def _known(self, job_ids: list[str]) -> bool:
        while not all(job_id in self.accepted for job_id in job_ids):
            if self.loop.time() > self.weather.until + 60:
                return False
            await asyncio.sleep(0.1)
        return True

    async def _listen(self, client: AsyncClient, heard: Heard, every: int) -> None:
        after, count = heard.events[-1].seq if heard.events else 0, 0
        async with aclosing(client.follow(heard.job_id, after)) as events:
            async for event in events:
                self._hear(heard, event)
                if (count := count + 1) == every:
                    return
        heard.done, heard.ended = True, self.loop.time()

    def _hear(self, heard: Heard, event: Event) -> None:
        self.note(heard.who, "hears", heard.job_id, event.seq, event.type)
        heard.events.append(event)

    def _end_reading(self, heard: Heard, error: MillstreamError) -> None:
        self.note(heard.who, repr(error))
        heard.lost, heard.done = type(error).__name__, True
        self._told_of_loss(heard.job_id, heard.lost)

    async def _read_all(self) -> None:
        """One subscription for all jobs."""
        ids = self.weather_ids()
        if not await self._known(ids):
            return
        mine = {job_id: Heard("reader-all", job_id) for job_id in ids}
        self.heard += mine.values()
        async with self._client("reader-all") as client:
            while not all(each.done for each in mine.values()):
                if any(each.events for each in mine.values()):
                    break  # a cursor for many jobs is one for all: it cannot go on where it stood
                try:
                    async for job_id, event in client.follow_many(ids):
                        self._hear(mine[job_id], event)
                    for each in mine.values():
                        each.done = True
                except RedisUnavailable:
                    await asyncio.sleep(0.5)
                except (JobNotFound, JobExpired, LogRewound) as error:
                    for each in mine.values():
                        self._end_reading(each, error)
        for each in mine.values():
            if not each.done:
                each.lost, each.done = "RedisUnavailable", True

    # What goes wrong ----------------------------------------------------------------------------------------------

    async def _act(self, kind: str, chance: float) -> None:
        living = self._living()
        busy = [each for each in living if self._asks(each)]
        chosen = busy or living
        victim = chosen[int(chance * len(chosen))] if chosen else None
        self.network.count(kind)
        self.note("fate", kind, victim.name if victim else "")
        act: Callable[..., Any] = getattr(self, "_do_" + kind.replace(" ", "_").lower())
        if kind in ("kill", "stop", "terminate", "terminate twice", "cut", "stop by RQ"):
            if victim is not None:
                await act(victim, chance)
        else:
            await act(chance)

    def _asks(self, each: Running) -> bool:
        return any(request.open and request.asker is each.actor for request in self.model.all)

    def _later(self, delay: float, what: Callable[[], object]) -> None:
        self.loop.call_later(delay, what)

    async def _do_kill(self, victim: Running, chance: float) -> None:
        self._kill(victim)
        self._later(self.rng.random() * 2, self._start_worker)

    async def _do_stop(self, victim: Running, chance: float) -> None:
        self.loop.stop_actor(victim.actor)
        self._later(self.rng.random() * 5 * self.weather.lease, lambda: self.loop.go_on(victim.actor))
        if not self._living():
            self._later(self.rng.random(), self._start_worker)

    async def _do_terminate(self, victim: Running, chance: float) -> None:
        victim.leaving = True
        self.loop.signal(victim.actor, signal.SIGTERM)
        self._later(self.rng.random() * 2, self._start_worker)

    async def _do_terminate_twice(self, victim: Running, chance: float) -> None:
        await self._do_terminate(victim, chance)
        self._later(self.rng.random() * 0.5, lambda: self.loop.signal(victim.actor, signal.SIGTERM))

    async def _do_cut(self, victim: Running, chance: float) -> None:
        self.network.cut_all(of=victim.actor)

    async def _do_cut_subscribers(self, chance: float) -> None:
        for _ in range(1 + int(chance * 4)):
            self.network.cut_all(subscribers=True)
            await asyncio.sleep(0.2 * self.rng.random())

    async def _do_outage(self, chance: float) -> None:
        await self._away(None)

    async def _do_lose_the_tail(self, chance: float) -> None:
        if self.before_loss is not None:
            return
        data, self.lost_since = self.server.snapshot(), self.loop.time()
        await asyncio.sleep(0.05 + 1.5 * chance)
        self.lost_at = self.loop.time()
        self.before_loss = {job_id: read_log(self.client.redis, self.keys, job_id) for job_id in self.weather_ids()}
        await self._away(data)

    async def _away(self, data: Any) -> None:
        self.network.down, self.network.black_hole = True, self.rng.random() < 0.3
        self.network.cut_all()
        await asyncio.sleep(self.rng.choice((0.1, 1.0, 6.0)) * self.rng.random())
        self.server.restart(data)
        if data is not None:
            self.watch.forget()
        self.server.refuse_scripts_only, self.server.refusal = False, b"LOADING Redis is loading the dataset in memory"
        self.network.down = False
        await asyncio.sleep(0.5 * self.rng.random())
        self.server.refusal = None
        self.note("fate", "the server is back")

    async def _do_flush_scripts(self, chance: float) -> None:
        self.server.do("SCRIPT", "FLUSH")

    async def _do_read_only(self, chance: float) -> None:
        self.server.refuse_scripts_only = True
        self.server.refusal = b"READONLY You can't write against a read only replica."
        await asyncio.sleep(chance * 2)
        self.server.refusal = None

    def _some_job(self, chance: float) -> Wanted | None:
        known = [job for job in self.weather.jobs if self._state(job.job_id)]
        return known[int(chance * len(known))] if known else None

    async def _do_deliver_again(self, chance: float) -> None:
        if (job := self._some_job(chance)) is None:
            return
        for _ in range(self.rng.choice((1, 1, 5))):
            delivery = deliver(self.keys, job.job_id, job.options["lane"])
            self.server.do("HSET", delivery.job_key, *_flat(delivery.flat_fields))
            self.server.do("RPUSH", delivery.queue_key, delivery.rq_id)

    async def _do_lose_an_entry(self, chance: float) -> None:
        for lane in ("interactive", "batch"):
            if found := self.server.do("RPOP", f"rq:queue:{self.keys.queue(lane)}"):
                self.server.do("DEL", f"rq:job:{found.decode()}")

    async def _do_lose_a_hash(self, chance: float) -> None:
        for lane in ("interactive", "batch"):
            for found in self.server.do("LRANGE", f"rq:queue:{self.keys.queue(lane)}", 0, -1):
                self.server.do("DEL", f"rq:job:{found.decode()}")

    async def _do_stop_by_rq(self, victim: Running, chance: float) -> None:
        process_entries = list(getattr(victim.desk, "_entries", ()))
        job = self._some_job(chance)
        if job is None or victim.desk is None:
            return
        self.stopped_by_rq.add(job.job_id)
        for rq_id in process_entries:
            self.loop.call_soon(victim.desk.on_stop, rq_id, context=victim.actor.context)

    async def _do_repack(self, chance: float) -> None:
        """Small steps by another hand, between which readers read."""
        for job in self.weather.jobs:
            for _ in range(20):
                if self._sync.run(calls.repack(self.keys, job.job_id, 3)) != "more":
                    break
                await asyncio.sleep(0.02 * self.rng.random())

    async def _do_late_claim(self, chance: float) -> None:
        """A worker's last request before it died: claimed, and nobody runs it."""
        if (job := self._some_job(chance)) is not None:
            self._sync.run(calls.claim(self.keys, job.job_id, f"late{self.rng.random()}", self.weather.lease))

    async def _do_forget(self, chance: float) -> None:
        job = self._some_job(chance)
        if job is not None and self._state(job.job_id) not in ("queued", "in_progress"):
            self.forgotten.add(job.job_id)
            self._sync.run(calls.forget(self.keys, job.job_id))


def _close(coroutine: Any) -> None:
    """To its very end: what it awaits while it cleans up is not waited for."""
    for _ in range(100):
        try:
            coroutine.close()
        except BaseException:  # noqa: BLE001, S112 - whatever its last words are
            continue
        return


def _flat(fields: list[Any]) -> list[Any]:
    return [each if isinstance(each, str | bytes | int) else str(each) for each in fields]


def _shas() -> dict[str, str]:
    from millstream.scripts import NAMES, load

    return {load(name).sha: name for name in NAMES}


_SHAS = _shas()
