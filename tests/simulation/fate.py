"""What goes wrong in a schedule, other than on the network: each kind of the weather's actions, as a method."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from millstream import calls
from millstream.delivery import deliver
from tests.oracle import read_log

from .weather import Wanted

if TYPE_CHECKING:
    from .schedule import Running, Schedule

LOADING: Final = b"LOADING Redis is loading the dataset in memory"
READONLY: Final = b"READONLY You can't write against a read only replica."


class Fate:
    """Does what the plan says. `act` ends when it is done with, though its consequences may not be."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._server, self._network, self._loop = schedule.server, schedule.network, schedule.loop
        self._keys = schedule.keys
        self._rng = random.Random(f"{schedule.weather.seed} fate")
        self.stopped_by_rq: set[str] = set()
        self.forgotten: set[str] = set()
        self.before_loss: dict[str, list[Any]] | None = None
        """The logs as they were before the server lost the end of its data."""
        self.lost_since = 0.0
        self._actions: dict[str, Callable[[], Awaitable[None]]] = {
            "outage": lambda: self._away(None), "lose the tail": self._lose_the_tail, "read only": self._read_only,
            "stall": self._stall, "clock": self._clock, "flush scripts": self._flush_scripts,
            "cut subscribers": self._cut_subscribers, "stop a reader": self._stop_a_reader,
            "deliver again": self._deliver_again, "lose an entry": self._lose_an_entry,
            "lose a hash": self._lose_a_hash, "repack": self._repack, "late claim": self._late_claim,
            "forget": self._forget,
        }  # fmt: skip
        self._to_workers: dict[str, Callable[[Running], None]] = {
            "kill": self._kill, "stop": self._stop, "terminate": self._terminate,
            "terminate twice": self._terminate_twice, "cut": self._cut, "stop by RQ": self._stop_by_rq,
        }  # fmt: skip

    async def act(self, kind: str, chance: float) -> None:
        """One action; where it is about a worker, one that streams is preferred."""
        self._network.count(kind)
        if kind in self._actions:
            self._schedule.note("fate", kind)
            await self._actions[kind]()
        elif (victim := self._schedule.some_worker(chance)) is not None:
            self._schedule.note("fate", kind, victim.name)
            self._to_workers[kind](victim)

    def _later(self, longest: float, what: Callable[[], object]) -> None:
        self._loop.call_later(longest * self._rng.random(), what)

    # Workers -----------------------------------------------------------------------------------------------------

    def _kill(self, victim: Running) -> None:
        self._schedule.kill(victim)
        self._later(2, self._schedule.start_worker)

    def _stop(self, victim: Running) -> None:
        victim.stopped_at = self._loop.time()
        self._loop.stop_actor(victim.actor)
        self._later(5 * self._schedule.weather.lease, lambda: self._schedule.wake(victim))
        if not self._schedule.living():
            self._later(1, self._schedule.start_worker)

    def _terminate(self, victim: Running) -> None:
        if not victim.leaving:
            self._later(2, self._schedule.start_worker)
        self._schedule.terminate(victim)

    def _terminate_twice(self, victim: Running) -> None:
        self._terminate(victim)
        self._later(0.5, lambda: self._schedule.terminate(victim))

    def _cut(self, victim: Running) -> None:
        self._network.cut_all(of=victim.actor)

    def _stop_by_rq(self, victim: Running) -> None:
        """RQ's stop command, for all that it runs."""
        for rq_id, entry in list(victim.desk.running.items()) if victim.desk is not None else ():
            self.stopped_by_rq.add(entry)
            self._loop.call_soon(victim.desk.on_stop, rq_id, context=victim.actor.context)

    # The server --------------------------------------------------------------------------------------------------

    async def _lose_the_tail(self) -> None:
        if self.before_loss is not None:
            return
        data, self.lost_since = self._server.snapshot(), self._loop.time()
        await asyncio.sleep(0.05 + self._rng.choice((0.5, 3.0)) * self._rng.random())
        logs = {job: read_log(self._schedule.client.redis, self._keys, job) for job in self._schedule.job_ids}
        self.before_loss = logs
        await self._away(data)

    async def _away(self, data: Any) -> None:
        self._network.down, self._network.black_hole = True, self._rng.random() < 0.3
        self._network.cut_all()
        await asyncio.sleep(self._rng.choice((0.1, 1.0, 6.0)) * self._rng.random())
        self._server.restart(data)
        if data is not None:
            self._schedule.watch.forget()
        self._server.refuse_scripts_only, self._server.refusal = False, LOADING
        self._network.down = False
        await asyncio.sleep(0.5 * self._rng.random())
        self._server.refusal = None
        self._schedule.note("fate", "the server is back")

    async def _read_only(self) -> None:
        self._server.refuse_scripts_only, self._server.refusal = True, READONLY
        await asyncio.sleep(2 * self._rng.random())
        self._server.refusal = None

    async def _stall(self) -> None:
        """The server is busy, for longer than its clients wait; what they asked is done afterwards all the same."""
        self._loop.stop_actor(self._server.actor)
        await asyncio.sleep(self._rng.choice((0.3, 2.0, 7.0)) * self._rng.random())
        self._loop.go_on(self._server.actor)

    async def _clock(self) -> None:
        self._loop.leap += self._rng.choice((0.1, 1.0, 5.0)) * self._rng.random()

    async def _flush_scripts(self) -> None:
        self._server.do("SCRIPT", "FLUSH")

    async def _cut_subscribers(self) -> None:
        for _ in range(self._rng.randint(1, 4)):
            self._network.cut_all(subscribers=True)
            await asyncio.sleep(0.2 * self._rng.random())

    async def _stop_a_reader(self) -> None:
        readers = self._schedule.readers
        if readers:
            chosen = self._rng.choice(readers)
            self._loop.stop_actor(chosen)
            self._later(5, lambda: self._loop.go_on(chosen))

    # Deliveries --------------------------------------------------------------------------------------------------

    def _some_job(self) -> Wanted | None:
        known = [job for job in self._schedule.weather.jobs if self._schedule.status(job.job_id)]
        return self._rng.choice(known) if known else None

    async def _deliver_again(self) -> None:
        if (job := self._some_job()) is None:
            return
        for _ in range(self._rng.choice((1, 1, 5))):
            delivery = deliver(self._keys, job.job_id, job.options["lane"])
            self._server.do("HSET", delivery.job_key, *delivery.flat_fields)
            self._server.do("RPUSH", delivery.queue_key, delivery.rq_id)

    async def _lose_an_entry(self) -> None:
        for lane in ("interactive", "batch"):
            if found := self._server.do("RPOP", f"rq:queue:{self._keys.queue(lane)}"):
                self._server.do("DEL", f"rq:job:{found.decode()}")

    async def _lose_a_hash(self) -> None:
        for lane in ("interactive", "batch"):
            for found in self._server.do("LRANGE", f"rq:queue:{self._keys.queue(lane)}", 0, -1):
                self._server.do("DEL", f"rq:job:{found.decode()}")

    async def _late_claim(self) -> None:
        """A worker's last request before it died: claimed, and nobody runs it."""
        if (job := self._some_job()) is not None:
            token = f"late{self._rng.random()}"
            self._schedule.client.run(calls.claim(self._keys, job.job_id, token, self._schedule.weather.lease))

    # Ended jobs --------------------------------------------------------------------------------------------------

    async def _repack(self) -> None:
        """Small steps by another hand, between which readers read."""
        for job_id in self._schedule.job_ids:
            for _ in range(20):
                if self._schedule.client.run(calls.repack(self._keys, job_id, 3)) != "more":
                    break
                await asyncio.sleep(0.02 * self._rng.random())

    async def _forget(self) -> None:
        job = self._some_job()
        if job is not None and self._schedule.status(job.job_id) not in ("queued", "in_progress"):
            self.forgotten.add(job.job_id)
            self._schedule.client.run(calls.forget(self._keys, job.job_id))
