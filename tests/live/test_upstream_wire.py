"""What hostile and sloppy upstreams put on the wire: HTTP that lies, chunks that contradict themselves, odd errors.

The bytes are the test's own, head and framing too, and nothing here knows how the worker reads them. All rows are
asked of one worker, sixteen at a time, each under a model of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from tests.upstream import Chunk as Part
from tests.upstream import (
    Done,
    Event,
    Filler,
    Finish,
    Headers,
    Pause,
    Raw,
    Reset,
    Script,
    Split,
    Stall,
    Status,
    Text,
    WaitFor,
    Wire,
    answer,
    error,
    html,
    rate_limited,
    tool_call,
)
from tests.valkey import Valkey
from tests.world import KEY, World, a_world

RETRIES: Final = 1
HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED: Final = HEAD + b"transfer-encoding: chunked\r\n\r\n"
LAST: Final = b"0\r\n\r\n"


def chunk(content: str | None = None, finish: str | None = None) -> bytes:
    delta = {} if content is None else {"content": content}
    return b"data: %b\n\n" % json.dumps({"choices": [{"delta": delta, "finish_reason": finish}]}).encode()


SAID: Final = chunk("hello") + chunk(" world")
TEXT: Final = "hello world"
BODY: Final = SAID + chunk(finish="stop") + b"data: [DONE]\n\n"


def framed(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


def wire(*steps: Any) -> Script:
    return Script(*[Wire(step) if isinstance(step, bytes) else step for step in steps])


@dataclass(frozen=True)
class Row:
    """One answer to every request of a job, and what comes of it. `text` and `code` None: whatever it is."""

    name: str
    script: Script
    status: str
    text: str | None = None
    code: str | None = None
    requests: int | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)


def good(name: str, script: Script, text: str = TEXT, status: str = "completed", **asked: Any) -> Row:
    return Row(name, script, status, text, requests=1, asked=asked)


def bad(name: str, script: Script, code: str | None = None, **asked: Any) -> Row:
    """Every request fails before any content: the job is asked again, and fails."""
    return Row(name, script, "failed", None, code, 1 + RETRIES, asked)


def final(name: str, script: Script, code: str) -> Row:
    return Row(name, script, "failed", None, code, 1)


def cut(name: str, script: Script) -> Row:
    """Content came, then it broke: never `completed`. (How much of it was shown is chance, and so are the requests.)"""
    return Row(name, script, "failed", asked={"max_attempts": 1})


NOT_HTTP: Final = {
    "garbage before the status line": b"\0\x01garbage\r\n" + CHUNKED + framed(BODY) + LAST,
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n", "a TLS alert": b"\x15\x03\x01\x00\x02\x02\x46",
    "HTTP/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64", "a body alone": BODY,
    "status abc": b"HTTP/1.1 abc x\r\n\r\n", "status 99": b"HTTP/1.1 99 x\r\n\r\n",
    "a header without colon": HEAD + b"nonsense\r\n\r\n" + BODY,
    "endless headers": HEAD + b"x-a: b\r\n" * 20_000,
    "a header of 70 KB": HEAD + b"x-a: " + b"a" * 70_000 + b"\r\n\r\n",
    "the key for a status line": KEY.encode() + b" HTTP/1.1\r\n\r\n",
    "the key for a header": HEAD + b"x " + KEY.encode() + b"\r\n\r\n",
    "two lengths": HEAD + b"content-length: 5\r\ncontent-length: 500\r\n\r\n" + BODY,
    "a negative length": HEAD + b"content-length: -5\r\n\r\n" + BODY,
    "a length in words": HEAD + b"content-length: lots\r\n\r\n" + BODY,
    "a length beyond all bounds": HEAD + b"content-length: 99999999999999999999999\r\n\r\n" + BODY,
    "length and chunks": HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n" + framed(BODY) + LAST,
}  # fmt: skip

FRAMING: Final = [
    *(bad(name, wire(data), "malformed_response") for name, data in NOT_HTTP.items()),
    good("chunks", wire(CHUNKED + framed(BODY) + LAST)),
    good("100, then well", wire(b"HTTP/1.1 100 Continue\r\n\r\n" * 20 + CHUNKED + framed(BODY) + LAST)),
    good("103, then well", wire(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + CHUNKED + framed(BODY) + LAST)),
    bad("100 for ever", wire(*[b"HTTP/1.1 100 Continue\r\n\r\n", Pause(0.1)] * 40), "first_token_timeout"),
    final("101", wire(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n"), "http_101"),
    bad("a slow loris", wire(*[step for byte in HEAD for step in (bytes([byte]), Pause(0.1))]), "first_token_timeout"),
    good("HTTP/1.0", wire(b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + BODY)),
    good("no reason phrase", wire(b"HTTP/1.1 200\r\nContent-Type:Text/Event-Stream;charset=UTF-8\r\n\r\n" + BODY)),
    good("chunk extensions", wire(CHUNKED + framed(BODY, b";a=b") + LAST)),
    good("trailers", wire(CHUNKED + framed(BODY) + b"0\r\nx-t: 1\r\nset-cookie: a\r\n\r\n")),
    good("no last chunk", wire(CHUNKED + framed(BODY))),
    good("a break after the finish reason", wire(CHUNKED + framed(SAID + chunk(finish="stop")) + b"20\r\nabc")),
    good("longer than it was", wire(HEAD + b"content-length: %d\r\n\r\n" % (len(BODY) + 50) + BODY)),
    *(bad(f"chunk size {size.decode()[:9]}", wire(CHUNKED + size + b"\r\n" + BODY))
      for size in (b"-5", b"zz", b"f" * 40, b"5;" + b"a" * 1_000_000)),
    cut("a chunk longer than it says", wire(CHUNKED + framed(SAID), Pause(0.1), b"5\r\n" + BODY)),
    cut("a chunk size that is none, after content", wire(CHUNKED + framed(SAID), Pause(0.1), b"zz\r\n")),
    cut("shorter than it was", wire(HEAD + b"content-length: %d\r\n\r\n" % len(SAID) + BODY)),
    cut("longer than what came", wire(HEAD + b"content-length: 5000\r\n\r\n" + SAID)),
    # Statuses
    *(final(f"status {status}", Script(Status(status)), "redirect") for status in (300, 302, 304, 305)),
    final("418", error(418, "Teapot.", type="teapot"), "teapot"),
    bad("599", Script(Status(599)), "http_599"),
    bad("503 with escapes in it", wire(b"HTTP/1.1 503 \x1b[2J\r\nx: \x1b]52;c;eA==\x07\r\ncontent-length: 0\r\n\r\n")),
    bad("204 with a body", wire(b"HTTP/1.1 204 No\r\ncontent-type: text/event-stream\r\n\r\n" + BODY)),
    *(good(f"status {status}", Script(Headers(code=status), *answer(Part(TEXT)).steps)) for status in (201, 206)),
    final("a cut 400", wire(b"HTTP/1.1 400 Bad\r\ncontent-length: 500\r\n\r\nhalf a word"), "http_400"),
    final("a reset 400", Script(Headers({"content-type": "application/json"}, 400), Raw(b"half"), Pause(0.1), Reset()),
          "http_400"),
    bad("an endless 500", Script(Headers(code=500), Filler(None)), "http_500"),
    final("400, compressed", Script(Status(400, {"content-encoding": "gzip"}, b"\x1f\x8b\x08")), "http_400"),
    final("400, deep", Script(Status(400, {"content-type": "application/json"}, b"[" * 60_000)), "http_400"),
    final("400, of a strange charset", Script(Status(400, {"content-type": "text/plain; charset=klingon"}, "abc")),
          "http_400"),
    # What is no event stream, or says that it is none
    *(good(f"content type {kind!r}", Script(Headers({"content-type": kind}), *answer(Part(TEXT)).steps))
      for kind in ("", "text/plain", "application/json", "application/octet-stream", "TEXT/EVENT-STREAM;x=y")),
    *(good(f"no content type and {start!r} first", Script(Headers({"content-type": ""}), Split(1, 0.001), Raw(start),
                                                          Split(16, 0.001), *answer(Part(TEXT)).steps))
      for start in (b"\xef\xbb\xbf", b": hello\n\n", b"\n\n", b"retry: 3000\n")),
    *(bad(f"an error as {kind!r}", Script(Headers({"content-type": kind}), Raw(b'{"error":{"code":"busy"}}')), "busy")
      for kind in ("", "text/plain", "application/json", "text/html", "text/event-stream")),
    bad("ndjson", Script(Headers({"content-type": "application/x-ndjson"}), Raw(b"{}\n")), "malformed_stream"),
    bad("a page without end", Script(Headers({"content-type": "text/html"}), Filler(None)), "malformed_stream"),
    final("JSON without end", Script(Headers({"content-type": "application/json"}), Raw(b"{"), Filler(None)),
          "event_too_large"),
    bad("JSON that stalls", Script(Headers({"content-type": "application/json"}), Raw(b"{"), Stall()),
        "first_token_timeout"),
    bad("JSON without an answer", Script(Status(body={"choices": []})), "malformed_stream"),
    bad("a JSON error in a list", Script(Status(body=[{"error": {"code": 503, "status": "UNAVAILABLE"}}])),
        "UNAVAILABLE"),
    bad("a page", html(), "malformed_stream"),
]  # fmt: skip


def message(**fields: Any) -> dict[str, Any]:
    return {"index": 0, "message": {"role": "assistant", **fields}, "finish_reason": "stop"}


def delta(**fields: Any) -> Part:
    return Part(raw={"choices": [{"index": 0, "delta": fields}]})


def after(*steps: Any) -> Script:
    """Chunks, with the content `a` before them."""
    return Script(Part("a"), *steps)


TOO_LONG: Final = {"finish_reason": "length"}
STRANGE: Final[list[Any]] = [-1, 128, 10**30, 1.5, "x", []]

CHUNKS: Final = [
    # Ends that contradict themselves
    good("two finish reasons", after(Finish("stop"), Finish("length"), Done()), "a", "incomplete"),
    cut("stop, then abort", after(Finish("stop"), Finish("abort"), Done())),
    good("the finish reason first", Script(Finish(), Part("a"), Done()), "a"),
    good("content after the finish reason", after(Finish(), Part("b"), Done()), "ab"),
    cut("content after the finish reason, and a break", after(Finish(), Part("b"), Pause(0.1), Reset())),
    cut("content after the finish reason, and no [DONE]", after(Finish(), Part("b"))),
    cut("a finish reason on every chunk, and a break", Script(
        *[Part("a", finish_reason="stop")] * 3, Part("b"), Pause(0.1), Reset())),
    good("content and errors after [DONE]", after(Finish(), Done(), Part("b"), Event({"error": "late"})), "a"),
    cut("an error beside the finish reason", after(Part(finish_reason="stop", raw={"error": "late"}), Done())),
    cut("an error after the finish reason", after(Finish(), Event({"error": "late"}), Done())),
    good("junk after the finish reason", after(Finish(), Raw(b"data: }{\n\n"), Done()), "a"),
    *(good(f"{done!r} for [DONE]", after(Finish(), Raw(b"data:" + done + b"\n\n"), Event({"error": "late"})), "a")
      for done in (b"[done]", b"  [DONE]", b"[DONE] ok")),
    *(good(f"an end with {name}", after(Part(raw={"choices": [choice]}), Done()), "a") for name, choice in {
        "a null delta": {"index": 0, "delta": None, "finish_reason": "stop"},
        "no delta": {"index": 0, "finish_reason": "stop"}, "no index": {"finish_reason": "stop"}}.items()),
    # Choices
    *(cut(f"index {index!r}", after(Part(raw={"choices": [{"index": index, "delta": {"content": "b"}}]}), Finish()))
      for index in STRANGE),
    bad("one answer where three were asked for", Script(Finish(), Done()), "stream_truncated", n=3),
    good("three answers where one was asked for", answer(Part("a"), Text(3, index=1), choices=2), "a"),
    good("20,000 choices", Script(Part(raw={"choices": [{"index": 0, "delta": {"content": "a"}}] * 20_000}), Finish()),
         "a" * 20_000),
    # JSON that is none, or nearly
    *(good(f"{data[:30]!r}", answer(Raw(b"data: " + data + b"\n\n"), Part("a")), "a") for data in (
        b'{"x":NaN,"choices":[]}', b'{"x":1e999,"choices":[]}', b'{"choices":[],"x":' + b"1" * 5000 + b"}", b"{}",
        b'{"id":"other","model":"other","created":-1,"object":7,"choices":[]}')),
    *(cut(f"{data[:30]!r}", after(Raw(b"data: " + data + b"\n\n"), Finish())) for data in (
        b'{"a":1}{"b":2}', b"{'choices':[]}", b"null", b"[]", b'"x"', b"true", b"data: {}", b"[DONE")),
    good("a finish reason of 5 KB first", after(Finish("x" * 5000), Finish()), "a"),
    # An answer in one piece
    good("a whole answer as an event", Script(Event({"choices": [message(content="Whole.")]}), Done()), "Whole."),
    good("a message that sums up the deltas", after(Part(raw={"choices": [message(content="a")]}), Done()), "a"),
    Row("a whole answer, too short", Script(Status(body={"choices": [{**message(content="Wh"), **TOO_LONG}]})),
        "incomplete", "Wh", requests=1),
    bad("a whole answer that is none", Script(Status(body={"choices": [{"message": {}}]})), "malformed_stream"),
    # Errors inside a 200
    *(bad(f"error {str(said)[:40]}", Script(Event({"error": said})), code) for said, code in (
        ({"code": 429, "message": "Rate."}, "upstream_error"), ({"code": None, "message": "m"}, "upstream_error"),
        ({"code": {"a": 1}, "message": "m"}, "upstream_error"), ({"code": ["x"]}, "upstream_error"),
        ([{"message": "in a list", "code": "listed"}], "listed"), ("plain", "upstream_error"), (True, "upstream_error"),
        ({"error": {"message": "m", "code": "inner"}}, "inner"), ({"message": {"text": "deep"}}, "upstream_error"),
        ({"code": "x" * 300, "message": "y" * 5000}, "x" * 64), ({"code": KEY, "message": f"{KEY} is bad"}, "***"))),
    *(final(f"error {said}", Script(Event({"error": said})), code) for said, code in (
        ({"status": 401, "message": "m"}, "upstream_error"), ({"code": "insufficient_quota"}, "insufficient_quota"))),
    *(cut(f"event: {name}, {data[:12]!r}", after(Raw(f"event: {name}\ndata: ".encode() + data + b"\n\n"), Finish()))
      for name in ("error", "ERROR")
      for data in (b"", b"oops", b"{}", b"null", b'"text"', b"[1]", b"{", b"\xff\xfe", b"<html>", b'{"code":500}')),
    # Keys in what it says
    final("the key in a 401", error(401, f"{KEY}: not known", error_code=KEY), "***"),
    final("the key at the edge", error(401, "x" * 990 + KEY), "invalid_request_error"),
    cut("the key for a finish reason", after(Finish(KEY), Done())),
    bad("the key for a content type", wire(b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n\r\n" % KEY.encode())),
    # Waits that are none
    *(bad(f"retry-after {wait[:14]!r}", rate_limited({"retry-after": wait}), "rate_limit_exceeded") for wait in (
        "-5", "nan", "inf", "1e400", "", "0", "999999999999", "1_0", "0x10", "Thu, 99 Foo 2099", "soon", "1" * 400,
        "Wed, 21 Oct 2015 07:28:00 GMT")),
    final("quota with a wait", rate_limited({"retry-after": "1"}, "insufficient_quota"), "insufficient_quota"),
]  # fmt: skip

ROWS: Final = [*FRAMING, *CHUNKS]


@pytest.fixture(scope="module")
def world(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One worker, no retry budget in its way, and so few rows at once that the clocks time them and not the crowd."""
    environ = {
        "MILLSTREAM_IDLE_TIMEOUT": "2",
        "MILLSTREAM_FIRST_TOKEN_TIMEOUT": "2",
        "MILLSTREAM_RETRIES": str(RETRIES),
    }
    with a_world(valkey.url, tmp_path_factory.mktemp("wire"), **environ) as made:
        made.worker("--streams", "16")
        yield made
        made.check_left()


