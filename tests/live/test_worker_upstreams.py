"""What upstreams do instead of answering well, from their socket to the consumer's screen."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import pytest

from millstream import Result
from millstream.events import Chunk, Event, Retrying, Started
from tests.upstream import (
    Chunk as Part,
)
from tests.upstream import (
    Close,
    Comment,
    CutChunked,
    Done,
    Filler,
    Finish,
    Ping,
    Raw,
    Reset,
    Script,
    Stall,
    Status,
    Text,
    answer,
    azure,
    black_hole,
    error,
    error_event,
    expected_text,
    html,
    rate_limited,
    redirect,
    refused,
    tool_call,
)
from tests.world import World

RETRIES: Final = 2
ENVIRON: Final = {
    "MILLSTREAM_IDLE_TIMEOUT": "0.5",
    "MILLSTREAM_FIRST_TOKEN_TIMEOUT": "1",
    "MILLSTREAM_RETRIES": str(RETRIES),
}
GOOD: Final = answer(Text(20, seed=2))


def run(world: World, prompt: str, *scripts: Script, **asked: object) -> Result:
    """Run a job to its end against these answers, the last of which stays, and check its log."""
    world.upstream.on(*scripts, prompt=prompt)
    job_id = world.submit(prompt, **asked)
    result = world.outcome(job_id)
    world.check(job_id)
    return result


def events(world: World, result: Result) -> list[Event]:
    return list(world.client.follow(result.id))


def starts(world: World, result: Result) -> list[tuple[int, str | None]]:
    return [(each.attempt, each.reason) for each in events(world, result) if isinstance(each, Started)]


def requests(world: World, prompt: str) -> int:
    return len(world.upstream.requests_for(prompt))


SILENT: Final = {
    **{f"status {code}": error(code, type="server_error") for code in (408, 409, 500, 502, 503, 504, 529)},
    "429": rate_limited({"retry-after-ms": "50"}),
    "reset": Script(Reset()),
    "reset after the role": Script(Part("", role="assistant"), Reset()),
    "close": Script(Close()),
    "error event": Script(error_event()),
    "html": html(),
    "empty body": Script(Status(200, {"content-type": "text/event-stream"})),
    "silence": Script(Stall()),
    "silence but for comments": Script(Stall(comment_every=0.2)),
}


@pytest.mark.parametrize("first", SILENT)
def test_a_failure_before_the_first_content_is_retried_in_silence(shared: World, first: str) -> None:
    """The second request's answer is the job's only attempt: consumers see one start and no void text."""
    prompt = f"silent: {first}"
    result = run(shared, prompt, SILENT[first], GOOD)
    assert (result.status, result.text, result.attempts) == ("completed", expected_text(20, 2), 1)
    assert requests(shared, prompt) == 2
    assert starts(shared, result) == [(1, None)]


BREAKS: Final = {
    "reset": Script(Text(7, 0.01, seed=1), Reset()),
    "clean end": Script(Text(7, 0.01, seed=1)),
    "clean end, framed by the close": Script(Text(7, 0.01, seed=1), framing="close"),
    "cut between chunks": Script(Text(7, 0.01, seed=1), Close()),
    "cut inside a chunk": Script(Text(7, 0.01, seed=1), CutChunked()),
    "[DONE] alone": Script(Text(7, 0.01, seed=1), Done()),
    "finish reason empty": answer(Text(7, 0.01, seed=1), finish=""),
    "finish reason abort": answer(Text(7, 0.01, seed=1), finish="abort"),
    "error object": Script(Text(7, 0.01, seed=1), error_event()),
    "error event": Script(Text(7, 0.01, seed=1), error_event(named=True)),
    "error text": Script(Text(7, 0.01, seed=1), Raw(b'data: {"error":"overloaded"}\n\n')),
    "broken JSON": Script(Text(7, 0.01, seed=1), Raw(b"data: {\n\n"), Finish()),
    "stall": Script(Text(7, 0.01, seed=1), Stall()),
    "stall with comments": Script(Text(7, 0.01, seed=1), Stall(comment_every=0.1)),
}


@pytest.mark.parametrize("first", BREAKS)
def test_a_break_after_content_begins_a_new_attempt(shared: World, first: str) -> None:
    """What was shown is void and announced as such; the callback form restarts, and its text is whole."""
    prompt = f"breaks: {first}"
    shared.upstream.on(BREAKS[first], GOOD, prompt=prompt)
    job_id = shared.submit(prompt)
    shown: list[str] = []
    restarts: list[tuple[int, str | None]] = []

    def restart(attempt: int, reason: str | None) -> None:
        restarts.append((attempt, reason))
        shown.clear()

    text = shared.client.stream(job_id, shown.append, restart)
    assert text == "".join(shown) == expected_text(20, 2)
    assert restarts == [(2, "stream_broken")]
    shared.check(job_id)
    assert requests(shared, prompt) == 2
    assert shared.client.status(job_id).broken == 1


FINAL: Final = {
    "401": (error(401, "Incorrect API key provided.", error_code="invalid_api_key"), "invalid_api_key"),
    "400": (error(400, "No.", error_code="context_length_exceeded"), "context_length_exceeded"),
    "403": (error(403, "Country not supported."), "invalid_request_error"),
    "413": (Script(Status(413, {}, "too large")), "http_413"),
    "422": (error(422, "Unprocessable."), "invalid_request_error"),
    "429 for an empty account": (rate_limited(error_code="insufficient_quota"), "insufficient_quota"),
    "redirect": (redirect("http://127.0.0.1:9/elsewhere"), "redirect"),
    "final error inside a 200": (Script(error_event("No credit.", "insufficient_quota")), "insufficient_quota"),
    "a line without end": (Script(Filler(5_000_000)), "event_too_large"),
}


@pytest.mark.parametrize("kind", FINAL)
def test_what_never_passes_is_asked_once(shared: World, kind: str) -> None:
    """One request; the job fails with the upstream's own code and message."""
    prompt = f"final: {kind}"
    script, code = FINAL[kind]
    result = run(shared, prompt, script)
    assert result.status == "failed"
    assert result.error is not None
    assert (result.error["code"], bool(result.error["message"])) == (code, True)
    assert requests(shared, prompt) == 1
    if kind == "401":
        assert result.error == {"code": code, "message": "Incorrect API key provided.", "status": 401}


