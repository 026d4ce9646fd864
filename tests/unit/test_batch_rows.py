"""From a line to a row and from an ending to a line: the format of the OpenAI Batch API."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.batch.answer import Answer
from millstream.batch.ledger import Ledger, fingerprint
from millstream.batch.row import Reader, Row, job_id
from millstream.job import parse

MESSAGES = [{"role": "user", "content": "Hi"}]


def line(custom_id: Any = "r", body: Any = None, **more: Any) -> bytes:
    body = {"model": "m", "messages": MESSAGES} if body is None else body
    return json.dumps({"custom_id": custom_id, "body": body, **more}).encode()


def read(text: bytes, batch: str = "b", **options: Any) -> Row | Answer | None:
    return Reader(batch, **options).read(text, 7)


def row(text: bytes, batch: str = "b", **options: Any) -> Row:
    found = read(text, batch, **options)
    assert isinstance(found, Row), found
    return found


def refused(text: bytes) -> dict[str, Any]:
    found = read(text)
    assert isinstance(found, Answer)
    assert found.status == "refused"
    return dict(found.error or {})


def test_a_rows_parameters_reach_the_spec_untouched() -> None:
    """n, tools and JSON schema among them; null is absent, `stream` false too."""
    params = {
        "n": 3, "temperature": 0,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": 2}}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
    }  # fmt: skip
    body = {"model": "m", "messages": MESSAGES, "stream": False, "seed": None, "metadata": {"team": "a"}, **params}
    found = row(line(body=body, method="POST", url="/v1/chat/completions"))
    spec = parse(found.body)
    assert (spec.model, spec.messages, spec.params, spec.lane) == ("m", MESSAGES, params, "batch")
    assert spec.metadata == {"team": "a", "batch": "b", "custom_id": "r"}
    assert (found.spec.messages, found.spec.params) == ([], {}), "the window does not hold the prompt twice"


def test_metadata_that_is_full_stays_as_it_is() -> None:
    """16 pairs are all there may be."""
    full = {str(n): "x" for n in range(16)}
    assert parse(row(line(body={"model": "m", "messages": MESSAGES, "metadata": full})).body).metadata == full


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (b"{", "invalid_json_line", "line 7"),
        (b"[]", "invalid_json_line", "object"),
        (b'{"custom_id":"\xff"}', "invalid_json_line", "line 7"),
        (b'{"custom_id":"r","body":' + b"[" * 100_000, "invalid_json_line", "nested"),
        (line(custom_id=None), "missing_required_parameter", "custom_id: found none"),
        (line(custom_id=5), "missing_required_parameter", "found 5, expected text"),
        (line(custom_id=""), "missing_required_parameter", "custom_id"),
        (line(method="GET"), "invalid_method", "'GET', expected POST"),
        (line(url="/v1/embeddings"), "invalid_url", "'/v1/embeddings'"),
        (line(url=["x"]), "invalid_url", "expected /v1/chat/completions"),
        (line(body=[]), "missing_required_parameter", "body: expected an object"),
        (line(body={"messages": MESSAGES}), "missing_required_parameter", "body.model"),
        (line(body={"model": "m", "messages": []}), "missing_required_parameter", "body.messages"),
        (line(body={"model": "m", "messages": "Hi"}), "invalid_request", "expected a list"),
        (line(body={"model": "m", "messages": ["Hi"]}), "invalid_request", "expected a list of objects"),
        (line(body={"model": 5, "messages": MESSAGES}), "invalid_request", "model"),
        (line(body={"model": "m", "messages": MESSAGES, "stream": True}), "invalid_request", "always streams"),
        (line(body={"model": "m", "messages": MESSAGES, "lane": "interactive"}), "invalid_request", "'lane'"),
        (line(body={"model": "m", "messages": MESSAGES, "temperature": "hot"}), "invalid_request", "temperature"),
        (line(body={"model": "m", "messages": MESSAGES, "metadata": [1]}), "invalid_request", "metadata"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_asked_says_why(text: bytes, code: str, says: str) -> None:
    """A code for programs; the line's number, what was found and what was expected for people."""
    error = refused(text)
    assert (error["code"], error["line"]) == (code, 7)
    assert says in error["message"]


@given(st.binary(max_size=60) | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda each: (
    st.lists(each, max_size=3) | st.dictionaries(st.sampled_from(["custom_id", "body", "model", "messages"]), each)
), max_leaves=8).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_no_line_can_break_the_reader(text: bytes) -> None:
    """Whatever a file holds: a row or a refusal."""
    assert isinstance(read(text), Row | Answer)


