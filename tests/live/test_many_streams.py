"""Hundreds of streams in one worker process, with the upstream in a process of its own: all at once, each whole."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rq import Queue, Worker
from rq.command import send_stop_job_command
from rq.job import Job
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from local import guard
from millstream.events import Cancelled, Chunk, Started
from tests.oracle import check_log
from tests.upstream import expected_text, seed_of
from tests.upstream_process import Upstream, an_upstream
from tests.valkey import Valkey
from tests.worker_process import environment, memory_of, wait_until
from tests.world import World

STREAMS: Final = 500
MODEL: Final = "scripted:chunks=300,pace=0.3,until=looked-around"
"""1,667 chunks/s in all, little enough for two shared cores, and for as long as it takes to look around."""

STOPS_WITHIN: Final = 0.5
"""Seconds from RQ's stop command to the closed connection upstream."""

MEMORY: Final = 100 * 1024
"""Bytes a live stream may take of the worker, its share of all buffers and caches included: the budget."""


@contextmanager
def a_stock_worker(url: str, queue: Queue, log: Path) -> Iterator[None]:
    """RQ's own worker on another queue of the same server."""
    program = Path(sys.executable).with_name("rq")
    started = guard.spawn([str(program), "worker", queue.name, "--url", url], log=log, environ=environment({}))
    try:
        yield
    finally:
        started.terminate()
        assert started.wait(30) == 0


def times_of(jobs: list[Job]) -> list[float]:
    """How long RQ's own jobs took from enqueueing to their end, once all have ended (s)."""
    wait_until(lambda: all(job.get_status() == "finished" for job in jobs), "RQ's own jobs finish")
    for job in jobs:
        job.refresh()
    return [(job.ended_at - job.enqueued_at).total_seconds() for job in jobs if job.ended_at and job.enqueued_at]


def test_500_jobs_stream_at_once_in_one_process(
    valkey: Valkey, make_world: Callable[..., World], tmp_path: Path, say: Callable[[str], None]
) -> None:
    """All are open upstream together; RQ's tools show them; one is stopped, the others, and RQ's own jobs, finish."""
    prompts = [f"many {number}" for number in range(STREAMS)]
    with an_upstream() as upstream:
        world = make_world(
            valkey.url.removesuffix("0") + "2", OPENAI_BASE_URL=upstream.base_url, MILLSTREAM_STREAMS=str(STREAMS),
            MILLSTREAM_MODEL=MODEL,
        )  # fmt: skip
        world.redis.flushdb()
        stock = Queue("stock", connection=world.redis)
        with a_stock_worker(world.url, stock, tmp_path / "stock.log"):
            alone = times_of([stock.enqueue("operator.add", number, 1) for number in range(5)])
            worker = world.worker()
            world.check_text(world.submit("warm", model="scripted:chunks=5"), "warm", 5)
            before = memory_of(worker.pid)

            asked = time.monotonic()
            jobs = [job.id for job in world.client.submit_many([{"prompt": prompt} for prompt in prompts])]
            wait_until(lambda: upstream.open_streams() == STREAMS, "all are open upstream at the same time")
            say(f"{STREAMS} streams open after {time.monotonic() - asked:.2f} s")
            beside = [stock.enqueue("operator.add", number, 1) for number in range(5)]
            check_books(world, worker.pid)
            took = stop(world, upstream, jobs[7], prompts[7])
            grown = (memory_of(worker.pid) - before) / STREAMS
            among = times_of(beside)
            assert [job.return_value() for job in beside] == [1, 2, 3, 4, 5]
            assert upstream.open_streams() == STREAMS - 1, "all of this happened while the others streamed"
            upstream.open_gate("looked-around")

        wait_until(lambda: upstream.open_streams() == 0, "all have ended")
        sent = {each["prompt"]: each["chunks_sent"] for each in upstream.ask("journal")}
        for job_id, prompt in zip(jobs, prompts, strict=True):
            check_job(world, job_id, prompt, sent[prompt], stopped=job_id == jobs[7])
        assert upstream.ask("count") == {"total": STREAMS + 1, "open": 0, "max_open": STREAMS}
    world.check_left()
    say(f"RQ's stop command took {took * 1000:.0f} ms for one of {STREAMS} streams")
    say(f"{grown / 1024:.1f} KB of the worker for each stream")
    say(f"a job of RQ's own worker took {max(alone):.2f} s alone, {max(among):.2f} s beside them")
    assert took < STOPS_WITHIN
    assert grown < MEMORY


def check_books(world: World, pid: int) -> None:
    """What RQ shows of a worker with all slots taken: its registry, its executions, its state, its command line."""
    queue = Queue(world.keys.queue("interactive"), connection=world.redis, serializer=JSONSerializer)
    registry = StartedJobRegistry(queue=queue)
    wait_until(lambda: len(registry.get_job_ids(cleanup=False)) == STREAMS, "RQ's registry has them")
    [ours] = [each for each in Worker.all(connection=world.redis) if each.pid == pid]
    assert ours.get_state() == "busy"
    assert ours.current_execution_count == STREAMS
    assert {each.job_id for each in ours.get_current_executions()} == set(registry.get_job_ids(cleanup=False))
    said = rq_info(world)
    assert f"queue {queue.name} 0, {STREAMS} executing, " in said
    [line] = [line for line in said.splitlines() if line.startswith(f"worker {ours.name} ")]
    assert " busy " in line


def rq_info(world: World) -> str:
    program = str(Path(sys.executable).with_name("rq"))
    command = [program, "info", "--raw", "--url", world.url]
    done = subprocess.run(command, env=environment({}), check=True, capture_output=True, text=True, timeout=30)
    return done.stdout


def stop(world: World, upstream: Upstream, job_id: str, prompt: str) -> float:
    """Stop a job by RQ's command; the seconds until its connection upstream was closed."""
    queue = Queue(world.keys.queue("interactive"), connection=world.redis, serializer=JSONSerializer)
    running = StartedJobRegistry(queue=queue).get_job_ids(cleanup=False)
    [rq_id] = [each for each in running if each.startswith(f"{job_id}-")]
    asked = time.monotonic()  # the upstream's clock too: one for all processes of a machine
    send_stop_job_command(world.redis, rq_id, serializer=JSONSerializer)
    wait_until(lambda: upstream.exchange(prompt)["closed_at"], "its connection upstream is closed")
    assert world.status(job_id) == "cancelled"
    exchange = upstream.exchange(prompt)
    assert exchange["outcome"] == "client_closed"
    return float(exchange["closed_at"]) - asked


def check_job(world: World, job_id: str, prompt: str, sent: int, *, stopped: bool) -> None:
    """One attempt, one end, and every word of what was sent, or, stopped, of its beginning."""
    world.outcome(job_id)
    log = check_log(world.client, job_id)
    text = "".join(event.content for event in log if isinstance(event, Chunk))
    # Beside the text the role, and for a whole answer the finish reason and the usage.
    whole = expected_text(sent - (1 if stopped else 3), seed_of(prompt))
    assert [event.attempt for event in log if isinstance(event, Started)] == [1]
    assert isinstance(log[-1], Cancelled) == stopped
    assert whole.startswith(text) if stopped else text == whole
