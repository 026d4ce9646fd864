"""One worker process: one loop, its services, its signals, its end.

The order of an end matters: first nothing new is taken, then running jobs drain within the grace, then what is left
is handed over (lease released, delivered again), then the books are closed. The writer goes last, because all of them
write.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Sequence
from typing import Any

import structlog

from millstream import calls
from millstream.async_client import AsyncClient
from millstream.calls import Claim
from millstream.errors import JobNotFound, RedisUnavailable, SpecError
from millstream.job import Spec
from millstream.keys import LANES
from millstream.redis_door import translated
from millstream.settings import Settings

from .choice import GuardedUpstream, Upstreams
from .clerk import Clerk
from .clocks import Ticker
from .ending import end
from .intake import Intake
from .limiter import Limiter
from .line import Line
from .pulse import Pulse
from .relay import Relay, Services
from .repacker import Repacker
from .rq_worker import Entry, StreamWorker
from .sweeper import Sweeper
from .tickets import Leave, Tickets
from .turns import Turns
from .upstream import UpstreamSettings
from .writer import Writer

HAND_OVER = 5.0
"""Seconds to hand the remaining jobs over; what does not make it comes back when its lease runs out."""

SETTLE = 2.0
"""Seconds to give back what is held of the limits; later it comes back with the leases."""

log = structlog.get_logger()


class Process:
    """Everything one worker process runs."""

    def __init__(self, worker: StreamWorker, settings: Settings, upstreams: Sequence[UpstreamSettings]) -> None:
        self._worker = worker
        self._settings = settings
        self._stopping = asyncio.Event()
        self._broken = False
        self._hurry = asyncio.Event()
        self._running: dict[asyncio.Task[str], tuple[Entry, Relay]] = {}
        self._client = AsyncClient(settings=settings)
        self._line = Line(settings.redis_url)
        self._limits_line = Line(settings.redis_url)  # of its own: what is written does not wait for limits
        self._clerk = Clerk(worker)
        connections, patience = settings.streams + 16, settings.connect_timeout
        guarded = [GuardedUpstream(each, connections=connections, connect_timeout=patience) for each in upstreams]
        self._upstreams = Upstreams(guarded)
        queues = {lane: settings.keys.queue(lane) for lane in LANES}
        self._limiter = Limiter(
            self._limits_line.run, settings.keys, lease=settings.lease, asker=worker.name, upstreams=guarded,
            lanes=[lane for lane, queue in queues.items() if queue in worker.queue_names()],
            intermediate=[worker.intermediate_of(queue) for queue in queues.values()],
        )  # fmt: skip
        self._services = Services(
            run=self._client.run,
            keys=settings.keys,
            settings=settings,
            writer=Writer(
                self._line.run, settings.keys, settings.lease, settings.flush_ms and settings.flush_ms / 1000
            ),
            ticker=Ticker(),
            turns=Turns(),
            upstreams=self._upstreams,
            worker=worker.name,
            limiter=self._limiter,
        )
        self._sweeper = Sweeper(self._client, [each.name for each in upstreams])
        tickets = Tickets(self._client, self._upstreams, self._limiter)
        self._intake = Intake(self._client, worker, self._clerk, settings.streams, self._begin, tickets)

    async def run(self, *, burst: bool) -> bool:
        """Until a signal, or with `burst` until the lanes are empty and all has ended. False after a fault of ours."""
        loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, self._on_signal)
        self._worker.on_stop = lambda rq_id: loop.call_soon_threadsafe(self._stop_job, rq_id)
        with translated(self._settings.redis_url):
            await self._clerk.do(self._worker.born)
        await self._limits_line.ready()
        log.info(
            "worker.ready", worker=self._worker.name, streams=self._settings.streams, lanes=self._worker.queue_names()
        )
        services = [
            self._service(self._services.writer.run()),
            self._service(self._services.ticker.run()),
            self._service(self._clerk.run()),
            self._service(self._clerk.beat()),
            self._service(self._limiter.run()),
            self._service(Pulse(self._settings, self._services.writer.heartbeats).run()),
            self._service(self._sweeper.run()),
            self._service(Repacker(self._client).run()),
        ]
        try:
            await self._work(burst=burst)
            await self._drain()
        finally:
            await end(services[1:])
            await self._settle()
            await self._clerk.close()
            await end(services[:1])
            await self._upstreams.close()
            await self._client.close()
            self._line.close()
            self._limits_line.close()
        log.info("worker.stopped", worker=self._worker.name)
        return not self._broken

    async def _settle(self) -> None:
        """Give back what this process holds of the limits; should Redis be away, its tickets run out instead."""
        try:
            async with asyncio.timeout(SETTLE):
                await self._limiter.flush()
        except (RedisUnavailable, TimeoutError) as error:
            log.warning("limits.unsettled", reason=str(error) or "no answer in time")

    def _service(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        task.add_done_callback(self._service_ended)
        return task

    def _service_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("worker.broken", exc_info=error)  # a bug: hand the jobs over rather than limp on
            self._broken = True
            self._on_signal()
            self._on_signal()

    # Working -----------------------------------------------------------------------------------------------------

    async def _work(self, *, burst: bool) -> None:
        intake = self._service(self._intake.run(burst=burst))
        stop = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([intake, stop], return_when=asyncio.FIRST_COMPLETED)
        if intake.done() and burst and not self._broken:
            while self._running and not self._stopping.is_set():
                await asyncio.wait([stop, *self._running], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        self._intake.stop()  # not cancelled: what it has claimed must become a running job, or be handed over as one
        await asyncio.wait([intake])  # a fault of its own was told by then: the jobs are handed over, not dropped

    def _begin(self, entry: Entry, spec: Spec | SpecError, token: str, claim: Claim, leave: Leave) -> None:
        relay = Relay(self._services, entry.job_id, spec, token, claim, leave)
        task = asyncio.create_task(relay.run())
        self._running[task] = (entry, relay)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[str]) -> None:
        entry, _ = self._running.pop(task)
        self._intake.free()
        if task.cancelled():
            status = "stopped"
        elif (error := task.exception()) is not None:  # its lease runs out; another attempt follows
            if isinstance(error, RedisUnavailable):
                log.warning("job.let_go", job=entry.job_id, reason=str(error))
            else:
                log.error("job.broken", job=entry.job_id, exc_info=error)
            status = "failed"
        else:
            status = task.result()
        self._clerk.ended(entry, {"closed": "stopped", "fenced": "stopped"}.get(status, status))

    def _stop_job(self, rq_id: str) -> None:
        """RQ's stop-job: cancel the job for good."""
        for entry, relay in self._running.values():
            if entry.rq_job.id == rq_id:
                self._service(self._cancel(relay))

    async def _cancel(self, relay: Relay) -> None:
        try:
            await self._client.run(calls.cancel(self._settings.keys, relay.job_id))
        except RedisUnavailable as error:
            log.warning("job.stop_failed", job=relay.job_id, reason=str(error))
        except JobNotFound:  # a failover lost it: its relay learns that, too
            relay.look()
        else:
            relay.look()

    # Ending ------------------------------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            self._hurry.set()
        else:
            log.info("worker.stopping", jobs=len(self._running), grace=self._settings.grace)
        self._stopping.set()

    async def _drain(self) -> None:
        """Let running jobs end within the grace, then hand the rest over at once."""
        hurry = asyncio.create_task(self._hurry.wait())
        deadline = asyncio.get_running_loop().time() + self._settings.grace
        while self._running and not self._hurry.is_set():
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            await asyncio.wait([hurry, *self._running], timeout=left, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if self._running:
            await self._hand_over()

    async def _hand_over(self) -> None:
        left = dict(self._running)
        log.info("worker.handing_over", jobs=len(left))
        for _, relay in left.values():
            relay.hand_over()
        done, _ = await asyncio.wait(left, timeout=HAND_OVER)
        ended = [task for task in done if not task.cancelled() and task.exception() is None]
        released = [left[task][0] for task in ended if task.result() == "released"]
        released.sort(key=lambda entry: -entry.since)  # the oldest last, which then stands first
        keys = self._settings.keys
        again = [calls.redeliver(keys, entry.job_id, keys.lane_of(entry.rq_job.origin)) for entry in released]
        try:
            await self._client.run_many(again)
        except RedisUnavailable as error:  # released they are: a sweep finds that nobody delivered them
            log.warning("worker.not_delivered", jobs=len(released), reason=str(error))