@pytest.fixture(scope="module")
def played(world: World) -> dict[str, str]:
    """All rows, submitted at once; their jobs by name."""
    jobs = {}
    for number, row in enumerate(ROWS):
        world.upstream.on(row.script, prompt=row.name)
        jobs[row.name] = world.submit(row.name, model=f"row-{number}", **row.asked)
    return jobs


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name[:60])
def test_every_answer_has_its_outcome(world: World, played: dict[str, str], row: Row) -> None:
    """Status, code, text and requests of the row; a message that a person can read; a log that passes the oracle."""
    job_id = played[row.name]
    result = world.outcome(job_id)
    world.check(job_id)
    found = result.error or {"code": None, "message": ""}
    assert (result.status, found["code"] if row.code else None) == (row.status, row.code), result.error
    if row.text is not None:
        assert result.text == row.text
    if row.requests is not None:
        assert len(world.upstream.requests_for(row.name)) == row.requests
    if result.error is not None:
        check_readable(result.error)


def check_readable(said: Mapping[str, Any]) -> None:
    """A word and a sentence: one printable line, no part of a key, nothing of our own insides."""
    for text in (said["code"], said["message"]):
        assert 0 < len(text) <= 1000
        assert text.isprintable()
        assert KEY[:8] not in text
    assert not any(word in said["message"] for word in ("Error:", "aiohttp", "Client", "b'", "0x", "object at"))


