"""Upstreams that are down for a while, break for good, or flood: what it costs, who helps out, and what goes on."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from local.parts import Model
from millstream.events import AnyEvent, Chunk, Resumed, Retrying, Started
from tests.upstream import (
    Chunk as Part,
)
from tests.upstream import (
    Filler,
    Finish,
    Raw,
    Request,
    Reset,
    Script,
    ScriptedUpstream,
    Stall,
    Text,
    Usage,
    answer,
    black_hole,
    error,
    expected_text,
    refused,
)
from tests.valkey import Valkey
from tests.worker_process import WorkerProcess, wait_until
from tests.world import World

N: Final = 12
WHOLE: Final = expected_text(N, 1)
GOOD: Final = answer(Text(N, seed=1))
OPEN: Final = 15.0
MEGABYTE: Final = 1024 * 1024


@pytest.fixture
def named(make_world: Callable[..., World], valkey: Valkey, tmp_path: Path) -> Callable[..., World]:
    """A world with one worker whose upstreams stand in a file, in a database of its own."""

    def make(*tables: str, **environ: str) -> World:
        path = tmp_path / "upstreams.toml"
        path.write_text("\n".join(tables))
        world = make_world(valkey.url.removesuffix("0") + "3", MILLSTREAM_UPSTREAMS=str(path), **environ)
        world.redis.flushdb()
        world.worker()
        return world

    return make


def table(name: str, base_url: str, more: str = "") -> str:
    return f'[upstreams."{name}"]\nbase_url = "{base_url}"\n{more}\n'


def starts(log: list[AnyEvent]) -> list[tuple[int, str, str | None]]:
    return [(each.attempt, each.upstream, each.reason) for each in log if isinstance(each, Started)]


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
    """Refused, swallowed and unencrypted connections fail as unreachable, each try within its connect timeout."""
    with refused() as nobody, black_hole() as silent, ScriptedUpstream() as plain:
        places = {"refused": nobody, "black-hole": silent, "no-tls": plain.base_url.replace("http:", "https:")}
        world = named(
            *(table(name, base_url, f'models = ["{name}"]') for name, base_url in places.items()),
            MILLSTREAM_CONNECT_TIMEOUT="0.4", MILLSTREAM_RETRIES="1",
        )  # fmt: skip
        jobs = {name: world.submit(f"reach {name}", model=name) for name in places}
        began = time.monotonic()
        for name, job_id in jobs.items():
            result = world.outcome(job_id)
            assert result.error is not None
            assert (name, result.error["code"]) == (name, "upstream_unreachable")
            world.check(job_id)
        assert time.monotonic() - began < 5
    say(f"{len(places)} ways not to be reached")


# Broken off ----------------------------------------------------------------------------------------------------------


def cut(*fault: Any) -> Script:
    return Script(Part("", role="assistant"), Text(7, 0.01, seed=1), *fault)


REST: Final = WHOLE.removeprefix(expected_text(7, 1))
ON: Final = answer(Part(REST), Usage(prompt_tokens=11, completion_tokens=5))


@pytest.fixture
def continuing(named: Callable[..., World]) -> Iterator[tuple[World, ScriptedUpstream]]:
    """An upstream under four names, each going on its own way, and one that cannot."""
    with ScriptedUpstream() as upstream:
        dialects = ("vllm", "llama.cpp", "deepseek", "mistral", "")
        tables = [
            table(each or "other", upstream.base_url, f'models = ["{each or "other"}"]\ncontinue_with = "{each}"')
            for each in dialects
        ]
        yield named(*tables, MILLSTREAM_RETRIES="2", MILLSTREAM_IDLE_TIMEOUT="0.6"), upstream


def asked(upstream: ScriptedUpstream, prompt: str) -> list[Request]:
    return [each.request for each in upstream.requests_for(prompt)]


def test_a_broken_answer_goes_on_from_its_text(continuing: tuple[World, ScriptedUpstream]) -> None:
    """One attempt, one seam, the text exactly once, for each dialect and each way to break."""
    world, upstream = continuing
    faults = {"reset": Reset(), "stall": Stall(), "error": Raw(b'data: {"error":"gone"}\n\n'), "end": Raw(b"")}
    for dialect in ("vllm", "llama.cpp", "deepseek", "mistral"):
        for name, fault in faults.items():
            prompt = f"{dialect} {name}"
            repeated = answer(Part(WHOLE[:9]), Part(WHOLE[9:])) if dialect == "mistral" else ON
            upstream.on(cut(fault), repeated, prompt=prompt)
            job_id = world.submit(prompt, model=dialect, on_break="continue", max_tokens=100)
            result = world.outcome(job_id)
            assert (result.status, result.text, result.attempts) == ("completed", WHOLE, 1), prompt
            log = world.check(job_id)
            assert [each.type for each in log if not isinstance(each, Chunk)] == ["started", "resumed", "completed"]
            first, second = asked(upstream, prompt)
            *prompts, last = second.json["messages"]
            assert prompts == first.json["messages"]
            assert (last["role"], last["content"]) == ("assistant", expected_text(7, 1))
            assert second.json["max_tokens"] == 93
            assert result.usage is not None
            assert result.usage["estimated"] is True
            assert result.usage["completion_tokens"] >= 7 + (5 if repeated is ON else 1)
            assert world.client.status(job_id).broken == 0


def test_an_answer_may_break_again_and_wait_in_between(continuing: tuple[World, ScriptedUpstream]) -> None:
    """The continuation is retried like any request, and goes on from all of the text when it breaks, too."""
    world, upstream = continuing
    four, rest = expected_text(9, 1).removeprefix(expected_text(7, 1)), WHOLE.removeprefix(expected_text(9, 1))
    upstream.on(cut(Reset()), error(503), Script(Part(four), Reset()), error(502), answer(Part(rest)), prompt="twice")
    job_id = world.submit("twice", model="vllm", on_break="continue")
    result = world.outcome(job_id)
    assert (result.status, result.text, result.attempts) == ("completed", WHOLE, 1)
    assert sum(isinstance(each, Resumed) for each in world.check(job_id)) == 2
    requests = asked(upstream, "twice")
    texts = [each.json["messages"][-1]["content"] for each in requests]
    assert texts == ["twice", *[expected_text(7, 1)] * 2, *[expected_text(9, 1)] * 2]


def test_a_text_is_whole_wherever_it_is_cut(
    continuing: tuple[World, ScriptedUpstream], say: Callable[[str], None]
) -> None:
    """Reset at once after random pieces, shown or not yet: never a piece twice, never one missing."""
    world, upstream = continuing
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    trials = 30

    def go_on(request: Request) -> Script:
        last = request.json["messages"][-1]
        rest = WHOLE.removeprefix(last["content"]) if last["role"] == "assistant" else WHOLE
        size = draw.randrange(0, max(1, len(rest) // 2)) if draw.random() < 0.7 else len(rest)
        pieces = [Part(rest[i : i + 3]) for i in range(0, size, 3)]
        return answer(*pieces) if size == len(rest) else Script(*pieces, Reset())

    prompts = [f"cut anywhere {number}" for number in range(trials)]
    for prompt in prompts:
        upstream.on(go_on, prompt=prompt)
    whole = 0
    asks = [{"prompt": prompt, "model": "vllm", "on_break": "continue", "max_attempts": 100} for prompt in prompts]
    for job in world.client.submit_many(asks):
        result = world.outcome(job.id)
        world.check(job.id)
        if result.status == "completed":
            assert result.text == WHOLE, f"seed {seed}"
            whole += 1
        else:  # every one of three requests broke before its first content
            assert WHOLE.startswith(result.text), f"seed {seed}"
    assert whole > trials / 2
    say(f"{trials} answers cut at random places, {upstream.journal.total} requests, seed {seed}")


def test_what_cannot_go_on_begins_anew(continuing: tuple[World, ScriptedUpstream]) -> None:
    """A refusal, an upstream that cannot, a job that does not ask for it, several choices, tools, reasoning."""
    world, upstream = continuing
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    thought = Script(Part(reasoning="Hm."), Text(7, 0.01, seed=1), Reset())
    good_two = answer(Text(N, seed=1), Text(N, seed=2, index=1), choices=2)
    cases: list[tuple[str, str, list[Script], dict[str, Any], int]] = [
        ("refused", "vllm", [cut(Reset()), error(400, "No prefill."), GOOD], {}, 3),
        ("refused twice", "vllm", [cut(Reset()), error(400, "No."), cut(Reset()), GOOD], {}, 4),
        ("other", "other", [cut(Reset()), GOOD], {}, 2),
        ("restart", "vllm", [cut(Reset()), GOOD], {"on_break": "restart"}, 2),
        ("two", "vllm", [cut(Reset()), good_two], {"n": 2}, 2),
        ("tools", "vllm", [cut(Reset()), GOOD], {"tools": tools}, 2),
        ("thought", "vllm", [thought, GOOD], {}, 2),
    ]
    for prompt, model, scripts, more, count in cases:
        upstream.on(*scripts, prompt=prompt)
        job_id = world.submit(prompt, model=model, **{"on_break": "continue", **more})
        result = world.outcome(job_id)
        assert (result.status, result.text) == ("completed", WHOLE), prompt
        log = world.check(job_id)
        assert not any(isinstance(each, Resumed) for each in log)
        assert [reason for _, _, reason in starts(log)] == [None] + ["stream_broken"] * (result.attempts - 1)
        assert len(asked(upstream, prompt)) == count, prompt


def test_a_finish_reason_in_the_continuation_is_the_answers(continuing: tuple[World, ScriptedUpstream]) -> None:
    """An answer that was whole but for its end, and one that reaches its length."""
    world, upstream = continuing
    upstream.on(Script(Text(N, 0.01, seed=1), Reset()), Script(Finish()), prompt="only the end")
    upstream.on(cut(Reset()), answer(Part(REST), finish="length"), prompt="too long")
    for prompt, status in (("only the end", "completed"), ("too long", "incomplete")):
        job_id = world.submit(prompt, model="vllm", on_break="continue")
        result = world.outcome(job_id)
        assert (result.status, result.text, result.attempts) == (status, WHOLE, 1)
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
            result = world.outcome(world.submit(name, timeout=4))
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
            world.wait_for_seq(job_id, 10)
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
