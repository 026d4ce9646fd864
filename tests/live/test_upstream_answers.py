"""What comes of an upstream's words: messages, parts, restarts, hostile text, and what prompts may be."""

from __future__ import annotations

import re
from typing import Any, Final

import pytest

from millstream.events import Chunk, Started
from tests.live.short_answers import GOOD, SHORT_CLOCKS, WHOLE
from tests.upstream import Chunk as Part
from tests.upstream import (
    Done,
    Finish,
    Reset,
    Script,
    ScriptedUpstream,
    Stall,
    Status,
    Text,
    WaitFor,
    answer,
    error,
    expected_text,
    html,
    redirect,
    tool_call,
)
from tests.world import KEY, World

ENVIRON: Final = SHORT_CLOCKS


def test_messages_are_the_upstreams_own_and_inert(shared: World) -> None:
    """What a failing upstream says is kept, on one line, without markup or anything that moves a cursor."""
    page = "<html><head><title>502</title><style>p{}</style></head><body><h1>Bad\x1b[31m Gateway</h1></body></html>"
    said = [
        (html(404, page), "http_404",
         "502 Bad [31m Gateway (is /chat/completions below its base URL? Most end in /v1)"),
        (error(400, "Zeile eins\n\u202ezwei \x1b]52;c;eHg=\x07", error_code="a\x1b[2Jb"), "a_2Jb",
         "Zeile eins zwei ]52;c;eHg="),
        (Script(Status(418, {}, {"detail": [{"msg": "field required"}]})), "http_418", '[{"msg": "field required"}]'),
        (Script(Status(400, {}, "")), "http_400", "the upstream answered 400"),
    ]  # fmt: skip
    for number, (script, code, message) in enumerate(said):
        prompt = f"message {number}"
        shared.upstream.on(script, prompt=prompt)
        job_id = shared.submit(prompt)
        found = shared.outcome(job_id).error
        shared.check(job_id)
        assert found is not None
        assert (found["code"], found["message"]) == (code, message)


def test_every_part_arrives_with_its_index(shared: World) -> None:
    """n = 3 taking turns, tools, refusals, reasoning under both names: the same chat.completion as from the API."""
    turns = answer(Text(6, seed=1, choices=3), choices=3, usage=True)
    shared.upstream.on(turns, prompt="three")
    job_id = shared.submit("three", n=3)
    result = shared.outcome(job_id)
    shared.check(job_id)
    said = {each["index"]: each["message"]["content"] for each in result.completion["choices"]}
    assert said == {i: expected_text(6, 1 + i) for i in range(3)}
    assert result.usage == {"prompt_tokens": 7, "completion_tokens": 18, "total_tokens": 25}
    cut = Script(Text(6, seed=1, choices=3), *[Finish(index=i) for i in range(2)], Done())
    shared.upstream.on(cut, turns, prompt="two of three")
    assert shared.outcome(shared.submit("two of three", n=3)).attempts in (1, 2)
    assert len(shared.upstream.requests_for("two of three")) == 2
    shared.upstream.on(answer(*tool_call("find", ['{"wh', 'at":1}']), finish="tool_calls"), prompt="tool")
    [choice] = shared.outcome(shared.submit("tool")).completion["choices"]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "find", "arguments": '{"what":1}'}
    for name in ("reasoning", "reasoning_content"):
        shared.upstream.on(answer(Part(reasoning="Hm.", reasoning_field=name), Part(refusal="No.")), prompt=name)
        [choice] = shared.outcome(shared.submit(name)).completion["choices"]
        assert (choice["message"]["reasoning"], choice["message"]["refusal"]) == ("Hm.", "No.")


def test_a_redirect_is_not_followed_and_leaks_nothing(shared: World) -> None:
    """Another server gets no request, so neither the prompt nor the key."""
    with ScriptedUpstream() as elsewhere:
        shared.upstream.on(redirect(f"{elsewhere.base_url}/chat/completions", 307), prompt="moved")
        result = shared.outcome(shared.submit("moved"))
        assert result.error is not None
        assert result.error["code"] == "redirect"
        assert len(elsewhere.journal) == 0


