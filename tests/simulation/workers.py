"""A worker process: the product's own, on the virtual loop. Only RQ's books, which need threads, are a stand-in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import redis.exceptions
from rq.queue import Queue
from rq.serializers import JSONSerializer

import worker.process
from millstream import Settings
from worker.process import Process
from worker.rq_worker import DeliveryJob, Entry, StreamWorker
from worker.upstream import UpstreamSettings

from .network import Network
from .server import Server
from .upstream import Model, ScriptedUpstream

HASH_TTL = 600
"""Seconds after which a delivery's hash expires once it was taken; RQ's books would say the same, later."""


class Desk(StreamWorker):
    """What the process asks of its RQ worker: real where it decides, and without registries where it only counts."""

    def __init__(self, name: str, lanes: Sequence[str], server: Server, network: Network) -> None:
        self.queues = [
            Queue(lane, connection=NOTHING, serializer=JSONSerializer, job_class=DeliveryJob) for lane in lanes
        ]
        self.name = name
        self.connection = NOTHING
        self.on_stop: Callable[[str], object] = lambda _rq_id: None
        self.running: dict[str, str] = {}
        """Job ids by the RQ ids of their deliveries."""
        self._server, self._network = server, network

    def _reach(self) -> None:
        if self._network.down or self._server.refusal is not None:
            raise redis.exceptions.ConnectionError("away")

    def born(self) -> None:
        pass

    def book(self, started: Sequence[Entry], ended: Sequence[tuple[Entry, str]]) -> None:
        self._reach()
        self.running.update((entry.rq_job.id, entry.job_id) for entry in started)
        for entry, _ in ended:
            self.running.pop(entry.rq_job.id, None)
        for entry in [*started, *(entry for entry, _ in ended)]:
            queue = self._queue_of(entry.rq_job)
            self._server.do("LREM", queue.intermediate_queue_key, 1, entry.rq_job.id)
            self._server.do("EXPIRE", f"rq:job:{entry.rq_job.id}", HASH_TTL)

    def put_aside(self, queue_number: int, rq_id: str, reason: str, keep: bool) -> None:
        self._reach()
        self._server.do("LREM", self.queues[queue_number].intermediate_queue_key, 1, rq_id)
        self._server.do("EXPIRE", f"rq:job:{rq_id}", HASH_TTL)

    def beat(self) -> None:
        pass

    def maintain(self) -> None:
        pass

    def teardown(self) -> None:
        pass


NOTHING: Any = SimpleNamespace(connection_pool=SimpleNamespace(connection_kwargs={}))


class NoPulse:
    """Nothing keeps a virtual loop busy, and there are no threads to notice it."""

    def __init__(self, *_: Any) -> None:
        pass

    async def run(self) -> None:
        await asyncio.Event().wait()


class InOrder(dict[Any, None]):
    """A set in the order of its members' coming: a seed must mean the same in every process."""

    def add(self, member: Any) -> None:
        self[member] = None

    def discard(self, member: Any) -> None:
        self.pop(member, None)


@contextmanager
def product_on(model: Model, token_hex: Callable[[int], str]) -> Any:
    """The product's seams to the outside, led to this world: upstreams, and the randomness of tokens and nonces."""
    tokens = SimpleNamespace(token_hex=token_hex)
    with ExitStack() as stack:
        stack.enter_context(patch.object(worker.process, "GuardedUpstream", ScriptedUpstream))
        stack.enter_context(patch.object(worker.process, "Pulse", NoPulse))
        stack.enter_context(patch("worker.intake.secrets", tokens))
        # redis-py parses its own package's metadata for every connection: a third of a schedule's time.
        stack.enter_context(patch("redis.utils.get_lib_version", lambda: "8"))
        stack.enter_context(patch("millstream.delivery.secrets", tokens))
        stack.enter_context(patch.object(ScriptedUpstream, "model", model, create=True))
        yield


def make(name: str, settings: Settings, server: Server, network: Network, dialect: str) -> tuple[Process, Desk]:
    """A process, ready to `run`. Call it as the actor it is to be."""
    desk = Desk(name, [settings.keys.queue(lane) for lane in ("interactive", "batch")], server, network)
    upstreams = [UpstreamSettings(name="scripted", base_url="http://upstream/v1", continue_with=dialect)]
    process = Process(desk, settings, upstreams)
    for part, members in ((process._services.writer, "_outboxes"), (process._services.ticker, "_clocks")):
        assert isinstance(getattr(part, members), set)
        setattr(part, members, InOrder())
    return process, desk
