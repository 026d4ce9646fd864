"""A replica that had not heard everything becomes the primary: what it lacks is written again, or said to be lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from millstream import Chunk, LogRewound
from tests.faults.crowd import Crowd, Watcher
from tests.faults.report import Experiment
from tests.faults.test_redis_deaths import Loss
from tests.proxy import Proxy
from tests.tally import TALLY
from tests.upstream import Chunk as Part
from tests.upstream import Finish, Script, WaitFor
from tests.valkey import Valkey
from tests.worker_process import wait_until
from tests.world import World

LOUD = [Part(f"{number:08}" * 125) for number in range(80)]
"""80 KB: more than a worker keeps of what was acknowledged."""


@pytest.mark.experiment(24)
def test_a_failover_that_lost_the_tail_mixes_nothing(
    make_world: Callable[..., World], make_valkey: Callable[..., Valkey], soak: bool, seed: int,
    experiment: Experiment,
) -> None:  # fmt: skip
    """The replication stands still for a while, then the primary dies and the replica takes its place.

    The living workers write the tail again with the same seqs; where they no longer have it the job fails with
    `log_lost`; a job the replica never heard of is not found. Consumers that saw more are told LogRewound.
    """
    moments = random.Random(seed)
    loss, again = Loss(), 0
    for number in range(3 if soak else 1):
        TALLY.trials += 1
        again += fail_over(make_world, make_valkey, moments, loss, f"failover {seed} {number}")
    experiment.note(f"failover with a lost tail, seed {seed}: {loss}; {again} tails written again")


def fail_over(
    make_world: Callable[..., World], make_valkey: Callable[..., Valkey], moments: random.Random, loss: Loss, name: str
) -> int:
    """One failover; how many jobs went on in their first attempt although their tail had been lost.

    Their consumers see the same events, or are told, if they look before the tail is back.
    """
    primary, replica = make_valkey(options=["--repl-diskless-sync-delay", "0"]), make_valkey()
    with Proxy(primary.url) as line, Proxy(primary.url) as address, redis.Redis.from_url(replica.url) as promoted:
        promoted.replicaof("127.0.0.1", urlsplit(line.url).port)
        wait_until(lambda: promoted.info("replication")["master_link_status"] == "up", "the replica follows")
        world = make_world(address.url)
        loud = f"{name}, loud"
        world.upstream.on(Script(Part("begun"), WaitFor(loud), *LOUD, WaitFor(f"{loud}, end"), Finish()), prompt=loud)
        workers = [world.worker(), world.worker()]
        early = Crowd(world, f"{name}, early", 30, chunks=250)
        loud_job = world.submit(loud)
        watchers = [Watcher(world.make_client, job_id) for job_id in [*early.jobs, loud_job]]
        early.streams()
        for watcher in watchers:
            watcher.wait_for(2)
        time.sleep(moments.uniform(0.2, 0.7))
        line.go_deaf()
        world.upstream.open_gate(loud)
        late = Crowd(world, f"{name}, late", 10)
        watchers += [Watcher(world.make_client, job_id) for job_id in late.jobs]
        late.streams()
        heard = watchers[len(early.jobs)].events[loud_job]
        wait_until(lambda: sum(len(event.content) for event in heard if isinstance(event, Chunk)) > 70_000, "loud")
        primary.kill()
        killed = time.monotonic()
        lost = [each.job_id for each in watchers[: len(early.jobs)] if not reaches(promoted, world, each)]
        promoted.replicaof("NO", "ONE")
        address.lead_to(replica.url)
        world.upstream.open_gate(f"{loud}, end")

        error = world.outcome(loud_job, 60).error
        assert error is not None
        assert error["code"] == "log_lost"
        told = loss.check(world, [early, late], watchers, killed)
        assert isinstance(told[loud_job], LogRewound)
        assert lost, "the replica had heard everything"
        for job_id in lost:
            assert world.starts(job_id) == [(1, None)], "its worker lived, and wrote the tail again"
        assert all(worker.alive for worker in workers)
        world.check_left()
        return len(lost)


def reaches(replica: redis.Redis, world: World, watcher: Watcher) -> bool:
    """Whether the replica's log holds what this watcher has seen by now."""
    seq: Any = replica.hget(world.keys.state(watcher.job_id), "seq")
    return int(seq) >= watcher.events[watcher.job_id][-1].seq
