"""To RQ's own tools a worker is an RQ worker: seen, counted, stopped, suspended, and no nuisance to its neighbours."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from rq import Queue, Worker
from rq.command import send_kill_horse_command, send_shutdown_command, send_stop_job_command
from rq.job import Job
from rq.registry import FinishedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend

from millstream.delivery import queue_key
from millstream.events import Started
from tests.upstream import Reset, Script, Stall, Text, WaitFor, answer, expected_text
from tests.worker_process import environment, wait_until
from tests.world import SHORTEST, World

STOPS_WITHIN: Final = 0.5
"""Seconds from RQ's stop command to the closed connection upstream."""


def queue_of(world: World, lane: str = "interactive") -> Queue:
    return Queue(world.keys.queue(lane), connection=world.redis, serializer=JSONSerializer)


def rq_ids(world: World, job_ids: list[str]) -> dict[str, str]:
    """The RQ id of each job's one delivery that is running."""
    found = StartedJobRegistry(queue=queue_of(world)).get_job_ids(cleanup=False)
    return {job_id: rq_id for job_id in job_ids for rq_id in found if rq_id.startswith(f"{job_id}-")}


def rq(world: World, *arguments: str) -> str:
    """What RQ's own command line says."""
    done = subprocess.run(
        [Path(sys.executable).with_name("rq"), *arguments, "--url", world.url], env=environment({}), check=True,
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    return done.stdout


def stock_worker(world: World, queue: Queue) -> None:
    """RQ's own worker, in a process of its own, until the queue is empty."""
    rq(world, "worker", queue.name, "--burst", "--serializer", "json", "--quiet")


def test_rqs_command_line_shows_worker_and_counts(world: World) -> None:
    """`rq info` lists the worker as busy, its queues with what waits in them, and what runs."""
    world.upstream.on(answer(WaitFor("info"), Text(3)))
    worker = world.worker("--name", "seen-by-rq", "--streams", "2")
    jobs = [job.id for job in world.client.submit_many([{"prompt": f"counted {n}"} for n in range(5)])]
    world.held("info", 2)
    wait_until(lambda: len(rq_ids(world, jobs)) == 2, "RQ's books say so")
    said = rq(world, "info", "--raw")
    assert f"queue {world.keys.queue('interactive')} 3" in said
    [seen] = [line for line in said.splitlines() if line.startswith("worker seen-by-rq")]
    assert "busy" in seen
    assert world.keys.queue("batch") in seen
    [known] = Worker.all(connection=world.redis)
    assert (known.name, known.pid, known.get_state()) == ("seen-by-rq", worker.pid, "busy")
    assert known.current_execution_count == 2
    world.upstream.open_gate("info")
    for job_id in jobs:
        assert world.outcome(job_id).status == "completed"
    wait_until(lambda: worker_books(world) == ("idle", 5, 0), "RQ's books say so")
    assert len(FinishedJobRegistry(queue=queue_of(world)).get_job_ids()) == 5
    assert rq_ids(world, jobs) == {}


def worker_books(world: World) -> tuple[str, int, int]:
    """The one worker's state, and how many of its jobs went well and failed."""
    [known] = Worker.all(connection=world.redis)
    return str(known.get_state()), known.successful_job_count, known.failed_job_count


def test_rqs_stop_command_stops_one_of_fifty(world: World, say: Callable[[str], None]) -> None:
    """`send_stop_job_command` cancels one job in under 500 ms, its upstream connection included; 49 others finish."""
    prompts = [f"one of fifty {number}" for number in range(50)]
    world.upstream.on(answer(Text(3, seed=1), WaitFor("fifty"), Text(30, 0.01, seed=2)))
    world.upstream.on(answer(Text(3, seed=1), WaitFor("the one"), Stall()), prompt=prompts[7])
    world.worker()
    jobs = [job.id for job in world.client.submit_many([{"prompt": prompt} for prompt in prompts])]
    world.held("fifty", 49)
    world.held("the one")
    world.upstream.open_gate("fifty")
    wait_until(lambda: len(rq_ids(world, jobs)) == 50, "RQ's books say so")
    rq_id = rq_ids(world, jobs)[jobs[7]]
    asked = time.monotonic()
    send_stop_job_command(world.redis, rq_id, serializer=JSONSerializer)
    [exchange] = world.upstream.requests_for(prompts[7])
    world.upstream.journal.wait_for(lambda journal: exchange.closed_at is not None)
    assert exchange.closed_at is not None
    took = exchange.closed_at - asked
    assert world.outcome(jobs[7]).status == "cancelled"
    for job_id in jobs:
        if job_id != jobs[7]:
            assert world.outcome(job_id).text == expected_text(3, 1) + expected_text(30, 2)
        world.check(job_id)
    rq_job = Job.fetch(rq_id, connection=world.redis, serializer=JSONSerializer)
    wait_until(lambda: rq_job.get_status() == "stopped", "RQ's books say so")
    say(f"RQ's stop command took {took * 1000:.0f} ms for one of 50 jobs")
    assert took < STOPS_WITHIN


def test_a_stop_that_nobody_meant_is_ignored(world: World) -> None:
    """Commands about unknown jobs, kill-horse and rubbish on the worker's channel change nothing."""
    prompt = "not meant"
    world.upstream.on(answer(WaitFor("meant"), Text(20, seed=1)), prompt=prompt)
    worker = world.worker()
    job_id = world.submit(prompt)
    world.held("meant")
    send_kill_horse_command(world.redis, worker.name)
    channel = f"rq:pubsub:{worker.name}"
    for rubbish in (b"\xff", b"{", b"[]", b'{"command": "stop-job"}', b'{"command": "stop-job", "job_id": "x"}', b"1"):
        assert world.redis.publish(channel, rubbish) == 1
    world.upstream.open_gate("meant")
    assert world.outcome(job_id).text == expected_text(20, 1)
    send_shutdown_command(world.redis, worker.name)  # after all that it still listens
    assert worker.wait() == 0
    world.check(job_id)


def test_rqs_shutdown_command_drains(world: World) -> None:
    """`send_shutdown_command` is a warm shutdown: what runs ends first."""
    prompt = "asked to go"
    world.upstream.on(answer(Text(3, seed=1), WaitFor("go"), Text(3, seed=2)), prompt=prompt)
    worker = world.worker()
    job_id = world.submit(prompt)
    world.held("go")
    send_shutdown_command(world.redis, worker.name)
    worker.wait_for("worker.stopping")
    world.upstream.open_gate("go")
    assert worker.wait() == 0
    assert world.outcome(job_id).text == expected_text(3, 1) + expected_text(3, 2)


def test_suspending_rq_suspends_intake_alone(world: World) -> None:
    """`rq suspend`: what runs goes on, nothing new is taken; `rq resume`: it is."""
    prompt = "while suspended"
    world.upstream.on(answer(Text(3, seed=1), WaitFor("suspended"), Text(3, seed=2)), prompt=prompt)
    world.worker()
    running = world.submit(prompt)
    world.held("suspended")
    suspend(world.redis, ttl=60)
    # What the idle worker waits for when it is suspended may still be answered by this one, at most.
    waiting = [world.submit(f"suspended {number}") for number in range(3)]
    world.upstream.open_gate("suspended")
    assert world.outcome(running).text == expected_text(3, 1) + expected_text(3, 2)
    assert [world.status(job_id) for job_id in waiting] == ["queued"] * 3
    resume(world.redis)
    for number, job_id in enumerate(waiting):
        world.check_text(job_id, f"suspended {number}")


def test_burst_ends_when_all_is_done(world: World) -> None:
    """`--burst` runs what is there, in both lanes, waits for the last one's end, and goes with status 0."""
    prompts = {f"burst {lane} {n}": lane for lane in ("interactive", "batch") for n in range(5)}
    jobs = [world.submit(prompt, lane=lane, model="scripted:chunks=20,pace=0.02") for prompt, lane in prompts.items()]
    worker = world.start("--burst", "--streams", "3")
    assert worker.wait() == 0
    assert {world.status(job_id) for job_id in jobs} == {"completed"}
    assert Worker.all(connection=world.redis) == []
    for job_id, prompt in zip(jobs, prompts, strict=True):
        world.check_text(job_id, prompt)


def test_two_workers_share(world: World) -> None:
    """With two slots each, two workers run four of four jobs at once, and all 20 end."""
    world.upstream.on(answer(WaitFor("share"), Text(3)))
    workers = [world.start("--streams", "2"), world.start("--streams", "2")]
    for worker in workers:
        worker.ready()
    jobs = [job.id for job in world.client.submit_many([{"prompt": f"shared {n}"} for n in range(20)])]
    world.held("share", 4)
    assert world.redis.llen(queue_key(world.keys, "interactive")) == 16
    world.upstream.open_gate("share")
    for job_id in jobs:
        assert world.outcome(job_id).status == "completed"
        world.check(job_id)
    assert world.upstream.journal.max_open_streams <= 4
    shares = [len(worker.said("job.started")) for worker in workers]
    assert sum(shares) == 20
    assert min(shares) >= 2


def test_a_stock_worker_beside_ours_is_undisturbed(world: World) -> None:
    """RQ's own worker on its own queue of the same Redis runs its jobs while ours runs theirs."""
    world.worker()
    others = Queue("others", connection=world.redis, serializer=JSONSerializer)
    theirs = [others.enqueue("operator.add", number, 1) for number in range(10)]
    ours = [world.submit(f"beside {number}") for number in range(10)]
    stock_worker(world, others)
    assert [job.return_value() for job in theirs] == list(range(1, 11))
    for number, job_id in enumerate(ours):
        world.check_text(job_id, f"beside {number}")


def test_a_stock_worker_that_takes_ours_says_what_it_needs(make_world: Callable[..., World], valkey_url: str) -> None:
    """It fails naming the worker that is needed, and the job still completes when a sweep has brought it back."""
    world = make_world(valkey_url, MILLSTREAM_LEASE=f"{SHORTEST:g}")
    job_id = world.submit("taken by another")
    [rq_id] = [each.decode() for each in world.redis.lrange(queue_key(world.keys, "interactive"), 0, -1)]
    stock_worker(world, queue_of(world))
    result = Job.fetch(rq_id, connection=world.redis, serializer=JSONSerializer).latest_result()
    assert result is not None
    assert "needs a Millstream worker" in str(result.exc_string)
    assert world.status(job_id) == "queued"
    worker = world.worker()
    world.check_text(job_id, "taken by another")
    assert worker.said("sweep.delivered_again", because="vanished")
    world.check_left()


def test_what_depends_on_our_job_runs_after_it(world: World) -> None:
    """`depends_on` one of our deliveries: RQ enqueues the dependent when ours has ended, with its status for a result.

    A dependent of a job that failed does not run.
    """
    gate = "dependents"
    world.upstream.on(answer(WaitFor(gate), Text(3)))
    world.upstream.on(answer(WaitFor(gate), Text(3), finish="content_filter"), prompt="incomplete")
    jobs = {name: world.submit(name, model="unknown" if name == "failed" else "scripted")
            for name in ("completed", "incomplete", "failed")}  # fmt: skip
    ours = {
        rq_id.decode().rpartition("-")[0]: Job.fetch(rq_id.decode(), connection=world.redis, serializer=JSONSerializer)
        for rq_id in world.redis.lrange(queue_key(world.keys, "interactive"), 0, -1)
    }
    others = Queue("others", connection=world.redis, serializer=JSONSerializer)
    after = {name: others.enqueue("operator.add", 1, 1, depends_on=ours[job_id]) for name, job_id in jobs.items()}
    assert {job.get_status() for job in after.values()} == {"deferred"}
    world.worker()
    world.upstream.open_gate(gate)
    for name, job_id in jobs.items():
        assert world.outcome(job_id).status == name
        world.check(job_id)
    wait_until(lambda: others.count == 2, "RQ has enqueued the dependents")
    stock_worker(world, others)
    assert {name: job.get_status() for name, job in after.items()} == {
        "completed": "finished", "incomplete": "finished", "failed": "deferred"
    }  # fmt: skip
    assert [ours[jobs[name]].return_value() for name in ("completed", "incomplete")] == ["completed", "incomplete"]
    assert after["completed"].return_value() == 2
    world.redis.delete(
        after["failed"].key, f"rq:deferred:{others.name}", ours[jobs["failed"]].dependents_key,
        after["failed"].dependencies_key,
    )  # fmt: skip


def test_attempts_are_told_in_the_log_not_in_rq(world: World) -> None:
    """RQ's hash says finished or failed for people; how often a job was tried is the log's to say."""
    prompt = "tried twice"
    world.upstream.on(Script(Text(5, seed=1), WaitFor("shown"), Reset()), answer(Text(5, seed=2)), prompt=prompt)
    world.worker()
    job_id = world.submit(prompt)
    world.wait_until_shown(job_id)
    world.upstream.open_gate("shown")
    world.outcome(job_id)
    assert [event.attempt for event in world.client.follow(job_id) if isinstance(event, Started)] == [1, 2]
    world.check(job_id)
