"""What may stand in an RQ queue: the same job five times, nothing where something should be, and poison."""

from __future__ import annotations

import json
import pickle
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from rq import Queue
from rq.serializers import JSONSerializer

from millstream import calls
from millstream.delivery import deliver, queue_key
from millstream.events import Started
from millstream.job import FUNCTION
from tests.upstream import Stall, Text, WaitFor, answer, expected_text
from tests.valkey import Valkey
from tests.worker_process import wait_until
from tests.world import SHORTEST, World, a_world

PATIENCE: Final = 4 * SHORTEST
"""Seconds after which a queued job is looked after, where the lease is the shortest."""

HASTY: Final = {"MILLSTREAM_LEASE": f"{SHORTEST:g}"}

LANE: Final = "interactive"


@pytest.fixture
def hasty(valkey: Valkey, tmp_path: Path) -> Iterator[World]:
    """As `world`, with the shortest lease for producers and workers."""
    with a_world(valkey.url.removesuffix("0") + "1", tmp_path, **HASTY) as made:
        yield made
        made.check_left()


def starts(world: World, job_id: str) -> list[int]:
    return [event.attempt for event in world.client.follow(job_id) if isinstance(event, Started)]


def intermediate(world: World) -> list[bytes]:
    found: list[bytes] = world.redis.lrange(f"{queue_key(world.keys, LANE)}:intermediate", 0, -1)
    return found


def test_a_job_delivered_five_times_runs_once(world: World) -> None:
    """Five deliveries at once, over two workers: one upstream stream, one attempt, and the others end in peace."""
    prompt = "five times"
    world.upstream.on(answer(Text(5, seed=1), WaitFor("five"), Text(5, seed=2)), prompt=prompt)
    job_id = world.submit(prompt)
    for _ in range(4):
        assert world.client.run(calls.redeliver(world.keys, job_id, LANE))
    first, second = world.start(), world.start()
    first.ready()
    second.ready()
    world.held("five")
    wait_until(lambda: world.redis.llen(queue_key(world.keys, LANE)) == 0, "all are taken")
    wait_until(lambda: len([*first.said("intake.nothing_to_do"), *second.said("intake.nothing_to_do")]) == 4, "4 busy")
    assert world.upstream.journal.max_open_streams == 1
    world.upstream.open_gate("five")
    assert world.outcome(job_id).text == expected_text(5, 1) + expected_text(5, 2)
    world.check(job_id)
    assert starts(world, job_id) == [1]
    assert len(world.upstream.journal) == 1
    wait_until(lambda: intermediate(world) == [], "RQ's books are written")


def test_a_duplicate_that_returned_early_costs_nothing(world: World) -> None:
    """The other delivery has come and gone when the real worker dies: the job still completes."""
    prompt = "duplicate, then death"
    world.upstream.on(answer(Text(5, seed=1), WaitFor("dup"), Stall()), answer(Text(20, seed=2)), prompt=prompt)
    first = world.worker()
    job_id = world.submit(prompt)
    world.held("dup")
    world.wait_for_seq(job_id, 2)
    world.client.run(calls.redeliver(world.keys, job_id, LANE))
    first.wait_for("intake.nothing_to_do", because="busy")
    second = world.worker()
    first.kill()
    assert world.outcome(job_id).text == expected_text(20, 2)
    world.check(job_id)
    assert starts(world, job_id) == [1, 2]
    assert second.said("sweep.delivered_again", because="lost")


def test_an_entry_that_vanished_is_found_by_the_sweep(hasty: World) -> None:
    """The queue has lost the job (LREM, a crash of RQ's): after the patience it is delivered again and runs."""
    job_id = hasty.submit("vanished")
    submitted = time.monotonic()
    [rq_id] = hasty.redis.lrange(queue_key(hasty.keys, LANE), 0, -1)
    assert hasty.redis.lrem(queue_key(hasty.keys, LANE), 1, rq_id) == 1
    hasty.redis.delete(b"rq:job:" + rq_id)
    worker = hasty.worker()
    hasty.check_text(job_id, "vanished")
    assert PATIENCE - 0.1 <= time.monotonic() - submitted < PATIENCE + 3
    assert worker.said("sweep.delivered_again", because="vanished")
    assert starts(hasty, job_id) == [1]


def test_a_crash_between_taking_and_claiming_loses_nothing(hasty: World) -> None:
    """An entry that stands in the intermediate list, whose taker is dead: the sweep delivers the job again."""
    job_id = hasty.submit("between")
    key = queue_key(hasty.keys, LANE)
    assert hasty.redis.lmove(key, f"{key}:intermediate", "LEFT", "RIGHT")
    hasty.worker()
    hasty.check_text(job_id, "between")
    assert starts(hasty, job_id) == [1]


def test_a_delivery_whose_rq_hash_expired_is_no_loss(world: World) -> None:
    """RQ's hash is gone, another delivery of the same job waits: the job completes."""
    job_id = world.submit("hash expired")
    [rq_id] = world.redis.lrange(queue_key(world.keys, LANE), 0, -1)
    world.client.run(calls.redeliver(world.keys, job_id, LANE))
    world.redis.delete(b"rq:job:" + rq_id)
    worker = world.worker()
    world.check_text(job_id, "hash expired")
    worker.wait_for("intake.put_aside", rq_job=rq_id.decode())
    wait_until(lambda: intermediate(world) == [], "the entry is out of the way")