def test_how_many_answers_were_tried(say: Callable[[str], None]) -> None:
    """A table that lost its rows proves nothing."""
    assert len({row.name for row in ROWS}) == len(ROWS) >= 150
    say(f"{len(FRAMING)} ways to break HTTP and {len(CHUNKS)} to break a stream, each with its outcome")


def test_no_answer_is_taken_for_anothers(world: World) -> None:
    """What comes on a connection between two requests, a second answer or its beginning, answers neither."""
    stolen = CHUNKED + framed(chunk("stolen") + chunk(finish="stop") + b"data: [DONE]\n\n") + LAST
    for name, rest in {"all": stolen, "begun": stolen[:60]}.items():
        asked, gate = f"answered twice, {name}", f"second, {name}"
        world.upstream.on(wire(CHUNKED + framed(BODY) + LAST, WaitFor(gate), rest, WaitFor("never")), prompt=asked)
        assert world.outcome(world.submit(asked)).text == TEXT
        [exchange] = world.held(gate)
        world.upstream.open_gate(gate)
        world.upstream.journal.wait_for(lambda _: exchange.closed_at is not None)  # noqa: B023 - asked before it changes
        world.check_text(world.submit(f"after {name}"), f"after {name}")
    together = "answered twice, at once"
    world.upstream.on(wire(CHUNKED + framed(BODY) + LAST + stolen, WaitFor("never")), prompt=together)
    assert world.outcome(world.submit(together)).text == TEXT
    world.check_text(world.submit("after at once"), "after at once")


