"""What upstreams do to a real worker: dialects, faults, outages, floods. Every job's log passes the oracle.

Most faults are asked of one worker, in rows of a table; what must hold of a row stands beside it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from millstream.events import AnyEvent, Retrying, Started
from tests.upstream import (
    BOM,
    Close,
    Comment,
    CutChunked,
    Done,
    Event,
    Filler,
    Finish,
    Headers,
    Pause,
    Ping,
    Raw,
    Reset,
    Script,
    ScriptedUpstream,
    Split,
    Stall,
    Status,
    Text,
    WaitFor,
    answer,
    azure,
    error,
    error_event,
    expected_text,
    html,
    rate_limited,
    redirect,
    tool_call,
)
from tests.upstream import Chunk as Part
from tests.valkey import Valkey
from tests.world import KEY, World, a_world

N: Final = 12
WHOLE: Final = expected_text(N, 1)
GOOD: Final = answer(Text(N, seed=1))
ENVIRON: Final = {
    "MILLSTREAM_IDLE_TIMEOUT": "0.6", "MILLSTREAM_FIRST_TOKEN_TIMEOUT": "1.2", "MILLSTREAM_RETRIES": "2",
}  # fmt: skip


@pytest.fixture(scope="module")
def shared(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One worker for the tables below."""
    with a_world(valkey.url, tmp_path_factory.mktemp("shared"), **ENVIRON) as made:
        made.worker()
        yield made
        made.check_left()


@dataclass(frozen=True)
class Row:
    """Answers to the requests of one job, the last of which stays, and what comes of it."""

    name: str
    scripts: Sequence[Script]
    status: str = "completed"
    text: str | None = WHOLE
    code: str | None = None
    attempts: int = 1
    requests: int | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=lambda: {0: "stop"})


def whole(name: str, *scripts: Script, **more: Any) -> Row:
    return Row(name, scripts, requests=len(scripts), **more)


def silent(name: str, fault: Script) -> Row:
    """The fault comes before any content: one more request, the same attempt."""
    return whole(f"{name}, then well", fault, GOOD)


def broken(name: str, *fault: Any, **more: Any) -> Row:
    """The fault comes after seven chunks, which were shown: a new attempt, whose text is whole."""
    return whole(f"{name} after 7", Script(Text(7, 0.01, seed=9), *fault, **more), GOOD, attempts=2)


def final(name: str, script: Script, code: str, text: str = "") -> Row:
    return Row(name, [script], "failed", text, code, requests=1, reasons={})


OVERLOADED: Final = {"error": {"message": "Overloaded.", "type": "overloaded_error", "code": None}}