def test_prompts_of_every_size_arrive_or_are_refused(shared: World) -> None:
    """1 byte and 1 MB arrive byte for byte; what no worker could take is refused by submit, with nothing accepted."""
    for prompt in ("x", "é" * 500_000, "a\0b\x1b[31m\u202e🌾"):
        shared.upstream.on(GOOD, prompt=prompt)
        assert shared.outcome(shared.submit(prompt)).text == WHOLE
        [exchange] = shared.upstream.requests_for(prompt)
        assert exchange.request.json["messages"] == [{"role": "user", "content": prompt}]
    accepted = shared.redis.keys("*:spec")
    refused: list[dict[str, Any]] = [
        {"prompt": ""}, {"prompt": " \n"}, {"prompt": "x" * 64_000_000}, {"prompt": "\ud800"},
        {"messages": [{"role": "user", "content": "x"}] * 100_000}, {"messages": []},
        {"prompt": "x", "temperature": float("nan")}, {"prompt": "x", "base_url": "http://127.0.0.1:9"},
    ]  # fmt: skip
    for asked in refused:
        with pytest.raises(ValueError, match=r".") as caught:
            shared.client.submit(**asked)
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)
    assert set(shared.redis.keys("*:spec")) <= set(accepted)
    assert shared.redis.zcard(shared.keys.open) == 0


_TERMINAL: Final = "\x1b[2J\x1b]8;;http://evil\x07link\x1b]8;;\x07\x1b]52;c;eHg=\x07\x9b31m\u202e\u2066"
HOSTILE: Final = f"{_TERMINAL}</script><img onerror=x>\r\n\ndata: x"


def test_hostile_text_is_kept_as_it_is_and_stays_out_of_the_logs(shared: World) -> None:
    """An answer is data: it arrives unchanged, and no log line, which a person reads in a terminal, has any of it."""
    shared.upstream.on(answer(Part(HOSTILE)), prompt="hostile")
    job_id = shared.submit("hostile")
    assert shared.outcome(job_id).text == HOSTILE
    shared.check(job_id)
    shared.upstream.on(error(400, HOSTILE, error_code=HOSTILE[:50]), prompt="hostile error")
    shared.outcome(shared.submit("hostile error"))
    for worker in shared.workers:
        text = worker.log.read_bytes().decode()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
        assert "onerror" not in text
        assert KEY not in text


def test_a_break_after_content_begins_the_text_anew(shared: World) -> None:
    """What was shown is void and announced as such: the callback form restarts, and its text is whole."""
    shared.upstream.on(Script(Text(7, seed=9), WaitFor("shown, anew"), Reset()), GOOD, prompt="begins anew")
    job_id = shared.submit("begins anew")
    shared.wait_until_shown(job_id)
    shared.upstream.open_gate("shown, anew")
    shown: list[str] = []
    restarts: list[tuple[int, str | None]] = []

    def restart(attempt: int, reason: str | None) -> None:
        restarts.append((attempt, reason))
        shown.clear()

    assert shared.client.stream(job_id, shown.append, restart) == "".join(shown) == WHOLE
    assert restarts == [(2, "stream_broken")]
    shared.check(job_id)
    assert shared.client.status(job_id).broken == 1


def test_a_job_may_ask_to_fail_when_its_stream_breaks(shared: World) -> None:
    """`on_break="fail"`: no further attempt, and the text so far stays readable."""
    shared.upstream.on(Script(Text(7, seed=1), WaitFor("shown, fails"), Reset()), prompt="rather fail")
    job_id = shared.submit("rather fail", on_break="fail")
    shared.wait_until_shown(job_id)
    shared.upstream.open_gate("shown, fails")
    result = shared.outcome(job_id)
    assert result.error is not None
    assert (result.status, result.error["code"], result.text) == ("failed", "stream_broken", expected_text(7, 1))
    assert len(shared.upstream.requests_for("rather fail")) == 1
    shared.check(job_id)


def test_reasoning_counts_as_content(shared: World) -> None:
    """A break after reasoning alone is no silent retry: it was shown."""
    shared.upstream.on(Script(Part(reasoning="Hm."), Stall()), GOOD, prompt="breaks in thought")
    job_id = shared.submit("breaks in thought")
    result = shared.outcome(job_id)
    assert [each.attempt for each in shared.check(job_id) if isinstance(each, Started)] == [1, 2]
    assert "reasoning" not in result.completion["choices"][0]["message"]


def test_an_unknown_model_fails_with_the_upstreams_words(shared: World) -> None:
    """404 `model_not_found`, its message and status kept for whoever reads the log."""
    job_id = shared.submit("who answers?", model="unknown")
    found = shared.outcome(job_id).error
    assert found == {"code": "model_not_found", "message": "The model `unknown` does not exist.", "status": 404}
    assert len(shared.upstream.requests_for("who answers?")) == 1
    shared.check(job_id)


def test_hundreds_of_merged_chunks_are_counted(shared: World) -> None:
    """A burst of 500 chunks in one packet merges into few events that still count every upstream chunk."""
    shared.upstream.on(answer(Text(500, seed=1)), prompt="burst")
    job_id = shared.submit("burst")
    assert shared.outcome(job_id).text == expected_text(500, 1)
    chunks = [each for each in shared.check(job_id) if isinstance(each, Chunk)]
    assert sum(each.n for each in chunks) == 500
    assert len(chunks) < 500
