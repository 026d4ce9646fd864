"""Consumers that are too slow, or cut off again and again: each ends with the whole log."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import pytest

from local.guard import ROOT
from millstream import AsyncClient, Client
from millstream.events import Event, encode
from tests.contract.consumers import Consumer
from tests.faults.report import Experiment
from tests.proxy import Proxy
from tests.tally import TALLY
from tests.upstream import Chunk as Part
from tests.upstream import Finish, Script, Text, WaitFor, answer
from tests.valkey import Valkey
from tests.worker_process import environment, wait_until
from tests.world import World

UNREAD: Final = 60 * 1024 * 1024
PIECE: Final = 16_000
"""Characters of a chunk: nearly as much as one event may hold."""


@pytest.mark.experiment(27)
def test_a_consumer_with_60_mb_unread_is_cut_off_and_ends_with_the_whole_log(
    make_world: Callable[..., World], make_valkey: Callable[..., Valkey], experiment: Experiment
) -> None:
    """Two consumers stand still while 60 MB are published; the server drops them; then they read on from the log."""
    server = make_valkey()
    world = make_world(server.url)
    prompt = "more than anybody reads"
    count = UNREAD // PIECE
    parts = [Part(f"{number:08}" * (PIECE // 8)) for number in range(count)]
    live = (WaitFor("subscribed"), Part("live"), WaitFor("stopped"))
    world.upstream.on(Script(Part("first"), *live, *parts, Finish()), prompt=prompt)
    world.worker()
    job_id = world.submit(prompt)
    goes_on = threading.Event()

    def stand_still(event: Event) -> None:
        if event.seq == 3:
            assert goes_on.wait(60)

    makers: list[Callable[[], Client | AsyncClient]] = [world.make_client, lambda: AsyncClient(settings=world.settings)]
    consumers = [Consumer(make, [job_id], on_event=stand_still) for make in makers]
    channel = world.keys.chunks(job_id)
    wait_until(lambda: world.redis.pubsub_numsub(channel)[0][1] == len(consumers), "both are subscribed")
    world.upstream.open_gate("subscribed")
    for consumer in consumers:
        consumer.wait_for(3)
    before = world.redis.info("stats")["client_output_buffer_limit_disconnections"]
    world.upstream.open_gate("stopped")
    world.wait_for_status(job_id, "completed", within=60)
    cut = world.redis.info("stats")["client_output_buffer_limit_disconnections"] - before
    assert cut == len(consumers)
    goes_on.set()
    seen = [consumer.join(60)[job_id] for consumer in consumers]
    world.check(job_id, seen)
    TALLY.trials += 1
    experiment.note(f"{count * PIECE / 2**20:.0f} MB unread: {cut} consumers cut off, {len(seen[0])} events each")


class Follower:
    """A program that writes one event a line."""

    def __init__(self, world: World, *command: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment(world.environ), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def first_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def rest(self) -> str:
        said, complaints = self._process.communicate(timeout=60)
        assert self._process.returncode in (0, 4), complaints
        return said

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@contextmanager
def programs(world: World, job_id: str) -> Iterator[Sequence[Follower]]:
    """The command line's `follow --json`, and the example that is written from docs/wire.md alone."""
    commands = (["-m", "producer", "follow", job_id, "--json"], ["docs/examples/follow.py", job_id])
    made = [Follower(world, *command) for command in commands]
    try:
        yield made
    finally:
        for each in made:
            each.end()


def lines(log: Sequence[Event]) -> list[Any]:
    """The events as JSON without their times, which a repacked log rounds."""
    return [{**json.loads(encode(event)), "at": 0} for event in log]


@pytest.mark.experiment(27)
@pytest.mark.parametrize("cuts", ["killed", "reset"])
def test_every_kind_of_consumer_outlives_lost_subscriptions(
    make_world: Callable[..., World], valkey_url: str, cuts: str, soak: bool, experiment: Experiment
) -> None:
    """Five times a second all subscriptions are killed by the server, or all of the consumers' connections are reset.

    The worker's connection is left alone. The library's `follow` and `follow_many`, blocking and asyncio, the command
    line and the docs' example end with the whole log.
    """
    if cuts == "reset" and not soak:
        pytest.skip("in the long round")
    seconds = 10.0 if soak else 3.0
    with Proxy(valkey_url) as proxy:
        world, near = make_world(valkey_url), make_world(proxy.url)
        for number in range(5):
            world.upstream.on(answer(Text(None, 0.004 + 0.001 * number, seed=number)), prompt=f"cut off {number}")
        world.worker()
        jobs = [world.submit(f"cut off {number}") for number in range(5)]
        makers: list[Callable[[], Client | AsyncClient]] = [
            near.make_client, lambda: AsyncClient(settings=near.settings),
        ]  # fmt: skip
        consumers = [Consumer(make, ids) for make in makers for ids in (jobs[:1], jobs)]
        with programs(near, jobs[0]) as followers:
            firsts = [follower.first_line() for follower in followers]
            for consumer in consumers:
                consumer.wait_for(1)
            began, cut = time.monotonic(), 0
            while time.monotonic() - began < seconds:
                cut += world.redis.client_kill_filter(_type="pubsub") if cuts == "killed" else proxy.cut()
                time.sleep(0.2)
            for job_id in jobs:
                assert world.cancel(job_id) == "cancelled"
            seen = [consumer.join() for consumer in consumers]
            for job_id in jobs:
                world.check(job_id, [events[job_id] for events in seen if job_id in events])
            log = lines(list(world.client.follow(jobs[0])))
            for first, follower in zip(firsts, followers, strict=True):
                said = [{**json.loads(line), "at": 0} for line in (first + follower.rest()).strip().split("\n")]
                assert said == log
    TALLY.trials += cut
    experiment.note(f"{cut} connections of consumers {cuts} in {seconds:g} s: all {len(consumers) + 2} saw everything")


@pytest.mark.experiment(26)
def test_a_publisher_that_is_cut_off_again_and_again_doubles_nothing(
    make_world: Callable[..., World], valkey_url: str, soak: bool, experiment: Experiment
) -> None:
    """All of the worker's connections are reset five times a second; its consumers' are left alone."""
    seconds = 10.0 if soak else 3.0
    with Proxy(valkey_url) as proxy:
        world, near = make_world(valkey_url), make_world(proxy.url)
        prompts = [f"cut publisher {number}" for number in range(10)]
        pace = 0.01
        for number, prompt in enumerate(prompts):
            world.upstream.on(answer(Text(int(seconds / pace), pace, seed=number)), prompt=prompt)
        worker = near.worker()
        jobs = [world.submit(prompt) for prompt in prompts]
        consumers = [Consumer(world.make_client, [job_id]) for job_id in jobs]
        cut = 0
        while any(not world.client.status(job_id).ended for job_id in jobs):
            cut += proxy.cut()
            time.sleep(0.2)
        for job_id, consumer in zip(jobs, consumers, strict=True):
            world.check(job_id, [consumer.join()[job_id]])
            assert world.starts(job_id) == [(1, None)]
        assert len(world.upstream.journal) == len(jobs)
        assert worker.alive
        worker.terminate()
        assert worker.wait() == 0
        near.check_left()
    TALLY.trials += cut
    experiment.note(f"{cut} connections of the worker reset under {len(jobs)} streams: one attempt each")
