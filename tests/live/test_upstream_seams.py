"""Answers that break off and go on from their text: where the seam is, who goes on, and what it costs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from millstream import Result
from millstream.events import Chunk, Resumed
from tests.upstream import (
    Chunk as Part,
)
from tests.upstream import (
    Done,
    Event,
    Finish,
    Pause,
    Raw,
    Request,
    Reset,
    Script,
    ScriptedUpstream,
    Stall,
    Text,
    Usage,
    WaitFor,
    answer,
    error,
    expected_text,
    html,
    redirect,
)
from tests.worker_process import wait_until
from tests.world import World, starts, table

N: Final = 12
WHOLE: Final = expected_text(N, 1)
GOOD: Final = answer(Text(N, seed=1))
OPEN: Final = 15.0
MEGABYTE: Final = 1024 * 1024


def cut(gate: str, *fault: Any) -> Script:
    """Seven chunks, and the fault once the gate is open."""
    return Script(Part("", role="assistant"), Text(7, seed=1), WaitFor(gate), *fault)


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
        yield (
            named(*tables, MILLSTREAM_RETRIES="2", MILLSTREAM_IDLE_TIMEOUT="1", MILLSTREAM_FIRST_TOKEN_TIMEOUT="1.5"),
            upstream,
        )


def broken_off(world: World, upstream: ScriptedUpstream, prompt: str, gates: int = 1, **how: Any) -> Result:
    """What comes of the job whose nth attempt is cut at the gate `PROMPT, n`, each once some of it is shown."""
    job_id = world.submit(prompt, **{"on_break": "continue", **how})
    for attempt in range(1, gates + 1):
        world.wait_until_shown(job_id, attempt)
        upstream.open_gate(f"{prompt}, {attempt}")
    return world.outcome(job_id)


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
            upstream.on(cut(f"{prompt}, 1", fault), repeated, prompt=prompt)
            result = broken_off(world, upstream, prompt, model=dialect, max_tokens=100)
            assert (result.status, result.text, result.attempts) == ("completed", WHOLE, 1), prompt
            log = world.check(result.id)
            assert [each.type for each in log if not isinstance(each, Chunk)] == ["started", "resumed", "completed"]
            first, second = asked(upstream, prompt)
            *prompts, last = second.json["messages"]
            assert prompts == first.json["messages"]
            assert (last["role"], last["content"]) == ("assistant", expected_text(7, 1))
            assert second.json["max_tokens"] == 93
            assert result.usage is not None
            assert result.usage["estimated"] is True
            assert result.usage["completion_tokens"] >= 7 + (5 if repeated is ON else 1)
            assert world.client.status(result.id).broken == 0


def test_an_answer_may_break_again_and_wait_in_between(continuing: tuple[World, ScriptedUpstream]) -> None:
    """The continuation is retried like any request, and goes on from all of the text when it breaks, too."""
    world, upstream = continuing
    four, rest = expected_text(9, 1).removeprefix(expected_text(7, 1)), WHOLE.removeprefix(expected_text(9, 1))
    cut_again = Script(Part(four), Reset())
    upstream.on(cut("twice, 1", Reset()), error(503), cut_again, error(502), answer(Part(rest)), prompt="twice")
    result = broken_off(world, upstream, "twice", model="vllm")
    assert (result.status, result.text, result.attempts) == ("completed", WHOLE, 1)
    assert sum(isinstance(each, Resumed) for each in world.check(result.id)) == 2
    requests = asked(upstream, "twice")
    texts = [each.json["messages"][-1]["content"] for each in requests]
    assert texts == ["twice", *[expected_text(7, 1)] * 2, *[expected_text(9, 1)] * 2]


def test_a_text_is_whole_wherever_it_is_cut(
    continuing: tuple[World, ScriptedUpstream], say: Callable[[str], None], seed: int
) -> None:
    """Reset at once after random pieces, shown or not yet: never a piece twice, never one missing."""
    world, upstream = continuing
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
    thought = Script(Part(reasoning="Hm."), Text(7, seed=1), WaitFor("thought, 1"), Reset())
    good_two = answer(Text(N, seed=1), Text(N, seed=2, index=1), choices=2)
    cases: list[tuple[str, str, list[Script], dict[str, Any], int]] = [
        ("refused", "vllm", [cut("refused, 1", Reset()), error(400, "No prefill."), GOOD], {}, 3),
        ("refused twice", "vllm", [cut("refused twice, 1", Reset()), error(400, "No."),
                                   cut("refused twice, 2", Reset()), GOOD], {}, 4),
        ("other", "other", [cut("other, 1", Reset()), GOOD], {}, 2),
        ("restart", "vllm", [cut("restart, 1", Reset()), GOOD], {"on_break": "restart"}, 2),
        ("two", "vllm", [cut("two, 1", Reset()), good_two], {"n": 2}, 2),
        ("tools", "vllm", [cut("tools, 1", Reset()), GOOD], {"tools": tools}, 2),
        ("thought", "vllm", [thought, GOOD], {}, 2),
    ]  # fmt: skip
    for prompt, model, scripts, more, count in cases:
        upstream.on(*scripts, prompt=prompt)
        result = broken_off(world, upstream, prompt, 2 if prompt == "refused twice" else 1, model=model, **more)
        assert (result.status, result.text) == ("completed", WHOLE), prompt
        log = world.check(result.id)
        assert not any(isinstance(each, Resumed) for each in log)
        assert [reason for _, _, reason in starts(log)] == [None] + ["stream_broken"] * (result.attempts - 1)
        assert len(asked(upstream, prompt)) == count, prompt


def test_a_finish_reason_in_the_continuation_is_the_answers(continuing: tuple[World, ScriptedUpstream]) -> None:
    """An answer that was whole but for its end, and one that reaches its length."""
    world, upstream = continuing
    all_of_it = Script(Text(N, seed=1), WaitFor("only the end, 1"), Reset())
    upstream.on(all_of_it, Script(Finish()), prompt="only the end")
    upstream.on(cut("too long, 1", Reset()), answer(Part(REST), finish="length"), prompt="too long")
    for prompt, status in (("only the end", "completed"), ("too long", "incomplete")):
        result = broken_off(world, upstream, prompt, model="vllm")
        assert (result.status, result.text, result.attempts) == (status, WHOLE, 1)
        world.check(result.id)


def test_a_seam_is_where_the_text_ends(continuing: tuple[World, ScriptedUpstream]) -> None:
    """Whatever the break left half done is none of the text; whatever the upstream goes on with is, spaces and all."""
    world, upstream = continuing
    begun, half = Part("Once 🌾"), b'{"choices":[{"delta":{"content":"'
    ends: dict[str, tuple[Any, ...]] = {
        "half a character": (Raw(b"data: " + half + "é".encode()[:1]),),
        "half an emoji": (Part("\ud83c"),),
        "half a word": (Raw(b"data: " + half + b"upo"),),
        "half a chunk": (Raw(b"data: {"),),
    }
    for name, end in ends.items():
        for rest in (" upon", "\n\n a", "upon", "🌾", "e\u0301", "Once 🌾"):
            prompt = f"{name} {rest!r}"
            upstream.on(Script(begun, WaitFor(prompt), *end, Pause(0.01), Reset()), answer(Part(rest)), prompt=prompt)
            job_id = world.submit(prompt, model="vllm", on_break="continue")
            world.wait_for_seq(job_id, 2)
            upstream.open_gate(prompt)
            result = world.outcome(job_id)
            assert (result.status, result.text, result.attempts) == ("completed", f"Once 🌾{rest}", 1), prompt
            world.check(job_id)
            assert asked(upstream, prompt)[1].json["messages"][-1]["content"] == "Once 🌾"


def test_an_upstream_that_repeats_a_part_only_is_believed(continuing: tuple[World, ScriptedUpstream]) -> None:
    """Mistral's repetition is taken off where all of it comes; what only begins like one is the model's own text."""
    world, upstream = continuing
    shown = expected_text(7, 1)
    for number, (pieces, text) in enumerate([
        ([shown, "!"], shown + "!"), ([shown[:5], shown[5:] + "!"], shown + "!"), ([*shown, "!"], shown + "!"),
        ([shown[:5], "!"], f"{shown}{shown[:5]}!"), ([shown[:5]], shown + shown[:5]), (["", "!"], shown + "!"),
    ]):  # fmt: skip
        prompt = f"repeats {number}"
        upstream.on(cut(f"{prompt}, 1", Reset()), answer(*map(Part, pieces)), prompt=prompt)
        result = broken_off(world, upstream, prompt, model="mistral")
        assert (result.status, result.text, result.attempts) == ("completed", text, 1), prompt
        world.check(result.id)


def test_an_upstream_that_will_not_go_on_begins_anew(continuing: tuple[World, ScriptedUpstream]) -> None:
    """Refusals of every kind, pages, silence, thoughts at the seam that break again: a further attempt is whole."""
    world, upstream = continuing
    refusals: dict[str, list[Script]] = {
        **{f"status {code}": [error(code, "No.")] for code in (400, 404, 413, 422, 501)},
        "a page": [html()], "silence": [Script(Stall())], "an error": [Script(Event({"error": {"code": 400}}))],
        "nothing": [Script(Done())], "redirect": [redirect("http://127.0.0.1:9/")],
        "a thought": [Script(Part(reasoning="Hm."), Pause(0.1), Reset())],
    }  # fmt: skip
    for name, scripts in refusals.items():
        again = scripts * 3 if name in ("status 501", "a page", "silence", "nothing") else scripts
        upstream.on(cut(f"{name}, 1", Reset()), *again, GOOD, prompt=name)
        result = broken_off(world, upstream, name, model="vllm")
        assert (result.status, result.text, result.attempts) == ("completed", WHOLE, 2), name
        assert len(asked(upstream, name)) == 2 + len(again), name
        world.check(result.id)


def test_a_seam_wins_no_time(continuing: tuple[World, ScriptedUpstream]) -> None:
    """A job's timeout is for the answer, however many requests it takes."""
    world, upstream = continuing
    slow = Script(*[step for _ in range(20) for step in (Part("a"), Pause(0.1))], Reset())
    upstream.on(slow, answer(Text(None, 0.1)), prompt="slow and broken")
    result = world.outcome(world.submit("slow and broken", model="vllm", on_break="continue", timeout=4))
    assert result.error is not None
    assert (result.status, result.error["code"], result.attempts) == ("failed", "total_timeout", 1)
    _, second = upstream.requests_for("slow and broken")
    wait_until(lambda: second.ended_at, "it is let go")
    assert second.ended_at is not None
    assert second.ended_at - second.request.arrived_at < 4, "it had what the first one, of two seconds, had left"


def test_a_hundred_answers_go_on_at_once(continuing: tuple[World, ScriptedUpstream]) -> None:
    """The upstream restarts under all of them: each goes on once it is back, and none is asked for twice over."""
    world, upstream = continuing
    prompts = [f"a crowd {number}" for number in range(100)]
    for prompt in prompts:
        upstream.on(Script(Text(7, seed=1), WaitFor("crowd"), Reset()), error(503), answer(Part(REST)), prompt=prompt)
    asks = [{"prompt": prompt, "model": "vllm", "on_break": "continue"} for prompt in prompts]
    jobs = world.client.submit_many(asks)
    for job in jobs:
        world.wait_for_seq(job.id, 2)
    upstream.open_gate("crowd")
    for job, prompt in zip(jobs, prompts, strict=True):
        result = world.outcome(job.id)
        assert (result.status, result.text, result.attempts) == ("completed", WHOLE, 1), prompt
        assert len(asked(upstream, prompt)) == 3
        world.check(job.id)