def test_an_unknown_model_fails_with_the_upstreams_words(shared: World) -> None:
    """404 `model_not_found`, its message kept for whoever reads the log."""
    job_id = shared.submit("who answers?", model="unknown")
    found = shared.outcome(job_id).error
    assert found == {"code": "model_not_found", "message": "The model `unknown` does not exist.", "status": 404}
    assert requests(shared, "who answers?") == 1


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (error(503, "Down."), "invalid_request_error"),
        (html(), "malformed_stream"),
        (Script(Reset()), "upstream_unreachable"),
    ],
    ids=["503", "html", "reset"],
)
def test_retries_end(shared: World, script: Script, code: str) -> None:
    """After the retries of the settings the job fails as the last failure said, without a further attempt."""
    prompt = f"never well: {code}"
    result = run(shared, prompt, script)
    assert result.status == "failed"
    assert result.error is not None
    assert result.error["code"] == code
    assert requests(shared, prompt) == 1 + RETRIES
    assert starts(shared, result) == [(1, None)]


@pytest.mark.parametrize(
    ("headers", "least"),
    [({"retry-after-ms": "400"}, 0.4), ({"retry-after": "1.2"}, 1.2)],
    ids=["milliseconds", "seconds"],
)
def test_the_wait_an_upstream_asks_for_is_kept(shared: World, headers: dict[str, str], least: float) -> None:
    """The next request comes no sooner; a wait over a second is announced, and voids nothing."""
    prompt = f"wait {least}"
    result = run(shared, prompt, rate_limited(headers), GOOD)
    first, second = shared.upstream.requests_for(prompt)
    assert first.ended_at is not None
    assert second.request.arrived_at - first.ended_at >= least
    told = [each.delay for each in events(shared, result) if isinstance(each, Retrying)]
    assert told == ([least] if least > 1 else [])
    assert result.text == expected_text(20, 2)


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_a_short_answer_is_incomplete_and_not_retried(shared: World, reason: str) -> None:
    """The upstream said itself that it stopped early: that is an answer, marked as what it is."""
    prompt = f"short: {reason}"
    result = run(shared, prompt, answer(Text(5, seed=1), finish=reason))
    assert (result.status, result.text) == ("incomplete", expected_text(5, 1))
    assert result.completion["choices"][0]["finish_reason"] == reason
    assert shared.client.result(result.id).status == "incomplete"
    assert requests(shared, prompt) == 1


def test_attempts_end(shared: World) -> None:
    """A stream that breaks every time ends the job after `max_attempts`, with a code that says so."""
    prompt = "breaks every time"
    result = run(shared, prompt, BREAKS["reset"], max_attempts=2)
    assert result.status == "failed"
    assert result.error is not None
    assert result.error["code"] == "attempts_exhausted"
    assert "stream_broken" in result.error["message"]
    assert starts(shared, result) == [(1, None), (2, "stream_broken")]
    assert requests(shared, prompt) == 2


def test_a_job_may_ask_to_fail_when_its_stream_breaks(shared: World) -> None:
    """`on_break="fail"`: no further attempt, and the text so far stays readable."""
    prompt = "rather fail"
    result = run(shared, prompt, BREAKS["reset"], on_break="fail")
    assert result.status == "failed"
    assert result.error is not None
    assert result.error["code"] == "stream_broken"
    assert result.text == expected_text(7, 1)
    assert requests(shared, prompt) == 1


