"""Upstreams that are down for a while, break for good, or flood: what it costs, who helps out, and what goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from local.model import SLOTS
from local.parts import Model
from millstream.events import Chunk, Resumed, Retrying
from tests.upstream import (
    Filler,
    Raw,
    Script,
    ScriptedUpstream,
    Text,
    answer,
    black_hole,
    error,
    expected_text,
    refused,
)
from tests.valkey import Valkey
from tests.worker_process import WorkerProcess, wait_until
from tests.world import World, starts, table

N: Final = 12
WHOLE: Final = expected_text(N, 1)
GOOD: Final = answer(Text(N, seed=1))
OPEN: Final = 15.0
MEGABYTE: Final = 1024 * 1024


# Down ----------------------------------------------------------------------------------------------------------------


def test_an_outage_fails_no_job_and_is_probed_by_one(
    make_world: Callable[..., World], valkey: Valkey, say: Callable[[str], None]
) -> None:
    """The breaker opens, jobs wait in the queue and say for what, one request probes, and all of them end well."""
    world = make_world(valkey.url.removesuffix("0") + "3", MILLSTREAM_BREAKER="1")
    world.redis.flushdb()
    world.worker()
    prompts = [f"outage {number}" for number in range(40)]
    down = True
    world.upstream.on(lambda request: error(503, "Down.") if down else GOOD)
    jobs = [job.id for job in world.client.submit_many([{"prompt": prompt} for prompt in prompts])]

    def waits() -> list[dict[str, Any]]:
        found = [world.client.status(job_id) for job_id in jobs]
        return [each.wait for each in found if each.status == "queued" and each.wait is not None]

    wait_until(lambda: len(waits()) == len(jobs), "all jobs wait in the queue")
    assert {(wait["what"], wait["upstream"]) for wait in waits()} == {("upstream", "127.0.0.1")}
    before = world.upstream.journal.total
    assert before <= 1.5 * len(jobs)
    last = max(each.request.arrived_at for each in world.upstream.journal)
    down = False
    for job_id in jobs:
        assert world.outcome(job_id).text == WHOLE
        world.check(job_id)
        assert world.client.status(job_id).broken == 0
    after = sorted(each.request.arrived_at for each in world.upstream.journal)[before:]
    assert after[0] - last >= OPEN - 1
    assert len(after) == len(jobs)
    say(f"{len(jobs)} jobs in an outage: {before} requests until the breaker opened, then one each")


def test_another_upstream_takes_over(named: Callable[..., World]) -> None:
    """With a second one that serves the model nobody waits long, and a log says who was asked instead."""
    with ScriptedUpstream() as first, ScriptedUpstream() as second:
        first.on(error(500, "Down."))
        second.on(GOOD)
        world = named(table("first", first.base_url), table("second", second.base_url), MILLSTREAM_BREAKER="1")
        jobs = [job.id for job in world.client.submit_many([{"prompt": f"over {n}"} for n in range(40)])]
        logs = []
        for job_id in jobs:
            assert world.outcome(job_id).text == WHOLE
            logs.append(world.check(job_id))
        assert len(second.journal) == len(jobs)
        assert len(first.journal) <= 1.5 * len(jobs)
        moved = [each for log in logs for each in log if isinstance(each, Retrying) and each.delay == 0]
        assert moved
        assert all(each.error["code"] == "upstream_spared" for each in moved)
        job_id = world.submit("straight to the second")
        world.outcome(job_id)
        assert starts(world.check(job_id)) == [(1, "second", None)]
        assert not first.requests_for("straight to the second")


def test_upstreams_that_cannot_be_reached_say_so(named: Callable[..., World], say: Callable[[str], None]) -> None:
    """Refused, swallowed and unencrypted connections fail as unreachable; the kernel alone would try for minutes."""
    with refused() as nobody, black_hole() as silent, ScriptedUpstream() as plain:
        places = {"refused": nobody, "black-hole": silent, "no-tls": plain.base_url.replace("http:", "https:")}
        world = named(
            *(table(name, base_url, f'models = ["{name}"]') for name, base_url in places.items()),
            MILLSTREAM_CONNECT_TIMEOUT="0.4", MILLSTREAM_RETRIES="1",
        )  # fmt: skip
        jobs = {name: world.submit(f"reach {name}", model=name) for name in places}
        for name, job_id in jobs.items():
            result = world.outcome(job_id)
            assert result.error is not None
            assert (name, result.error["code"]) == (name, "upstream_unreachable")
            world.check(job_id)
    say(f"{len(places)} ways not to be reached")


def test_a_worker_that_stood_still_blames_nobody(named: Callable[..., World]) -> None:
    """Stopped for twice its idle time it finds the bytes that waited, and goes on in the same attempt."""
    with ScriptedUpstream() as upstream:
        world = named(table("steady", upstream.base_url), MILLSTREAM_IDLE_TIMEOUT="1", MILLSTREAM_LEASE="4")
        [worker] = world.workers
        upstream.on(answer(Text(None, 0.02, seed=1, until="stood still")))
        jobs = [world.submit(f"steady {number}") for number in range(10)]
        for job_id in jobs:
            world.wait_for_seq(job_id, 5)
        for _ in range(2):
            worker.freeze()
            time.sleep(2)  # twice what the upstream is allowed
            worker.thaw()
            seq = world.seq(jobs[0])
            world.wait_for_seq(jobs[0], seq + 5)
        upstream.open_gate("stood still")
        for number, job_id in enumerate(jobs):
            result = world.outcome(job_id)
            [exchange] = upstream.requests_for(f"steady {number}")
            wait_until(lambda: exchange.outcome == "finished", "all is counted")  # noqa: B023 - asked before it changes
            whole = expected_text(exchange.chunks_sent - 2, 1)  # beside the role and the finish reason
            assert (result.status, result.text, result.attempts) == ("completed", whole, 1)
            world.check(job_id)


# Floods --------------------------------------------------------------------------------------------------------------


def peak(worker: WorkerProcess) -> int:
    """Bytes: the most memory the process has had (Linux)."""
    status = Path(f"/proc/{worker.pid}/status")
    if not status.exists():
        pytest.skip("needs /proc to see a process's memory")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024


def test_a_flood_takes_little_memory(named: Callable[..., World], say: Callable[[str], None]) -> None:
    """A line and an event of 150 MB, a gzip bomb and streams without end: under 64 MB more, and the worker lives on."""
    lines = [Raw(b"data: " + b"a" * 65_000 + b"\n")] * 2300
    tiny = [Raw(b"data:\n" * 10_000)] * 100
    floods = {
        "line": (Script(Filler(150_000_000)), "event_too_large"),
        "endless line": (Script(Filler(None)), "event_too_large"),
        "event": (Script(*lines), "event_too_large"),
        "tiny lines": (Script(*tiny), "event_too_large"),
        "bomb": (Script(Filler(150_000_000), gzip=True), "malformed_stream"),
        "endless answer": (answer(Text(None)), "total_timeout"),
        "error page": (Script(Filler(150_000_000), framing="close"), "event_too_large"),
    }
    with ScriptedUpstream() as upstream:
        world = named(table("flood", upstream.base_url), MILLSTREAM_RETRIES="0")
        [worker] = world.workers
        world.outcome(world.submit("warm"))
        before = peak(worker)
        for name, (script, code) in floods.items():
            upstream.on(script, prompt=name)
            result = world.outcome(world.submit(name, timeout=2 if code == "total_timeout" else 60))
            assert result.error is not None
            assert (name, result.error["code"]) == (name, code)
            grown = (peak(worker) - before) / MEGABYTE
            assert grown < 64, f"{name}: {grown:.0f} MB"
        assert world.outcome(world.submit("well")).status == "completed"
    say(f"{len(floods)} floods: {grown:.0f} MB more memory")


# The real model ------------------------------------------------------------------------------------------------------

LIST: Final = "List five things a baker does before sunrise."  # which the model ends by itself, after 45 tokens


def test_a_model_killed_in_mid_answer_costs_no_job(
    named: Callable[..., World], tmp_path: Path, say: Callable[[str], None]
) -> None:
    """kill -9 of llama.cpp under four answers, and its return: all end whole, two of them in the same attempt."""
    model = Model(tmp_path / "model.log")
    model.start()
    try:
        world = named(
            table("llama.cpp", model.url, 'continue_with = "llama.cpp"'), MILLSTREAM_BREAKER="1",
            MILLSTREAM_FIRST_TOKEN_TIMEOUT="60", MILLSTREAM_IDLE_TIMEOUT="30",
        )  # fmt: skip
        kinds = ["continue", "continue", "restart", "restart"]
        jobs = [
            world.submit(LIST, model="smollm2-135m", on_break=kind, temperature=0, max_tokens=1200) for kind in kinds
        ]
        for job_id in jobs:
            world.wait_until_shown(job_id)
        assert model._child is not None
        model._child.kill()
        model._child.wait()
        assert {world.status(job_id) for job_id in jobs} <= {"in_progress", "queued"}
        model.start()
        for job_id, kind in zip(jobs, kinds, strict=True):
            result = world.outcome(job_id, 90)
            assert (result.status, result.error) == ("completed", None)
            assert result.completion["choices"][0]["finish_reason"] == "stop"
            log = world.check(job_id)
            seams = sum(isinstance(each, Resumed) for each in log)
            if kind == "continue":
                assert (seams, result.attempts) == (1, 1)
            else:  # the breaker may have sent it to the queue, which is a further attempt
                assert (seams, result.attempts > 1) == (0, True)
            assert len(result.text.splitlines()) >= 5
    finally:
        model.stop()
    say(f"the real model killed under {len(jobs)} answers: all whole, {kinds.count('continue')} went on")


def test_a_model_whose_slots_are_full_answers_late_and_all(
    named: Callable[..., World], tmp_path: Path, say: Callable[[str], None]
) -> None:
    """Three times as many jobs as llama.cpp has slots: it is asked once for each, the last begin late, all end."""
    model = Model(tmp_path / "model.log")
    model.start()
    try:
        world = named(table("llama.cpp", model.url), MILLSTREAM_FIRST_TOKEN_TIMEOUT="60", MILLSTREAM_IDLE_TIMEOUT="30")
        [worker] = world.workers
        asked = [world.submit(LIST, model="smollm2-135m", temperature=0, max_tokens=64) for _ in range(3 * SLOTS)]
        late = []
        for job_id in asked:
            result = world.outcome(job_id, 90)
            assert (result.status in ("completed", "incomplete"), result.attempts) == (True, 1)
            log = list(world.client.follow(job_id))
            world.check(job_id)
            first = next(each for each in log if isinstance(each, Chunk))
            late.append(first.at - log[0].at)
        assert not worker.said("upstream.retry")
        assert max(late) > 3 * min(late)
    finally:
        model.stop()
    say(f"{len(asked)} answers of {SLOTS} slots: first content after {min(late):.2f} to {max(late):.2f} s")