USAGES: Final[list[Any]] = [
    None, {}, [], "much", 7, {"prompt_tokens": -1, "completion_tokens": -5, "total_tokens": -6},
    {"prompt_tokens": 10**30, "completion_tokens": 1}, {"prompt_tokens": "7", "completion_tokens": "8"},
    {"prompt_tokens": None, "completion_tokens": 3}, {"prompt_tokens": 1.5, "completion_tokens": True},
    {"total_tokens": 5}, {"prompt_tokens": 1, "completion_tokens": 1, "x": "y" * 20_000},
]  # fmt: skip


def test_only_a_usage_that_is_one_is_believed(world: World) -> None:
    """Counts are whole numbers from 0 on; all else is estimated and marked so, and costs no answer."""
    for number, usage in enumerate(USAGES):
        prompt = f"usage {number}"
        world.upstream.on(after(Finish(), Part(raw={"choices": [], "usage": usage}), Done()), prompt=prompt)
        result = world.outcome(world.submit(prompt))
        assert (result.status, result.text) == ("completed", "a")
        assert result.usage is not None
        assert (result.usage["estimated"], result.usage["completion_tokens"]) == (True, 1)
    told: dict[str, Any] = {"prompt_tokens": 3, "completion_tokens": 2, "details": {"cached": 1}}
    totals: list[tuple[dict[str, Any], int]] = [({}, 5), ({"total_tokens": 9}, 9), ({"total_tokens": "x"}, 5)]
    for number, (more, total) in enumerate(totals):
        prompt = f"usage told {number}"
        world.upstream.on(after(Finish(), Part(raw={"choices": [], "usage": {**told, **more}}), Done()), prompt=prompt)
        assert world.outcome(world.submit(prompt)).usage == {**told, "total_tokens": total}


