"""From submit to the last event, through a real worker: whoever follows, and whenever, sees the same."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from millstream.events import Chunk, Event, decode
from tests.contract.consumers import Consumer, join_all
from tests.upstream import Text, WaitFor, answer, expected_text, seed_of
from tests.worker_process import wait_until
from tests.world import World, timeless


def test_every_consumer_sees_every_event(shared: World) -> None:
    """Consumers that come before the job runs, while it streams and after its end see the log, and the whole text."""
    prompt = "early, late and after"
    shared.upstream.on(answer(Text(30, seed=5), WaitFor("late"), Text(30, 0.002, seed=6)), prompt=prompt)
    job_id = shared.submit(prompt)
    early = [Consumer(shared.make_client, [job_id]) for _ in range(3)]
    shared.held("late")
    late = [Consumer(shared.make_client, [job_id]) for _ in range(3)]
    for each in [*early, *late]:
        each.wait_for(shared.seq(job_id))
    shared.upstream.open_gate("late")
    seen = [each[job_id] for each in join_all([*early, *late])]
    after = list(shared.client.follow(job_id))
    shared.check(job_id, [*seen, after])
    assert shared.last_text(job_id) == expected_text(30, 5) + expected_text(30, 6)


def test_following_after_any_event_gives_exactly_the_rest(shared: World) -> None:
    """`after=N` skips the first N events, for every N from none to all, also while the job runs."""
    prompt = "after any event"
    shared.upstream.on(answer(Text(12, 0.005, seed=1), WaitFor("rest"), Text(4, seed=2)), prompt=prompt)
    job_id = shared.submit(prompt)
    shared.held("rest")
    so_far = shared.seq(job_id)
    consumers = [Consumer(shared.make_client, [job_id], after=n) for n in range(so_far + 1)]
    shared.upstream.open_gate("rest")
    lists = [timeless(each[job_id]) for each in join_all(consumers)]
    log = shared.check(job_id)
    assert lists == [log[n:] for n in range(so_far + 1)]
    for n in range(len(log) + 1):
        assert timeless(shared.client.follow(job_id, after=n)) == log[n:]


def test_a_hundred_jobs_run_at_once(shared: World) -> None:
    """100 jobs are all open upstream at the same time, and each one's text is its own."""
    prompts = [f"one of a hundred: {number}" for number in range(100)]
    for prompt in prompts:
        shared.upstream.on(answer(Text(10, seed=seed_of(prompt)), WaitFor("hundred"), Text(10, seed=1)), prompt=prompt)
    jobs = shared.client.submit_many([{"prompt": prompt} for prompt in prompts])
    everyone = Consumer(shared.make_client, [job.id for job in jobs])
    shared.held("hundred", 100)
    shared.upstream.open_gate("hundred")
    seen = everyone.join()
    for job, prompt in zip(jobs, prompts, strict=True):
        shared.check(job.id, [seen[job.id]])
        assert shared.last_text(job.id) == expected_text(10, seed_of(prompt)) + expected_text(10, 1)


def test_a_long_job_reaches_consumers_that_reconnect(shared: World) -> None:
    """1,000 chunks to consumers early, late and reconnecting at every 50th event: all lists equal the log."""
    prompt = "a thousand chunks"
    shared.upstream.on(answer(Text(500, 0.001, seed=1), WaitFor("half"), Text(500, 0.001, seed=2)), prompt=prompt)
    job_id = shared.submit(prompt, retention=600)
    early = Consumer(shared.make_client, [job_id])
    hopper = Hopper(shared, job_id, every=50)
    shared.held("half")
    late = Consumer(shared.make_client, [job_id])
    shared.upstream.open_gate("half")
    hopped = hopper.run()
    log = shared.check(job_id, [early.join()[job_id], late.join()[job_id], hopped])
    assert hopper.connections == 1 + (len(log) - 1) // 50  # none after the last event
    assert sum(event.n for event in log if isinstance(event, Chunk)) == 1000
    assert shared.last_text(job_id) == expected_text(500, 1) + expected_text(500, 2)


