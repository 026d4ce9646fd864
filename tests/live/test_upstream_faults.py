"""What upstreams do to a real worker: dialects, faults, outages, floods. Every job's log passes the oracle.

Most faults are asked of one worker, in rows of a table; what must hold of a row stands beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from millstream.events import AnyEvent, Started
from tests.live.short_answers import GOOD, SHORT_CLOCKS, WHOLE, N
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
)
from tests.upstream import Chunk as Part
from tests.world import World

ENVIRON: Final = SHORT_CLOCKS


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
    """The fault comes after seven chunks, the first of which was shown: a new attempt, whose text is whole."""
    name = f"{name} after 7"
    seven = (Text(1, seed=9), WaitFor(name), Text(6, seed=8))
    return whole(name, Script(*seven, *fault, **more), GOOD, attempts=2)


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
    Row("a page for ever", [html()], "failed", "", "malformed_stream", requests=3, reasons={}),
    Row("a reset for ever", [Script(Reset())], "failed", "", "upstream_unreachable", requests=3, reasons={}),
    Row("503 for ever", [error(503, "Down.", error_code="down")], "failed", "", "down", requests=3, reasons={}),
    # 5, 6: silence
    silent("no head", Script(Stall())),
    silent("a head and silence", Script(Headers(), Stall())),
    silent("a role and comments", Script(Part("", role="assistant"), Stall(comment_every=0.1))),
    whole("a late head", Script(Pause(1.1), *GOOD.steps)),
    broken("a stall", Stall()),
    broken("a stall with comments", Stall(comment_every=0.1)),
    broken("pings for ever", *[step for _ in range(30) for step in (Ping(), Pause(0.1))]),
    # 7: resets
    silent("a reset", Script(Reset())),
    silent("a reset after the head", Script(Headers(), Reset())),
    whole("a reset after 1", Script(Text(1, seed=9), WaitFor("one"), Reset()), GOOD, attempts=2),
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
    Row("abort for ever", [Script(Text(3, seed=1), WaitFor(gate), Finish("abort"), Done()) for gate in ("aa", "ab")],
        "failed", expected_text(3, 1), "attempts_exhausted", attempts=2, requests=2, asked={"max_attempts": 2},
        reasons={}),
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
    broken("OpenRouter's error", Part("", finish_reason="error", raw={"error": {"code": 502, "message": "Gone."}})),
    broken("vLLM's error", Event({"error": {"object": "error", "message": "Dead.", "code": 500}}), Done()),
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
    *(whole(f"no [DONE], {framing}", Script(Text(N, seed=1), Finish(), framing=framing))
      for framing in ("chunked", "close", "content-length")),
    *(whole(f"framed by {framing}", Script(*GOOD.steps, framing=framing)) for framing in ("close", "content-length")),
    # 12: bytes and types
    broken("JSON of 100,000 levels", Raw(b"data: " + b"[" * 100_000 + b"\n\n")),
    *(broken(f"{raw}", Part(raw=raw)) for raw in (
        {"choices": "x"}, {"choices": [3]}, {"choices": [{"index": 0, "delta": {"content": 5}}]},
        {"choices": [{"index": 0, "delta": {"content": [{"type": "text"}]}}]}, {"choices": [{"index": 999}]})),
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
        "failed", expected_text(3, 1), "total_timeout", requests=1, asked={"timeout": 0.9}, reasons={}),
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
    for attempt, script in enumerate(row.scripts, 1):
        for gate in (step.gate for step in script.steps if isinstance(step, WaitFor)):
            world.wait_until_shown(job_id, attempt)
            world.upstream.open_gate(gate)
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
