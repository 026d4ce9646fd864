"""Runs one schedule: the product's own workers and clients, the server, the network and the upstream on one loop."""

from __future__ import annotations

import asyncio
import gc
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import fakeredis
import structlog

from millstream import AsyncClient, Client, Settings
from millstream.scripts import NAMES, load

from . import server as servers
from . import workers
from .fate import Fate
from .loop import ACTOR, Actor, OutOfTimeError, VirtualLoop
from .network import Faults, Network
from .people import People
from .server import Peer, Server
from .upstream import Model
from .watch import Watch
from .weather import Weather

LONGEST = 600.0
"""Virtual seconds a schedule may take: patience, breakers, retries and long waits fit in; a lost job does not."""

_SHOWN = {"append": 10, "claim": 10, "release": 5}
"""How many of a script's arguments the trace shows; else 2, since a delivery has today's date in it."""


@dataclass
class Running:
    """One worker process, living or not."""

    name: str
    actor: Actor
    task: asyncio.Task[Any] | None = None
    desk: Any = None
    leaving: bool = False
    stopped_at: float = 0.0
    stops: list[tuple[float, float]] = field(default_factory=list)


class Schedule:
    """One run. `play` it; what happened stays in its attributes for the judge."""

    def __init__(self, weather: Weather) -> None:
        self.weather = weather
        self.trace: list[tuple[float, str, str]] = []
        self.complaints: list[str] = []
        self.loop = VirtualLoop(random.Random(f"{weather.seed} turns"), LONGEST)
        self.model = Model(weather.seed, weather.temper, self.note)
        self.server = Server(self.loop, Actor("server"))
        self.watch = Watch(self.server, self.complain)
        self.server.seen, self.server.ran = self._seen, self.watch.look
        chance = random.Random(f"{weather.seed} network")
        self.network = Network(self.loop, chance, self.server.actor, self.server.serve, self.note)
        self.loop.connect = self.network.connect
        self.workers: list[Running] = []
        self.readers: list[Actor] = []
        people = random.Random(f"{weather.seed} people")
        self.people = People(self.loop, people, weather, self._connect, self.note)
        self.client = Client(connection=fakeredis.FakeRedis(server=self.server.fake), script_header=False)
        """An eye and a hand that are no part of the world: they see and do at once, whatever the weather."""
        self.keys = self.client.keys
        self.fate = Fate(self)
        self._shas = {load(name).sha: name for name in NAMES}

    @property
    def job_ids(self) -> list[str]:
        return [job.job_id for job in self.weather.jobs]

    def status(self, job_id: str) -> str:
        """As the state says; empty without one."""
        found = self.client.redis.hget(self.keys.state(job_id), "status")
        return found.decode() if found else ""

    # The record ---------------------------------------------------------------------------------------------------

    def note(self, who: object, *what: object) -> None:
        """Who did what, at this virtual moment."""
        self.trace.append((self.loop.time(), str(who), " ".join(map(str, what))))

    def complain(self, what: str) -> None:
        """Something must not be as it is."""
        self.note("judge", what)
        self.complaints.append(what)

    def _seen(self, peer: Peer, fields: list[bytes], refused: bool) -> None:
        name = fields[0].decode()
        if peer.wire is None or name in ("CLIENT", "TIME", "ZRANGE", "EVAL"):
            return
        if name == "EVALSHA":
            name = self._shas.get(fields[1].decode(), "script")
            said = fields[3 + int(fields[2]) :][: _SHOWN.get(name, 2)]
            name += " " + " ".join(each.decode("utf-8", "replace")[:40] for each in said)
        self.note(peer.wire.owner, "->", name, "REFUSED" if refused else "")

    def _log(self, _logger: Any, level: str, event: Any) -> Any:
        who = ACTOR.get(self.loop.world)
        words = " ".join(f"{name}={value}" for name, value in event.items() if name not in ("event", "exc_info"))
        self.note(who, event["event"], words)
        if level == "error":
            self.complain(f"{who} logs {event['event']} {words} {event.get('exc_info')!r}")
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
        seen, kept = structlog.get_config(), random.getstate()
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
        weather, people = self.weather, self.people
        self.network.faults = weather.faults
        for _ in range(weather.workers):
            self.start_worker()
        tasks = self._spawn("user", *(people.ask(job) for job in weather.jobs))
        for number, reader in enumerate(weather.readers):
            tasks += self._spawn(f"reader-{number}", people.read(reader))
        if weather.reads_all:
            tasks += self._spawn("reader-all", people.read_all())
        for at, kind, chance in weather.actions:
            await asyncio.sleep(max(0.0, at - self.loop.time()))
            await self.fate.act(kind, chance)
        await asyncio.sleep(max(0.0, weather.until - self.loop.time()))
        self._calm_down()
        await asyncio.wait(tasks)
        for each in tasks:
            if (error := each.exception()) is not None:
                self.complain(f"{each.get_name()}: {error!r}")
        await self._end_workers()

    def _calm_down(self) -> None:
        self.note("fate", "all is well from here on")
        self.network.faults = Faults()
        for reader in self.readers:
            self.loop.go_on(reader)
        for each in self.workers:
            self.wake(each)
        if not self.living():
            self.start_worker()

    def _open(self) -> bool:
        return any(self.status(job_id) in ("queued", "in_progress") for job_id in self.job_ids)

    async def _end_workers(self) -> None:
        """Whatever was asked must end and be packed; then the workers leave."""
        while self._open():  # noqa: ASYNC110 - no bell rings for data
            await asyncio.sleep(0.2)
        while self.client.redis.zcard(self.keys.repack):  # noqa: ASYNC110 - no bell rings for data
            await asyncio.sleep(0.5)
        left = [(each, each.task) for each in self.workers if not each.actor.dead and each.task is not None]
        for each, _ in left:
            self.terminate(each)
        for each, task in left:
            if not each.actor.dead and await task is not True:
                self.complain(f"{each.name} did not end well")

    def _unfinished(self) -> str:
        states = {job_id: self.client.redis.hgetall(self.keys.state(job_id)) for job_id in self.job_ids}
        waiting = [f"{each.who} of {each.job_id}" for each in self.people.heard if not each.done]
        living = [each.name for each in self.workers if each.task is not None and not each.task.done()]
        return f"readers that wait: {waiting}; states: {states}; workers: {living}"

    def _bury(self) -> None:
        """Take apart what is left: processes that were killed, without their last words."""
        self.loop.world.dead = True
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        asyncio._set_running_loop(self.loop)  # cleaning up, they ask for it
        try:
            for task in self.loop.tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                task._log_traceback = False
                if not task.done():
                    _close(task.get_coro())
            self._let_go()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # their connections were not closed, of course
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
        if name.startswith("reader"):
            self.readers.append(actor)
        return [self.loop.spawn(actor, each) for each in coroutines]

    def _connect(self, who: str) -> AsyncClient:
        return AsyncClient(settings=self._settings(who), clock=self.loop.time)

    # Workers ------------------------------------------------------------------------------------------------------

    def _settings(self, who: str) -> Settings:
        return Settings(
            redis_url=f"redis://{who}:6379/0?protocol=2", lease=self.weather.lease, streams=self.weather.streams,
            grace=self.weather.grace, first_token_timeout=3.0, idle_timeout=1.5, total_timeout=60.0, retries=3,
        )  # fmt: skip

    def start_worker(self) -> None:
        """A new process, with a name of its own."""
        name = f"w{len(self.workers) + 1}"
        running = Running(name, Actor(name))
        self.workers.append(running)

        async def live() -> bool:
            process, running.desk = workers.make(
                name, self._settings(name), self.server, self.network, self.weather.dialect
            )
            return await process.run(burst=False)

        running.task = self.loop.spawn(running.actor, live())
        self.note(name, "born")

    def terminate(self, each: Running) -> None:
        """SIGTERM; who has not come to handle it dies."""
        each.leaving = True
        if not self.loop.signal(each.actor, signal.SIGTERM):
            self.kill(each)

    def kill(self, each: Running) -> None:
        """Kill -9: its connections are closed by the kernel."""
        self.loop.kill(each.actor)
        self.network.cut_all(of=each.actor)
        for request in self._asked_by(each):
            request.open, request.closed_at = False, self.loop.time()

    def wake(self, each: Running) -> None:
        """SIGCONT, for one that is stopped."""
        if each.actor.stopped:
            self.loop.go_on(each.actor)
            each.stops.append((each.stopped_at, self.loop.time()))

    def _asked_by(self, each: Running) -> list[Any]:
        return [request for request in self.model.all if request.open and request.asker is each.actor]

    def living(self) -> list[Running]:
        """Workers that take jobs."""
        return [each for each in self.workers if not (each.actor.dead or each.leaving or each.actor.stopped)]

    def some_worker(self, chance: float) -> Running | None:
        """One that could be hit; rather one that streams."""
        there = [
            each
            for each in self.workers
            if not (each.actor.dead or each.actor.stopped or (each.task is not None and each.task.done()))
        ]
        chosen = [each for each in there if self._asked_by(each)] or there
        return chosen[int(chance * len(chosen))] if chosen else None


def _close(coroutine: Any) -> None:
    """To its very end: what it awaits while it cleans up is not waited for."""
    for _ in range(100):
        try:
            coroutine.close()
        except BaseException:  # noqa: BLE001 - whatever its last words are
            continue
        return
