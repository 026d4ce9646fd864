"""Consumers that are killed or cut off while jobs stream: the others notice nothing, and nobody misses anything."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.contract.consumers import Consumer
from tests.upstream import Text, WaitFor, answer, expected_text
from tests.worker_process import environment
from tests.world import World


@pytest.mark.experiment(27)
def test_a_killed_consumer_disturbs_nobody(shared: World) -> None:
    """kill -9 of a process that follows: the job goes on, and another consumer sees all of it."""
    prompt = "killed consumer"
    shared.upstream.on(answer(Text(20, seed=1), WaitFor("killed consumer"), Text(20, seed=2)), prompt=prompt)
    job_id = shared.submit(prompt)
    code = (
        "import sys; from millstream import Client\n"
        "for event in Client.from_env().follow(sys.argv[1]): print(event.seq, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, job_id], env=environment(shared.environ), stdout=subprocess.PIPE
    ) as follower:
        other = Consumer(shared.make_client, [job_id])
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"1\n"
        follower.kill()
    shared.upstream.open_gate("killed consumer")
    shared.check(job_id, [other.join()[job_id]])
    assert shared.last_text(job_id) == expected_text(20, 1) + expected_text(20, 2)


@pytest.mark.experiment(27)
def test_killed_subscriptions_lose_nothing(shared: World, say: Callable[[str], None], seed: int) -> None:
    """CLIENT KILL TYPE pubsub at 120 random moments under live streams: every consumer ends with the whole log."""
    moments = random.Random(seed)
    prompts = [f"subscriptions, seed {seed}, {number}" for number in range(10)]
    for prompt in prompts:
        shared.upstream.on(answer(Text(None, 0.004, seed=3)), prompt=prompt)
    jobs = [job.id for job in shared.client.submit_many([{"prompt": prompt} for prompt in prompts])]
    consumers = [Consumer(shared.make_client, [job_id]) for job_id in jobs for _ in range(2)]
    trials = killed = 0
    while trials < 120 or killed < 120:
        time.sleep(moments.uniform(0.001, 0.03))
        killed += shared.redis.client_kill_filter(_type="pubsub")
        trials += 1
    for job_id in jobs:
        assert shared.client.cancel(job_id) == "cancelled"
    lists = [(job_id, events) for consumer in consumers for job_id, events in consumer.join().items()]
    for job_id, events in lists:
        shared.check(job_id, [events])
    say(f"CLIENT KILL TYPE pubsub at {trials} moments, {killed} subscriptions killed, seed {seed}: nothing lost")