ROWS: Final = [
    # 3: what never passes
    *(final(f"{n}", error(n, "No.", error_code="nope"), "nope") for n in (400, 401, 403, 404, 413, 422, 405, 451)),
    *(final(code, rate_limited(error_code=code), code) for code in ("insufficient_quota", "billing_not_active")),
    final("quota inside a 200", Script(error_event("No credit.", "insufficient_quota")), "insufficient_quota"),
    final("400 inside a 200", Script(error_event("Too long.", 400)), "server_error"),
    # 4: what is worth another try
    *(silent(f"{n}", error(n, type="server_error")) for n in (408, 409, 425, 500, 502, 503, 504, 529)),
    Row("503 for ever", [error(503, "Down.", error_code="down")], "failed", "", "down", requests=3, reasons={}),
    # 5, 6: silence
    silent("no head", Script(Stall())),
    silent("a head and silence", Script(Headers(), Stall())),
    silent("a role and comments", Script(Part("", role="assistant"), Stall(comment_every=0.1))),
    whole("a late head", Script(Pause(0.7), *GOOD.steps)),
    broken("a stall", Stall()),
    broken("a stall with comments", Stall(comment_every=0.1)),
    broken("pings for ever", *[step for _ in range(30) for step in (Ping(), Pause(0.1))]),
    # 7: resets
    silent("a reset", Script(Reset())),
    silent("a reset after the head", Script(Headers(), Reset())),
    whole("a reset after 1", Script(Text(1, seed=9), WaitFor("seen 1"), Reset()), GOOD, attempts=2),
    broken("a reset", Reset()),
    # 8: ends that are none
    *(broken(f"a clean end, {framing}", framing=framing) for framing in ("chunked", "close", "content-length")),
    broken("a FIN", Close()),
    broken("a cut chunk", CutChunked()),
    broken("a cut event", Raw(b'data: {"choices":[{"index":0,"delta":{"con'), framing="close"),
    broken("a finish reason without its empty line", Raw(b'data: {"choices":[{"finish_reason":"stop"}]}\n')),
    # 9: words that do not mean the end
    broken("[DONE]", Done()),
    *(broken(f"finish {reason!r}", Finish(reason), Done()) for reason in (None, "", "abort", "error", "STOP")),
    Row("abort for ever", [Script(Text(3, 0.01, seed=1), Finish("abort"), Done())], "failed", expected_text(3, 1),
        "attempts_exhausted", attempts=2, requests=2, asked={"max_attempts": 2}, reasons={}),
    # 10: errors inside a 200
    silent("an error object", Script(error_event())),
    silent("event: error", Script(error_event(named=True))),
    silent("an error string", Script(Event({"error": "overloaded"}))),
    silent("a JSON body", Script(Status(body=OVERLOADED))),
    silent("a JSON body that is no error", Script(Status(body={"choices": []}))),
    silent("an HTML page", html()),
    silent("an HTML page as an event stream", Script(Headers(), Raw(b"<html><body>\n\n<h1>Sign in</h1></body>"))),
    silent("an empty body", Script(Status(200, {"content-type": "text/event-stream"}))),
    silent("no content type", Script(Status(200, {"content-type": ""}, "x"))),
    silent("204", Script(Status(204))),
    broken("an error object", error_event()),
    broken("an error after the finish reason", Finish(), error_event()),
    broken("event: error", error_event(named=True)),
    # 11: the grammar
    *(whole(f"line ends {end!r}", Script(*GOOD.steps, line_end=end)) for end in ("\n", "\r", "\r\n")),
    *(whole(f"packets of {n}, {end!r}", Script(BOM, Split(n), *GOOD.steps, line_end=end))
      for n in (1, 2, 3, 7) for end in ("\n", "\r\n", "\r")),
    whole("no space", Script(*GOOD.steps, colon=":")),
    whole("ids, retries, pings, comments",
          answer(Event(None, id="1", retry=3000), Ping(), Comment(), Text(5, seed=1), Comment(), Event(""), Event(None),
                 Ping(), Raw(b"data\n\n"), Part(WHOLE.removeprefix(expected_text(5, 1))), Event(None, retry=1))),
    whole("data in several lines",
          answer(Raw(b'data: {"choices": [{"index": 0,\ndata: "delta": {"content":\ndata:' +
                     json.dumps(WHOLE).encode() + b"}}]}\n\n"))),
    whole("named events", Script(*[Event({"choices": [{"index": 0, "delta": {"content": WHOLE}}]}, event="chunk")],
                                 Finish())),
    *(whole(f"framed by {framing}", Script(*GOOD.steps, framing=framing)) for framing in ("close", "content-length")),
    # 12: bytes and types
    broken("JSON of 100,000 levels", Raw(b"data: " + b"[" * 100_000 + b"\n\n")),
    *(broken(f"{raw}", Part(raw=raw)) for raw in (
        {"choices": "x"}, {"choices": [3]}, {"choices": [{"index": 0, "delta": {"content": 5}}]},
        {"choices": [{"index": 0, "delta": {"content": [{"type": "text"}]}}]}, {"choices": [{"index": 999}]},
        {"usage": "much"})),
    broken("half a JSON", Raw(b"data: {\n\n"), Finish()),
    whole("null everywhere", answer(Part(raw={"choices": None}), Part(raw={"choices": [{"index": 0, "delta": None}]}),
                                    Text(N, seed=1), Part(raw={"usage": None, "error": None}))),
    whole("bad UTF-8", answer(Raw(b'data: {"choices":[{"delta":{"content":"a\xffb"}}]}\n\n')), text="a\ufffdb"),
    whole("half a character", answer(Part("a\ud83c"), Part("b")), text="a\ufffdb"),
    whole("a character in two halves", answer(Part("a\ud83c"), Part("\udf3eb")), text="a🌾b"),
    whole("NUL and controls", answer(Part("\0\x1b[2J\x9b\u202e")), text="\0\x1b[2J\x9b\u202e"),
    # 13: floods
    final("a line of 150 MB", Script(Filler(150_000_000)), "event_too_large"),
    final("an event without end", Script(*[Raw(b"data: " + b"a" * 8000 + b"\n")] * 1000), "event_too_large"),
    silent("a gzip bomb", Script(Filler(150_000_000), gzip=True)),
    Row("endless", [answer(Text(None, 0.002, seed=1))], "failed", None, "total_timeout", requests=1,
        asked={"timeout": 1.0}, reasons={}),
    Row("endless comments", [Script(Text(3, seed=1), *[Comment("x" * 1000)] * 3000, Stall(comment_every=0.05))],
        "failed", expected_text(3, 1), "total_timeout", requests=1, asked={"timeout": 0.5}, reasons={}),
    # 14, 15: parts and ends
    *(whole(reason, answer(Text(N, seed=1), finish=reason), status="incomplete", reasons={0: reason})
      for reason in ("length", "content_filter")),
    whole("azure", azure(Text(N, seed=1))),
    whole("a usage chunk with no choices", answer(Text(N, seed=1), usage=True)),
    whole("a reset after the finish reason", Script(Text(N, seed=1), Finish(), Pause(0.1), Reset())),
    whole("silence after the finish reason", Script(Text(N, seed=1), Finish(), Stall())),
    *(final(f"a redirect, {n}", redirect("http://127.0.0.1:9/elsewhere", n), "redirect") for n in (301, 307, 308)),
]  # fmt: skip