def test_an_answer_in_one_piece_is_an_answer(world: World) -> None:
    """From a server that does not stream, for every choice, with tools and usage: asked again it would cost as much."""
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in ("f", "g")]
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    choices = [message(content="One."), message(content=None, tool_calls=calls) | {"index": 1}]
    body = {"object": "chat.completion", "choices": choices, "usage": usage}
    world.upstream.on(Script(Status(body=body)), prompt="in one piece")
    result = world.outcome(world.submit("in one piece", n=2))
    assert (result.status, result.usage) == ("completed", usage)
    first, second = (each["message"] for each in result.completion["choices"])
    assert (first["content"], second["tool_calls"]) == ("One.", calls)
    long = {"choices": [message(content="é" * 1_500_000)], "usage": usage}
    world.upstream.on(Script(Status(body=long)), prompt="in one long piece")
    result = world.outcome(world.submit("in one long piece"))
    assert (result.text, result.usage) == ("é" * 1_500_000, usage)
    assert len(world.upstream.requests_for("in one long piece")) == 1


def call(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": "{}"}, **more}


def test_tool_calls_stay_apart_and_whole(world: World) -> None:
    """Two calls under one index or none, a name sent again, arguments as an object: what the model meant."""
    f, g = call("f", id="a"), call("g", id="b")
    torn_index: dict[str, Any] = {"index": "0", "id": "a", "function": {"name": "f", "arguments": "{"}}
    two = [{"id": "a", "name": "f", "arguments": "{}"}, {"id": "b", "name": "g", "arguments": "{}"}]
    cases: dict[str, tuple[list[Any], list[dict[str, Any]]]] = {
        "one index": ([delta(tool_calls=[{"index": 0, **each}]) for each in (f, g)], two),
        "no index": ([delta(tool_calls=[each]) for each in (f, g)], two),
        "one chunk": ([delta(tool_calls=[f, g])], two),
        "the name again": ([delta(tool_calls=[{"index": 0, "id": "a", "function": {"name": "f", "arguments": piece}}])
                            for piece in ("{", "}")], two[:1]),
        "an object": ([delta(tool_calls=[{"index": 0, "id": "a", "function": {"name": "f", "arguments": {"x": 1}}}])],
                      [{"id": "a", "name": "f", "arguments": '{"x":1}'}]),
        "a text for index": ([delta(tool_calls=[torn_index]),
                              delta(tool_calls=[{"index": "0", "function": {"arguments": "}"}}])], two[:1]),
    }  # fmt: skip
    for name, (chunks, expected) in cases.items():
        prompt = f"tools: {name}"
        world.upstream.on(answer(*chunks, finish="tool_calls"), prompt=prompt)
        [choice] = world.outcome(world.submit(prompt)).completion["choices"]
        found = [{"id": each["id"], **each["function"]} for each in choice["message"]["tool_calls"]]
        assert found == expected, name
    torn = Script(*tool_call("f", ['{"a":']), Pause(0.1), Reset())
    world.upstream.on(torn, prompt="tools: torn")
    result = world.outcome(world.submit("tools: torn", on_break="fail"))
    assert (result.status, result.completion["choices"][0]["finish_reason"]) == ("failed", None)


def test_whatever_a_delta_carries_arrives(world: World) -> None:
    """Old function calls, details of reasoning, annotations and sound stand in the completion as from the API."""
    details = [[{"type": "reasoning.text", "text": "deep"}], [{"type": "reasoning.encrypted", "data": "x"}]]
    called = [{"name": "f", "arguments": '{"a"'}, {"arguments": ":1}"}]
    sound = [{"id": "a", "data": "AA", "transcript": "o"}, {"data": "BB", "transcript": "k"}, {"expires_at": 7}]
    cases: dict[str, tuple[list[Part], Any]] = {
        "function_call": ([delta(function_call=each) for each in called], {"name": "f", "arguments": '{"a":1}'}),
        "reasoning_details": ([delta(reasoning_details=each) for each in details], details[0] + details[1]),
        "annotations": ([delta(content="x", annotations=[{"url": "u"}]), delta(annotations=[{"url": "v"}])],
                        [{"url": "u"}, {"url": "v"}]),
        "audio": ([delta(audio=each) for each in sound],
                  {"id": "a", "data": "AABB", "transcript": "ok", "expires_at": 7}),
    }  # fmt: skip
    for name, (chunks, expected) in cases.items():
        world.upstream.on(answer(*chunks), prompt=f"carries {name}")
        job_id = world.submit(f"carries {name}")
        [choice] = world.outcome(job_id).completion["choices"]
        assert choice["message"][name] == expected
        world.check(job_id)


def test_the_worker_lives_and_stays_small(world: World, played: dict[str, str]) -> None:
    """After all of them: the same process, no traceback, the key nowhere in its log, no more than 64 MB on top."""
    assert played
    [worker] = world.workers
    world.check_text(world.submit("still there?"), "still there?")
    assert worker.complaints() == []
    assert KEY.encode() not in worker.log.read_bytes()
    status = Path(f"/proc/{worker.pid}/status")
    if status.exists():
        sizes = dict(line.split(":", 1) for line in status.read_text().splitlines())
        assert int(sizes["VmHWM"].split()[0]) < 160 * 1024, "a worker that has done nothing has 70 to 80 MB"
