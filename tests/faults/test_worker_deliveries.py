"""What may stand in an RQ queue: the same job five times, nothing where something should be, and poison."""

from __future__ import annotations

import json
import pickle
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from rq import Queue
from rq.serializers import JSONSerializer
from rq.suspension import WORKERS_SUSPENDED

from millstream import calls
from millstream.delivery import deliver, job_of, queue_key
from millstream.job import FUNCTION
from millstream.keys import text_of
from tests.tally import TALLY
from tests.upstream import Stall, Text, WaitFor, answer, expected_text
from tests.valkey import Valkey
from tests.worker_process import WorkerProcess, wait_until
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


def intermediate(world: World) -> list[bytes]:
    found: list[bytes] = world.redis.lrange(f"{queue_key(world.keys, LANE)}:intermediate", 0, -1)
    return found


@pytest.mark.experiment(19)
def test_a_job_delivered_five_times_runs_once(world: World, soak: bool) -> None:
    """Five deliveries at once, over two workers: one upstream stream, one attempt, and the others end in peace."""
    workers = [world.worker(), world.worker()]
    for trial in range(20 if soak else 2):
        prompt = gate = f"five times {trial}"
        world.upstream.on(answer(Text(5, seed=1), WaitFor(gate), Text(5, seed=2)), prompt=prompt)
        world.redis.set(WORKERS_SUSPENDED, 1)  # nobody takes while they are put there
        job_id = world.submit(prompt)
        for _ in range(4):
            assert world.client.run(calls.redeliver(world.keys, job_id, LANE))
        world.redis.delete(WORKERS_SUSPENDED)
        world.held(gate)
        wait_until(partial(turned_away, workers, job_id, 4), "four are turned away")
        assert world.upstream.journal.open_streams == 1
        world.upstream.open_gate(gate)
        assert world.outcome(job_id).text == expected_text(5, 1) + expected_text(5, 2)
        world.check(job_id)
        assert world.starts(job_id) == [(1, None)]
        assert len(world.upstream.requests_for(prompt)) == 1
        TALLY.trials += 1
    wait_until(lambda: intermediate(world) == [], "RQ's books are written")


def turned_away(workers: Sequence[WorkerProcess], job_id: str, count: int) -> bool:
    return sum(len(each.said("intake.nothing_to_do", job=job_id)) for each in workers) == count


@pytest.mark.experiment(20)
def test_two_deliveries_to_one_process_run_once(world: World) -> None:
    """Taken in one go or one after the other: the second finds the first one's lease."""
    prompt = "twice to one"
    world.upstream.on(answer(Text(5, seed=1), WaitFor("one"), Text(5, seed=2)), prompt=prompt)
    job_id = world.submit(prompt)
    world.client.run(calls.redeliver(world.keys, job_id, LANE))
    worker = world.worker()
    world.held("one")
    wait_until(partial(turned_away, [worker], job_id, 1), "the second is turned away")
    world.client.run(calls.redeliver(world.keys, job_id, LANE))
    wait_until(partial(turned_away, [worker], job_id, 2), "so is a third")
    world.upstream.open_gate("one")
    assert world.outcome(job_id).text == expected_text(5, 1) + expected_text(5, 2)
    world.check(job_id)
    assert len(world.upstream.requests_for(prompt)) == 1
    TALLY.trials += 1


@pytest.mark.experiment(20)
def test_a_duplicate_that_returned_early_costs_nothing(world: World, soak: bool) -> None:
    """The other delivery has come and gone when the real worker dies: the job still completes."""
    worker = world.worker()
    for trial in range(5 if soak else 1):
        prompt = gate = f"duplicate, then death {trial}"
        world.upstream.on(answer(Text(5, seed=1), WaitFor(gate), Stall()), answer(Text(20, seed=2)), prompt=prompt)
        job_id = world.submit(prompt)
        world.held(gate)
        world.wait_for_seq(job_id, 2)
        world.client.run(calls.redeliver(world.keys, job_id, LANE))
        worker.wait_for("intake.nothing_to_do", job=job_id, because="busy")
        successor = world.worker()
        worker.kill()
        assert world.outcome(job_id).text == expected_text(20, 2)
        world.check(job_id)
        assert world.starts(job_id) == [(1, None), (2, "worker_lost")]
        assert successor.said("sweep.delivered_again", because="lost", job=job_id)
        worker = successor
        TALLY.trials += 1


@pytest.mark.experiment(21)
def test_a_delivery_that_vanished_is_found_by_the_sweep(hasty: World) -> None:
    """The queue has lost it (LREM, a crash of RQ's), or its taker died before the claim: after the patience it runs."""
    key = queue_key(hasty.keys, LANE)
    vanished = hasty.submit("vanished")
    [rq_id] = hasty.redis.lrange(key, 0, -1)
    assert hasty.redis.lrem(key, 1, rq_id) == 1
    hasty.redis.delete(b"rq:job:" + rq_id)
    taken = hasty.submit("between")
    assert hasty.redis.lmove(key, f"{key}:intermediate", "LEFT", "RIGHT")
    worker = hasty.worker()
    judges = hasty.now() + SHORTEST  # after an unbroken lease of its connection
    for job_id, prompt in ((vanished, "vanished"), (taken, "between")):
        hasty.check_text(job_id, prompt)
        assert worker.said("sweep.delivered_again", because="vanished", job=job_id)
        assert hasty.starts(job_id) == [(1, None)]
        submitted = hasty.client.status(job_id).created_at
        assert submitted is not None
        assert submitted + PATIENCE <= hasty.began_at(job_id) < max(submitted + PATIENCE, judges) + 2
        TALLY.trials += 1