def run(world: World, row: Row) -> tuple[list[AnyEvent], str]:
    """Play a row to its end, check it against the oracle; its log and id."""
    prompt = f"row: {row.name}"
    world.upstream.on(*row.scripts, prompt=prompt)
    job_id = world.submit(prompt, **row.asked)
    if any(isinstance(step, WaitFor) for step in row.scripts[0].steps):
        world.wait_for_seq(job_id, 2)
        world.upstream.open_gate("seen 1")
    result = world.outcome(job_id)
    log = world.check(job_id)
    code = result.error["code"] if result.error else None
    assert (result.status, code, result.attempts) == (row.status, row.code, row.attempts), result.error
    if row.text is not None:
        assert result.text == row.text
    if row.requests is not None:
        assert len(world.upstream.requests_for(prompt)) == row.requests
    assert world.client.status(job_id).finish_reasons == row.reasons
    return log, job_id


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name[:60])
def test_every_fault_has_its_outcome(shared: World, row: Row) -> None:
    """Status, code, text, attempts, requests and finish reasons of the row; a log that passes the oracle."""
    log, _ = run(shared, row)
    starts = [(each.attempt, each.reason) for each in log if isinstance(each, Started)]
    assert starts == [(1, None), *((n, "stream_broken") for n in range(2, row.attempts + 1))]


def test_how_many_faults_were_tried(say: Callable[[str], None]) -> None:
    """A table that lost its rows proves nothing."""
    assert len(ROWS) >= 100
    assert len({row.name for row in ROWS}) == len(ROWS)
    say(f"{len(ROWS)} faults and dialects of upstreams, each with its outcome")


def test_messages_are_the_upstreams_own_and_inert(shared: World) -> None:
    """What a failing upstream says is kept, on one line, without markup or anything that moves a cursor."""
    page = "<html><head><title>502</title><style>p{}</style></head><body><h1>Bad\x1b[31m Gateway</h1></body></html>"
    said = [
        (html(404, page), "http_404", "502 Bad [31m Gateway"),
        (error(400, "Zeile eins\n\u202ezwei \x1b]52;c;eHg=\x07", error_code="a\x1b[2Jb"), "a_2Jb",
         "Zeile eins zwei ]52;c;eHg="),
        (Script(Status(418, {}, {"detail": [{"msg": "field required"}]})), "http_418", '[{"msg": "field required"}]'),
        (Script(Status(400, {}, "")), "http_400", "the upstream answered 400"),
    ]  # fmt: skip
    for number, (script, code, message) in enumerate(said):
        prompt = f"message {number}"
        shared.upstream.on(script, prompt=prompt)
        found = shared.outcome(shared.submit(prompt)).error
        assert found is not None
        assert (found["code"], found["message"]) == (code, message)


def test_every_part_arrives_with_its_index(shared: World) -> None:
    """n = 3 taking turns, tools, refusals, reasoning under both names: the same chat.completion as from the API."""
    turns = answer(Text(6, seed=1, choices=3), choices=3, usage=True)
    shared.upstream.on(turns, prompt="three")
    result = shared.outcome(shared.submit("three", n=3))
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
    before = len(shared.redis.keys("*"))
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
    assert len(shared.redis.keys("*")) <= before


_TERMINAL: Final = "\x1b[2J\x1b]8;;http://evil\x07link\x1b]8;;\x07\x1b]52;c;eHg=\x07\x9b31m\u202e\u2066"
HOSTILE: Final = f"{_TERMINAL}</script><img onerror=x>\r\n\ndata: x"