def test_a_row_is_the_same_job_until_it_is_edited() -> None:
    """The order of names does not count; the batch, the custom_id and the body do; lane and retention do not."""
    one = row(b'{"custom_id":"r","body":{"model":"m","messages":[{"role":"user","content":"Hi"}],"n":1}}')
    same = b'{"body":{"n":1,"messages":[{"content":"Hi","role":"user"}],"model":"m"},"custom_id":"r"}'
    assert one.job_id == row(same, lane="interactive").job_id == job_id(one.content)
    body = {"model": "m", "messages": MESSAGES}
    others = [row(line("s", {**body, "n": 1})), row(line("r", body)), row(line("r", {**body, "n": 1}), batch="c")]
    assert len({one.job_id, one.again().job_id, *(each.job_id for each in others)}) == 5


def test_what_is_done_is_not_built() -> None:
    """A batch that goes on skips its first million rows quickly."""
    assert Reader("b").read(line(body={"model": "m", "messages": "anything"}), 1, lambda *_: "done") is None


@pytest.mark.parametrize(
    "given_row", [{"custom_id": "r", "body": {"model": "m", "messages": [{1j: 2}]}}, {"body": float("nan")}]
)
def test_an_object_that_is_no_json_is_refused(given_row: Any) -> None:
    """NaN would be written as null, and a row of a program may hold anything."""
    found = Reader("b").read_object(given_row, 1)
    assert isinstance(found, Answer)
    assert (found.error or {})["code"] == "invalid_json_line"


def test_an_object_is_the_row_of_its_line() -> None:
    """As text, as bytes or as what it holds."""
    body = {"custom_id": "r", "body": {"model": "m", "messages": MESSAGES}}
    found = [Reader("b").read_object(each, 1) for each in (body, json.dumps(body), json.dumps(body).encode())]
    assert found[0] == found[1] == found[2]


def answer(status: str, **fields: Any) -> dict[str, Any]:
    made = Answer(custom_id="r", job_id="j", number=1, status=status, **fields).line()
    assert set(made) == {"id", "custom_id", "response", "error"}
    assert msgspec.json.decode(msgspec.json.encode(made)) == made
    return made


def test_an_answer_is_a_response_with_status_200() -> None:
    """`incomplete` too: the finish reason in the body says so."""
    body = {"object": "chat.completion"}
    for status in ("completed", "incomplete"):
        assert answer(status, completion=body) == {
            "id": "batch_req_j", "custom_id": "r", "error": None,
            "response": {"status_code": 200, "request_id": "j", "body": body},
        }  # fmt: skip


@pytest.mark.parametrize(("status", "kind"), [(404, "invalid_request_error"), (503, "server_error")])
def test_what_an_upstream_refused_has_its_status_and_an_error_body(status: int, kind: str) -> None:
    """As OpenAI's error file has it."""
    made = answer("failed", error={"code": "c", "message": "m", "status": status})
    assert made["error"] is None
    assert made["response"] == {
        "status_code": status, "request_id": "j",
        "body": {"error": {"code": "c", "message": "m", "type": kind, "param": None}},
    }  # fmt: skip


def test_every_other_end_is_an_error() -> None:
    """A failure without a status, a cancelled row, a refused line, even one that gave no reason."""
    assert answer("failed", error={"code": "c", "message": "m"})["error"] == {"code": "c", "message": "m"}
    assert answer("failed")["error"] == {"code": "unknown", "message": "no reason was given"}
    assert answer("refused", error={"code": "c", "message": "m"})["id"] == "batch_line_j"


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, (1 << 64) - 1)), max_size=2000))
def test_a_ledger_is_a_dictionary(notes: list[tuple[int, int]]) -> None:
    """Names that share slots, growth, and values of 64 bits."""
    ledger, model = Ledger(), {}
    for number, value in notes:
        name = number << 10 | 1  # the low bits choose the slot: all of them collide
        ledger.put(name, value)
        model[name] = value
    assert {name: ledger.get(name) for name in model} == model
    assert len(ledger) == len(model)
    assert ledger.get(2) == 0


def test_a_fingerprint_is_never_nothing() -> None:
    """0 marks an empty slot."""
    assert len({fingerprint(str(n)) for n in range(10_000)}) == 10_000
    assert fingerprint("\ud800")


@pytest.mark.parametrize("given", [5, None, [1], {"custom_id": "\ud800", "body": {}}])
def test_what_a_program_gives_instead_of_a_row_becomes_an_error_line(given: Any) -> None:
    """One bad row does not end the batch, and its line can be written."""
    found = Reader("b").read_object(given, 3)
    assert isinstance(found, Answer)
    line = json.loads(msgspec.json.encode(found.line()))
    assert (line["custom_id"], line["error"]["code"], line["error"]["line"]) == (None, "invalid_json_line", 3)