@pytest.mark.experiment(20)
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


@pytest.mark.experiment(21)
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


@pytest.mark.experiment(21)
@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_what_comes_back_to_a_backlog_stands_first_and_once(hasty: World, end: str) -> None:
    """The six running jobs of twenty lose their worker, and nobody serves their lane for many leases: one delivery
    each, and whoever serves it at last begins with the six.
    """
    hasty.upstream.on(answer(Text(3, seed=1), WaitFor("backlog"), Text(3, seed=2)))
    worker = hasty.worker("--lane", "batch", "--streams", "6", MILLSTREAM_GRACE="0.05")
    jobs = [job.id for job in hasty.client.submit_many([{"prompt": f"{n}", "lane": "batch"} for n in range(20)])]
    hasty.held("backlog", 6)
    hasty.worker("--lane", "interactive")  # it sweeps, as all do
    queue = queue_key(hasty.keys, "batch")
    wait_until(lambda: hasty.redis.llen(queue) == 14, "the others wait")
    getattr(worker, end)()
    wait_until(lambda: hasty.redis.llen(queue) == 20, "the six come back")
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > 2 * PATIENCE + 2, "longer than the patience, and many leases")
    stand = [job_of(text_of(entry)) for entry in hasty.redis.lrange(queue, 0, -1)]
    assert (set(stand[:6]), stand[6:]) == (set(jobs[:6]), jobs[6:])
    hasty.upstream.open_gate("backlog")
    hasty.worker("--lane", "batch")
    for job_id in jobs:
        assert hasty.outcome(job_id).status == "completed"
        hasty.check(job_id)


# Poison ------------------------------------------------------------------------------------------------------------


def call(function: str = FUNCTION, args: object = ("00ff",), kwargs: Mapping[str, object] | None = None) -> bytes:
    return json.dumps([function, None, args, kwargs or {}]).encode()


def poisons(marker: Path) -> dict[str, dict[str, Any]]:
    """RQ job hashes that no worker may run; `marker` is a file that appears if one of them did."""
    touch = f"open({str(marker)!r}, 'w')"
    good = {"data": zlib.compress(call()), "status": "queued", "created_at": "2026-11-22T00:00:00.000000Z"}
    return {
        "foreign function": {**good, "data": zlib.compress(call("os.system", [f"touch {marker}"]))},
        "foreign module": {**good, "data": zlib.compress(call("tests.faults.poison.strike", [str(marker)]))},
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
        "success callback": {**good, "success_callback_name": "tests.faults.poison.strike"},
        "failure callback": {**good, "failure_callback_name": "tests.faults.poison.strike"},
        "stopped callback": {**good, "stopped_callback_name": "tests.faults.poison.strike"},
        "webhook": {**good, "webhooks": json.dumps([{"url": "http://127.0.0.1:9/", "job_status": "failed"}])},
        "retries": {**good, "retry_intervals": "[0]", "retries_left": "3"},
        "bad status": {**good, "data": zlib.compress(call("x")), "status": "\xff"},
        "bad time": {**good, "data": zlib.compress(call("x")), "created_at": "yesterday"},
        "bad timeout": {**good, "data": zlib.compress(call("x")), "timeout": "a while"},
        "bad JSON": {**good, "data": zlib.compress(b'["millstream.job.complete", null, ["00ff"')},
        "JSON of another kind": {**good, "data": zlib.compress(b'"millstream.job.complete"')},
        "plain JSON that asks for more": {**good, "data": call("subprocess.call", [["touch", str(marker)]])},
    }


@pytest.mark.experiment(22)
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
    odd_specs = {
        "missing": None, "huge": b'{"model":"m","messages":[{"role":"user","content":"' + b"x" * 5_000_000 + b'"}]}',
        "malformed": b'{"model":', "nested": b"[" * 100_000, "not UTF-8": b'{"model":"\xff"}', "empty": b"",
        "another version": b'{"model":"m","messages":[{"role":"user","content":"x"}],"v":2}',
        "a wrong type": b'{"model":"m","messages":"x"}', "no messages": b'{"model":"m","messages":[]}',
    }  # fmt: skip
    refusals = {}
    for name, body in odd_specs.items():
        refusals[name] = world.submit(f"its spec is {name}")
        key = world.keys.spec(refusals[name])
        if body is None:
            world.redis.delete(key)
        else:
            world.redis.set(key, body, keepttl=True)
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
    for job_id in (specless, *refusals.values()):
        refused = world.outcome(job_id).error
        assert refused is not None
        assert refused["code"] == "invalid_spec"
    asked = {each.request.prompt for each in world.upstream.journal}
    assert asked == {prompt for _, prompt in jobs} | {"behind all of them"}
    TALLY.trials += len(put_aside) + len(refusals) + 3
    say(f"{len(put_aside)} poisoned entries, {len(refusals) + 2} broken jobs: {len(jobs) + 1} good ones finished")
    world.redis.delete("rq:job:wrong-type", world.keys.state(broken), world.keys.spec(broken))
    world.redis.zrem(world.keys.open, broken)


@pytest.mark.experiment(22)
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


@pytest.mark.experiment(22)
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