def test_hostile_text_is_kept_as_it_is_and_stays_out_of_the_logs(shared: World) -> None:
    """An answer is data: it arrives unchanged, and no log line, which a person reads in a terminal, has any of it."""
    shared.upstream.on(answer(Part(HOSTILE)), prompt="hostile")
    assert shared.outcome(shared.submit("hostile")).text == HOSTILE
    shared.upstream.on(error(400, HOSTILE, error_code=HOSTILE[:50]), prompt="hostile error")
    shared.outcome(shared.submit("hostile error"))
    for worker in shared.workers:
        text = worker.log.read_bytes().decode()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
        assert "onerror" not in text
        assert KEY not in text


# Waits, several upstreams, outages -----------------------------------------------------------------------------------


def test_every_form_of_a_wait_is_kept(shared: World) -> None:
    """No request comes sooner than the upstream asked for; exactly one comes then."""
    forms: list[tuple[dict[str, str], float]] = [
        ({"retry-after-ms": "300"}, 0.3),
        ({"retry-after": "1.1"}, 1.1),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "350ms"}, 0.35),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "0m1s"}, 1.0),
    ]
    for number, (headers, least) in enumerate(forms):
        prompt, model = f"form {number}", f"limited-{number}"
        shared.upstream.on(rate_limited(headers), GOOD, prompt=prompt)
        job_id = shared.submit(prompt, model=model)
        assert shared.outcome(job_id).text == WHOLE
        first, second = shared.upstream.requests_for(prompt)
        assert first.ended_at is not None
        assert least <= second.request.arrived_at - first.ended_at < least + 2
        told = [each.delay for each in shared.check(job_id) if isinstance(each, Retrying)]
        assert told == ([pytest.approx(least)] if least > 1 else [])


def test_a_wait_holds_all_jobs_of_the_worker_for_that_model(shared: World) -> None:
    """While one job waits as it was told, another one for the same model is not asked, and one for another model is."""
    shared.upstream.on(rate_limited({"retry-after": "2"}), GOOD, prompt="told to wait")
    shared.upstream.on(GOOD, prompt="the same model")
    shared.upstream.on(GOOD, prompt="another model")
    jobs = [shared.submit("told to wait", model="cool")]
    shared.upstream.journal.wait_for(lambda j: j.requests_for("told to wait")[0].outcome == "finished")
    jobs += [shared.submit("the same model", model="cool"), shared.submit("another model", model="warm")]
    for job_id in jobs:
        assert shared.outcome(job_id).text == WHOLE
    asked = {each.request.prompt: each.request.arrived_at for each in shared.upstream.journal}
    began = shared.upstream.requests_for("told to wait")[0].request.arrived_at
    assert asked["the same model"] - began >= 2
    assert asked["another model"] - began < 1.5


def test_a_long_wait_is_spent_in_the_queue(shared: World) -> None:
    """The job says what it waits for and until when, holds no slot, can be cancelled, and comes back at its time."""
    scripts = (rate_limited({"retry-after": "6"}), GOOD)
    for prompt in ("back later", "cancelled meanwhile"):
        shared.upstream.on(*scripts, prompt=prompt)
    job_id = shared.submit("back later", model="slow")
    shared.wait_for_status(job_id, "in_progress")
    shared.wait_for_status(job_id, "queued")
    wait = shared.client.status(job_id).wait
    assert wait is not None
    assert (wait["what"], wait["upstream"]) == ("upstream", "127.0.0.1")
    assert wait["until"] - time.time() < 6.5
    other = shared.submit("cancelled meanwhile", model="slow")
    shared.wait_for_status(other, "queued")
    began = time.monotonic()
    assert shared.client.cancel(other) == "cancelled"
    assert time.monotonic() - began < 1
    assert shared.outcome(job_id).text == WHOLE
    first, second = shared.upstream.requests_for("back later")
    assert 6 <= second.request.arrived_at - first.request.arrived_at < 12
    log = shared.check(job_id)
    starts = [(each.attempt, each.reason) for each in log if isinstance(each, Started)]
    assert [reason for _, reason in starts] == [None, "released"]
    assert shared.client.status(job_id).broken == 0
    assert shared.check(other)[-1].type == "cancelled"


class Several:
    """Upstreams of their own, named in a file."""

    def __init__(self, make_world: Callable[..., World], url: str, folder: Path, file: str, **environ: str) -> None:
        path = folder / "upstreams.toml"
        path.write_text(file)
        self.world = make_world(url, MILLSTREAM_UPSTREAMS=str(path), SOME_KEY=KEY, **environ)
        self.world.redis.flushdb()
        self.worker = self.world.worker()


@pytest.fixture
def several(make_world: Callable[..., World], valkey: Valkey, tmp_path: Path) -> Callable[..., Several]:
    def make(file: str, **environ: str) -> Several:
        return Several(make_world, valkey.url.removesuffix("0") + "2", tmp_path, file, **environ)

    return make