def test_backlogs_are_no_loss(hasty: World) -> None:
    """Jobs that wait in their lane for longer than the patience are not delivered twice."""
    hasty.upstream.on(answer(WaitFor("backlog"), Text(3, seed=1)))
    worker = hasty.worker("--streams", "1")
    jobs = [job.id for job in hasty.client.submit_many([{"prompt": f"backlog {n}"} for n in range(5)])]
    began = time.monotonic()
    hasty.held("backlog")
    wait_until(lambda: time.monotonic() - began > PATIENCE + 2, "longer than the patience")
    assert hasty.redis.llen(queue_key(hasty.keys, LANE)) == 4
    assert worker.said("sweep.delivered_again") == []
    hasty.upstream.open_gate("backlog")
    for job_id in jobs:
        assert hasty.outcome(job_id).status == "completed"
        hasty.check(job_id)
    assert len(hasty.upstream.journal) == 5


# Poison ------------------------------------------------------------------------------------------------------------


def call(function: str = FUNCTION, args: object = ("00ff",), kwargs: Mapping[str, object] | None = None) -> bytes:
    return json.dumps([function, None, args, kwargs or {}]).encode()


def poisons(marker: Path) -> dict[str, dict[str, Any]]:
    """RQ job hashes that no worker may run; `marker` is a file that appears if one of them did."""
    touch = f"open({str(marker)!r}, 'w')"
    good = {"data": zlib.compress(call()), "status": "queued", "created_at": "2026-11-22T00:00:00.000000Z"}
    return {
        "foreign function": {**good, "data": zlib.compress(call("os.system", [f"touch {marker}"]))},
        "foreign module": {**good, "data": zlib.compress(call("tests.live.poison.strike", [str(marker)]))},
        "pickle": {**good, "data": zlib.compress(pickle.dumps(("os.system", None, (f"touch {marker}",), {})))},
        "pickle that runs": {**good, "data": zlib.compress(b"cbuiltins\nexec\n(S'" + touch.encode() + b"'\ntR.")},
        "bad zlib": {**good, "data": b"x\x9cnot zlib at all"},
        "no data": {"status": "queued"},
        "bomb": {**good, "data": zlib.compress(b" " * 200_000_000, 9)},
        "nested": {**good, "data": zlib.compress(b"[" * 4000)},
        "two arguments": {**good, "data": zlib.compress(call(args=["00ff", "more"]))},
        "keyword arguments": {**good, "data": zlib.compress(call(kwargs={"a": 1}))},
        "bad job id": {**good, "data": zlib.compress(call(args=["../../etc:{x}"]))},
        "id of a wrong type": {**good, "data": zlib.compress(call(args=[{"a": 1}]))},
        "success callback": {**good, "success_callback_name": "tests.live.poison.strike"},
        "failure callback": {**good, "failure_callback_name": "tests.live.poison.strike"},
        "stopped callback": {**good, "stopped_callback_name": "tests.live.poison.strike"},
        "webhook": {**good, "webhooks": json.dumps([{"url": "http://127.0.0.1:9/", "job_status": "failed"}])},
        "retries": {**good, "retry_intervals": "[0]", "retries_left": "3"},
        "bad status": {**good, "data": zlib.compress(call("x")), "status": "\xff"},
        "bad time": {**good, "data": zlib.compress(call("x")), "created_at": "yesterday"},
    }