def test_a_jobs_own_timeout_ends_it(shared: World) -> None:
    """An answer that goes on for ever fails when its time is over; there is no second try."""
    prompt = "for ever"
    began = time.monotonic()
    result = run(shared, prompt, answer(Text(None, 0.01, seed=1)), timeout=0.5)
    assert 0.5 <= time.monotonic() - began < 2.5
    assert result.status == "failed"
    assert result.error is not None
    assert result.error["code"] == "total_timeout"
    assert expected_text(500, 1).startswith(result.text)
    assert requests(shared, prompt) == 1


def test_choices_tools_reasoning_and_refusals_come_through(shared: World) -> None:
    """Everything a chunk can carry arrives, with its index, and amounts to the same chat.completion."""
    result = run(shared, "n=3", answer(Text(6, seed=1, choices=3), choices=3, usage=True), n=3)
    said = {each["index"]: each["message"]["content"] for each in result.completion["choices"]}
    assert said == {i: expected_text(6, 1 + i) for i in range(3)}
    tools = run(shared, "tools", answer(*tool_call("find", ['{"wh', 'at": 1}']), finish="tool_calls"))
    [choice] = tools.completion["choices"]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert call == {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"what": 1}'}}
    for name in ("reasoning", "reasoning_content"):
        thought = answer(Part(reasoning="First ", reasoning_field=name), Part(reasoning="think.", reasoning_field=name),
                         Text(4, seed=1))  # fmt: skip
        message = run(shared, f"thinks in {name}", thought).completion["choices"][0]["message"]
        assert (message["reasoning"], message["content"]) == ("First think.", expected_text(4, 1))
    refusal = run(shared, "refuses", answer(Part(refusal="I "), Part(refusal="will not.")))
    assert refusal.completion["choices"][0]["message"]["refusal"] == "I will not."


def test_reasoning_counts_as_content(shared: World) -> None:
    """A break after reasoning alone is no silent retry: it was shown."""
    prompt = "breaks in thought"
    result = run(shared, prompt, Script(Part(reasoning="Hm."), Part(reasoning=" Well."), Stall()), GOOD)
    assert starts(shared, result) == [(1, None), (2, "stream_broken")]
    assert "reasoning" not in result.completion["choices"][0]["message"]


DIALECTS: Final = {
    "azure": azure(Text(9, seed=1)),
    "CRLF": Script(Text(9, seed=1), Finish(), Done(), line_end="\r\n"),
    "CR": Script(Text(9, seed=1), Finish(), Done(), line_end="\r"),
    "no space": Script(Text(9, seed=1), Finish(), Done(), colon=":"),
    "BOM": Script(Raw(b"\xef\xbb\xbf"), *answer(Text(9, seed=1)).steps),
    "pings": answer(
        Ping(), Text(5, seed=1), Comment(), Ping(), Part("".join(expected_text(9, 1)[len(expected_text(5, 1)) :]))
    ),
    "no [DONE]": Script(Text(9, seed=1), Finish()),
    "until the close": Script(Text(9, seed=1), Finish(), framing="close"),
    "content-length": Script(Text(9, seed=1), Finish(), Done(), framing="content-length"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_says_the_same(shared: World, dialect: str) -> None:
    """Different ends of lines, ends of bodies and extras amount to the same text, completed."""
    result = run(shared, f"dialect: {dialect}", DIALECTS[dialect])
    assert (result.status, result.error, result.text) == ("completed", None, expected_text(9, 1))


def test_hundreds_of_merged_chunks_are_counted(shared: World) -> None:
    """A burst of 500 chunks in one packet merges into few events that still count every upstream chunk."""
    result = run(shared, "burst", answer(Text(500, seed=1)))
    chunks = [each for each in events(shared, result) if isinstance(each, Chunk)]
    assert sum(each.n for each in chunks) == 500
    assert len(chunks) < 500
    assert result.text == expected_text(500, 1)


def test_upstreams_that_cannot_be_reached(make_world: Callable[..., World], valkey_url: str) -> None:
    """Refused and swallowed connections fail the job as unreachable, within the connect timeout of each try."""
    for number, place in enumerate((refused, black_hole)):
        with place() as base_url:
            world = make_world(
                valkey_url, OPENAI_BASE_URL=base_url, MILLSTREAM_CONNECT_TIMEOUT="0.3", MILLSTREAM_RETRIES="1"
            )
            job_id = world.submit(f"nobody is there {number}")
            assert world.start("--burst").wait() == 0
            result = world.outcome(job_id)
            assert result.status == "failed"
            assert result.error is not None
            assert result.error["code"] == "upstream_unreachable"
            world.check(job_id)
            assert len(world.workers[0].said("upstream.retry")) == 1