class Hopper:
    """Follows with a new connection for every so many events."""

    def __init__(self, world: World, job_id: str, every: int) -> None:
        self._world, self._job_id, self._every = world, job_id, every
        self.connections = 0

    def run(self) -> list[Event]:
        seen: list[Event] = []
        while not seen or not seen[-1].terminal:
            self.connections += 1
            with self._world.make_client() as client:
                for event in client.follow(self._job_id, after=len(seen)):
                    seen.append(event)
                    if len(seen) % self._every == 0:
                        break
        return seen


def test_the_callback_form_returns_the_text_it_has_shown(shared: World) -> None:
    """`stream` calls back with every piece and returns the whole text; nothing is shown twice without a restart."""
    prompt = "called back"
    pieces: list[str] = []
    restarts: list[object] = []
    text = shared.client.stream(shared.submit(prompt), pieces.append, lambda *said: restarts.append(said))
    assert "".join(pieces) == text == expected_text(20, seed_of(prompt))
    assert restarts == []


def test_a_plain_subscriber_sees_the_events_of_the_log(shared: World) -> None:
    """What redis-py hears on the channel, without our library, is the log event by event."""
    prompt = "plain subscriber"
    shared.upstream.on(answer(WaitFor("plain"), Text(40, 0.001, seed=3)), prompt=prompt)
    job_id = shared.submit(prompt)
    with shared.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
        shared.held("plain")
        shared.wait_for_seq(job_id, 1)  # nothing more is said until the gate opens
        before = shared.seq(job_id)
        pubsub.subscribe(shared.keys.chunks(job_id))
        wait_until(lambda: shared.redis.pubsub_numsub(shared.keys.chunks(job_id))[0][1] == 1, "subscribed")
        shared.upstream.open_gate("plain")
        heard: list[Any] = []
        while not heard or not heard[-1].terminal:
            message = pubsub.get_message(timeout=5)
            if message is not None:
                assert json.loads(message["data"])["v"] == 1
                heard.append(decode(message["data"]))
    assert timeless(heard) == shared.check(job_id)[before:]


@pytest.mark.parametrize("program", ["redis-cli", "valkey-cli"])
def test_the_command_line_client_sees_the_events_too(shared: World, program: str) -> None:
    """`redis-cli SUBSCRIBE millstream:{JOB}:chunks` shows the same events, one JSON object each."""
    if shutil.which(program) is None:
        pytest.skip(f"no {program} on PATH")
    prompt = f"seen by {program}"
    shared.upstream.on(answer(WaitFor(program), Text(20, 0.005, seed=1)), prompt=prompt)
    job_id = shared.submit(prompt)
    shared.held(program)
    shared.wait_for_seq(job_id, 1)
    channel = shared.keys.chunks(job_id)
    with subprocess.Popen([program, "-u", shared.url, "SUBSCRIBE", channel], stdout=subprocess.PIPE, text=True) as cli:
        assert cli.stdout is not None
        try:
            wait_until(lambda: shared.redis.pubsub_numsub(channel)[0][1] == 1, "subscribed")
            shared.upstream.open_gate(program)
            heard: list[Any] = []
            while not heard or not heard[-1].terminal:
                line = cli.stdout.readline()
                heard += [decode(line)] if line.startswith('{"v"') else []
        finally:
            cli.kill()
    assert timeless(heard) == shared.check(job_id)[1:]


def test_the_running_usage_of_a_long_answer_is_kept(shared: World) -> None:
    """While a job streams, its state already counts what was written, marked as an estimate until it is measured."""
    prompt = "running usage"
    shared.upstream.on(answer(Text(60, 0.03, seed=1), WaitFor("usage"), usage=True), prompt=prompt)
    job_id = shared.submit(prompt)
    shared.held("usage")
    running = wait_until(lambda: shared.client.status(job_id).usage, "a running estimate")
    assert running["estimated"] is True
    assert 0 < running["completion_tokens"] <= 60
    shared.upstream.open_gate("usage")
    assert shared.outcome(job_id).usage == {"prompt_tokens": 7, "completion_tokens": 60, "total_tokens": 67}


@pytest.mark.parametrize("lane", ["interactive", "batch"])
def test_both_lanes_are_served(shared: World, lane: str) -> None:
    """A job of either lane runs on a worker that was told nothing."""
    prompt = f"lane {lane}"
    shared.check_text(shared.submit(prompt, lane=lane), prompt)