def test_poison_stops_nothing_and_runs_nowhere(world: World, tmp_path: Path, say: Callable[[str], None]) -> None:
    """Before and between good jobs stand entries that lie: the good ones finish, nothing foreign runs.

    Each is put aside with its reason, where there is a hash to keep it in, and in the worker's log in any case.
    """
    marker = tmp_path / "it ran"
    queue = queue_key(world.keys, LANE)
    found = poisons(marker)
    jobs = []
    for number, (name, fields) in enumerate(found.items()):
        rq_id = f"poison-{number}"
        world.redis.hset(f"rq:job:{rq_id}", mapping=fields)
        world.redis.rpush(queue, rq_id)
        jobs.append((world.submit(f"behind {name}"), f"behind {name}"))
    world.redis.rpush(queue, "no-hash", b"\xff\xfe not utf-8", "", "x" * 10_000, "a:b {c} \r\n")
    world.redis.set("rq:job:wrong-type", "text")
    world.redis.rpush(queue, "wrong-type")
    broken = world.submit("its state is of another type")
    world.redis.delete(world.keys.state(broken))
    world.redis.set(world.keys.state(broken), "text")
    specless = world.submit("its spec is of another type")
    world.redis.delete(world.keys.spec(specless))
    world.redis.rpush(world.keys.spec(specless), "text")
    nobody = deliver(world.keys, "nobody", LANE)
    world.redis.hset(nobody.job_key, mapping=nobody.fields)
    world.redis.rpush(queue, nobody.rq_id)
    last = world.submit("behind all of them")
    worker = world.worker()
    for job_id, prompt in [*jobs, (last, "behind all of them")]:
        world.check_text(job_id, prompt)
        world.check(job_id)
    assert not marker.exists()
    put_aside = {line["rq_job"]: line["reason"] for line in worker.said("intake.put_aside")}
    for number, name in enumerate(found):
        reason = put_aside[f"poison-{number}"]
        assert reason, name
        kept = world.redis.hgetall(f"rq:job:poison-{number}")
        assert kept[b"status"] == b"failed", name
        assert zlib.decompress(kept[b"exc_info"]).decode() == reason
        assert world.redis.ttl(f"rq:job:poison-{number}") > 0
    assert {"no-hash", "wrong-type", "x" * 100} <= set(put_aside)
    assert world.redis.llen(queue) == 0
    wait_until(lambda: intermediate(world) == [], "nothing is left in between")
    assert worker.said("intake.nothing_to_do", job=broken, because="error")
    assert worker.said("intake.nothing_to_do", job="nobody", because="unknown")
    refused = world.outcome(specless).error
    assert refused is not None
    assert refused["code"] == "invalid_spec"
    say(f"{len(put_aside)} poisoned entries, 2 jobs with broken keys: {len(jobs) + 1} good jobs behind them finished")
    world.redis.delete("rq:job:wrong-type", world.keys.state(broken), world.keys.spec(broken))
    world.redis.zrem(world.keys.open, broken)


def test_rqs_maintenance_runs_nothing_foreign(world: World, tmp_path: Path) -> None:
    """RQ's clean-up of abandoned and stuck jobs honours what their hashes say; a worker's must not, nor trip over it.

    What stands in the registries of our lanes as abandoned is written by whoever can write to Redis.
    """
    marker = tmp_path / "it ran"
    hook = f"{world.upstream.base_url}/hook"
    hashes = {
        "abandoned-hook": {"webhooks": json.dumps([{"url": hook, "job_status": "failed"}])},
        "abandoned-callback": {"failure_callback_name": "antigravity.fly"},
        "abandoned-retry": {"retries_left": "5", "retry_intervals": "[0]"},
        "abandoned-time": {"created_at": "yesterday"},
    }
    key = queue_key(world.keys, LANE)
    for name, fields in hashes.items():
        world.redis.hset(
            f"rq:job:{name}", mapping={
                "data": zlib.compress(call("os.system", [f"touch {marker}"])), "status": "started",
                "created_at": "2026-11-22T00:00:00.000000Z", "origin": world.keys.queue(LANE), **fields,
            },
        )  # fmt: skip
        world.redis.zadd(f"rq:wip:{world.keys.queue(LANE)}", {f"{name}:execution": 1})
        world.redis.rpush(f"{key}:intermediate", f"{name}")
        world.redis.set(f"{key}:intermediate:first_seen:{name}", "1")
    world.redis.rpush(f"{key}:intermediate", b"\xff\xfe")
    worker = world.worker()
    job_id = world.submit("after the maintenance")
    world.check_text(job_id, "after the maintenance")
    wait_until(lambda: not world.redis.zcard(f"rq:wip:{world.keys.queue(LANE)}"), "the maintenance has looked")
    worker.wait_for("rq.maintenance_failed")  # what is no text even RQ cannot read
    again = world.submit("after the second look")
    world.check_text(again, "after the second look")
    assert worker.alive
    worker.terminate()
    assert worker.wait() == 0
    assert not marker.exists()
    assert [each.request.path for each in world.upstream.journal] == ["/v1/chat/completions"] * 2
    world.redis.delete(f"{key}:intermediate", *(f"rq:job:{name}" for name in hashes))
    world.redis.delete(f"rq:wip:{world.keys.queue(LANE)}", key, *(f"rq:results:{name}" for name in hashes))


def test_an_accepted_job_may_be_enqueued_by_hand(world: World) -> None:
    """`Queue.enqueue(FUNCTION, job_id)`, as RQ's own tools do it, runs an accepted job; of others nothing happens."""
    job_id = world.submit("by hand")
    [delivered] = world.redis.lrange(queue_key(world.keys, LANE), 0, -1)
    world.redis.delete(queue_key(world.keys, LANE), b"rq:job:" + delivered)
    queue = Queue(world.keys.queue(LANE), connection=world.redis, serializer=JSONSerializer)
    queue.enqueue(FUNCTION, "unknown-job")
    by_hand = queue.enqueue(FUNCTION, job_id)
    worker = world.worker()
    world.check_text(job_id, "by hand")
    worker.wait_for("intake.nothing_to_do", job="unknown-job", because="unknown")
    wait_until(lambda: by_hand.get_status() == "finished", "RQ's books say so")
    assert by_hand.return_value() == "completed"


@pytest.mark.parametrize("lane", ["interactive", "batch"])
def test_both_lanes_are_served(shared: World, lane: str) -> None:
    """A job of either lane runs on a worker that was told nothing."""
    prompt = f"lane {lane}"
    shared.check_text(shared.submit(prompt, lane=lane), prompt)