def test_a_job_goes_to_the_first_upstream_that_serves_its_model(several: Callable[..., Several]) -> None:
    """In the file's order, with the key, headers, query, alias and options of that upstream and of no other."""
    with ScriptedUpstream() as azures, ScriptedUpstream() as others:
        file = f"""
        [upstreams.azure]
        base_url = "{azures.base_url}"
        api_key_env = "SOME_KEY"
        auth = "api-key"
        models = ["gpt-*"]
        aliases = {{ fast = "deployment-7" }}
        query = {{ api-version = "2024-10-21" }}
        [upstreams.other]
        base_url = "{others.base_url}"
        headers = {{ X-Title = "mill" }}
        stream_options = false
        models = ["local-*"]
        """
        world = several(file, OPENAI_ORG_ID="org-secret").world
        for model in ("gpt-4o", "fast", "local-1"):
            assert world.outcome(world.submit(f"for {model}", model=model)).status == "completed"
        for exchange, model in zip(azures.journal, ("gpt-4o", "deployment-7"), strict=True):
            request = exchange.request
            assert (request.model, request.path) == (model, "/v1/chat/completions?api-version=2024-10-21")
            assert request.headers["api-key"] == KEY
            assert not {"authorization", "openai-organization", "x-title"} & set(request.headers)
            assert request.include_usage
        [exchange] = others.journal
        assert exchange.request.headers["x-title"] == "mill"
        assert not {"authorization", "api-key", "openai-organization"} & set(exchange.request.headers)
        assert "stream_options" not in exchange.request.json
        job_id = world.submit("for nobody", model="claude")
        result = world.outcome(job_id)
        assert result.error is not None
        assert result.error["code"] == "model_not_served"
        job_id = world.submit("named by its alias", model="fast")
        world.outcome(job_id)
        [started] = [each for each in world.check(job_id) if isinstance(each, Started)]
        assert (started.upstream, started.model) == ("azure", "fast")


DIALECTS: Final[dict[str, tuple[str, Script, str]]] = {
    "openai": ("", answer(Text(N, seed=1), usage=True), "measured"),
    "azure": ('auth = "api-key"\napi_key_env = "SOME_KEY"', azure(Text(N, seed=1)), "estimated"),
    "openrouter": ("", answer(Comment(" OPENROUTER PROCESSING"), Text(4, seed=1), Comment(" OPENROUTER PROCESSING"),
                              Part(WHOLE.removeprefix(expected_text(4, 1))), usage=True), "measured"),
    "vllm": ('continue_with = "vllm"', answer(Part(reasoning="Hm.", reasoning_field="reasoning"), Text(N, seed=1),
                                              usage=True), "measured"),
    "deepseek": ("", answer(*[Comment("keep-alive")] * 5, Part(reasoning="Hm."), Text(N, seed=1), usage=True),
                 "measured"),
    "ollama-without-reasons": ('ends_with = "done"', Script(
        *[Part(text, finish_reason="") for text in (WHOLE[:5], WHOLE[5:])], Done()), "estimated"),
    "ollama": ('ends_with = "done"', answer(Text(N, seed=1), usage=True), "measured"),
    "own-finish-reason": ('finish_reasons = ["eos"]', answer(Text(N, seed=1), finish="eos"), "estimated"),
    "no-usage": ("stream_options = false", answer(Text(N, seed=1)), "estimated"),
}  # fmt: skip


def test_every_dialect_is_understood_with_its_settings(
    several: Callable[..., Several], say: Callable[[str], None]
) -> None:
    """The same text from each, completed; its usage measured, or estimated and marked so."""
    with ScriptedUpstream() as upstream:
        tables = [
            f'[upstreams."{name}"]\nbase_url = "{upstream.base_url}"\nmodels = ["{name}"]\n{fields}\n'
            for name, (fields, _, _) in DIALECTS.items()
        ]
        world = several("".join(tables)).world
        for name, (_, script, usage) in DIALECTS.items():
            upstream.on(script, model=name)
            job_id = world.submit(name, model=name)
            result = world.outcome(job_id)
            assert (result.status, result.error, result.text) == ("completed", None, WHOLE), name
            assert result.usage is not None
            assert ("estimated" in result.usage) == (usage == "estimated"), name
            assert 0 < result.usage["completion_tokens"] <= N + 1
            world.check(job_id)
            assert len(upstream.requests_for(name)) == 1
    say(f"{len(DIALECTS)} dialects, each with its settings")
