"""From the data of an event to pieces of an answer, and from pieces to a verdict on whether it is whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.upstream import Answer, Finish, Logprobs, Piece, UpstreamFailure, Usage
from worker.upstream.chunks import Chunks, Part


def chunk(*choices: Any, **fields: Any) -> bytes:
    return json.dumps({"id": "x", "object": "chat.completion.chunk", "choices": list(choices), **fields}).encode()


def choice(index: int = 0, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish}


def read(data: bytes) -> list[Part]:
    return list(Chunks().parts(data))


CARRIED: dict[str, tuple[bytes, list[Part]]] = {
    "content": (chunk(choice(content="Hi")), [Piece(0, "Hi")]),
    "a role alone": (chunk(choice(role="assistant", content="")), []),
    "another choice": (chunk(choice(2, content="Hi")), [Piece(2, "Hi")]),
    "two choices": (chunk(choice(0, content="a"), choice(1, content="b")), [Piece(0, "a"), Piece(1, "b")]),
    "reasoning": (chunk(choice(reasoning="Hm")), [Piece(0, delta={"reasoning": "Hm"})]),
    "reasoning_content": (chunk(choice(reasoning_content="Hm")), [Piece(0, delta={"reasoning": "Hm"})]),
    "refusal": (chunk(choice(refusal="No")), [Piece(0, delta={"refusal": "No"})]),
    "tool calls": (chunk(choice(tool_calls=[{"index": 0}])), [Piece(0, delta={"tool_calls": [{"index": 0}]})]),
    "finish": (chunk(choice(finish="stop")), [Finish(0, "stop")]),
    "content and finish": (chunk(choice(finish="stop", content="!")), [Piece(0, "!"), Finish(0, "stop")]),
    "an empty finish": (chunk(choice(finish="", content="a")), [Piece(0, "a")]),
    "usage": (
        chunk(usage={"prompt_tokens": 1, "completion_tokens": 2}),
        [Usage({"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3})],
    ),
    "usage null": (chunk(choice(content="a"), usage=None), [Piece(0, "a")]),
    "logprobs": (
        chunk({**choice(content="a"), "logprobs": {"content": [{"token": "a"}], "refusal": None}}),
        [Piece(0, "a"), Logprobs(0, {"content": [{"token": "a"}]})],
    ),
    "logprobs alone, with the end": (
        chunk({**choice(finish="stop"), "logprobs": {"refusal": [{"token": "a"}], "content": []}}),
        [Logprobs(0, {"refusal": [{"token": "a"}]}), Finish(0, "stop")],
    ),
    "logprobs with half a character": (
        b'{"choices":[{"delta":{"content":"a"},"logprobs":{"content":[{"token":"\\ud83d"}]}}]}',
        [Piece(0, "a"), Logprobs(0, {"content": [{"token": "\ufffd"}]})],
    ),
    "logprobs of an answer in one piece": (
        b'{"choices":[{"message":{"content":"a"},"logprobs":{"content":[{"token":"a"}]}}]}',
        [Piece(0, "a"), Logprobs(0, {"content": [{"token": "a"}]})],
    ),
    **{
        f"logprobs that are {shown}": (
            b'{"choices":[{"delta":{"content":"a"},"logprobs":' + shown.encode() + b"}]}",
            [Piece(0, "a")],
        )
        for shown in ("null", "{}", "5", '{"content":[]}', '{"content":null}', '{"content":"x"}', '{"tokens":["a"]}')
    },
    "no choices": (chunk(), []),
    "choices null": (b'{"choices":null}', []),
    "delta null": (b'{"choices":[{"index":0,"delta":null}]}', []),
    "no index": (b'{"choices":[{"delta":{"content":"a"}}]}', [Piece(0, "a")]),
    "unknown fields": (b'{"choices":[{"delta":{"content":"a","audio":{}},"logprobs":[1]}],"x":1}', [Piece(0, "a")]),
    "error null": (b'{"choices":[],"error":null}', []),
}


@pytest.mark.parametrize("what", CARRIED)
def test_everything_a_chunk_carries_is_passed_on(what: str) -> None:
    """Content, reasoning under both names, refusals, tool calls, ends and usage, each with its choice."""
    data, expected = CARRIED[what]
    assert read(data) == expected


@pytest.mark.parametrize(
    ("data", "code", "message", "retryable"),
    [
        (b'{"error":{"message":"Busy","type":"server_error","code":null}}', "server_error", "Busy", True),
        (b'{"error":"overloaded"}', "upstream_error", "overloaded", True),
        (b'{"error":{"message":"No","code":"insufficient_quota"}}', "insufficient_quota", "No", False),
        (b'{"error":{"message":"Bad","code":400}}', "upstream_error", "Bad", False),
        (b'{"error":{"message":"Late","code":"529"}}', "upstream_error", "Late", True),
        (b'{"error":{"detail":"x"}}', "upstream_error", "x", True),
        (b'{"error":[]}', "", "", True),
        (b'{"error":[1]}', "upstream_error", "the upstream reported an error without a message", True),
    ],
)
def test_an_error_in_a_chunk_is_a_failure(data: bytes, code: str, message: str, retryable: bool) -> None:
    """An error object or text ends the stream whatever else the chunk says; an empty one is none."""
    if not code:
        assert read(data) == []
        return
    with pytest.raises(UpstreamFailure) as caught:
        read(data)
    assert (caught.value.code, caught.value.message, caught.value.retryable) == (code, message, retryable)


BROKEN = {
    "not JSON": b"{",
    "a number": b"1",
    "a list": b"[]",
    "nested": b"[" * 100_000,
    "nested inside": b'{"choices":' + b"[" * 100_000,
    "content of a wrong type": b'{"choices":[{"delta":{"content":5}}]}',
    "choices of a wrong type": b'{"choices":{"a":1}}',
    "an index out of range": b'{"choices":[{"index":1000000,"delta":{"content":"a"}}]}',
    "a negative index": b'{"choices":[{"index":-1,"delta":{"content":"a"}}]}',
    "tool calls of a wrong type": b'{"choices":[{"delta":{"tool_calls":"x"}}]}',
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_chunk_is_a_malformed_stream(what: str) -> None:
    """A typed failure that may be tried again, never a Python error."""
    with pytest.raises(UpstreamFailure) as caught:
        read(BROKEN[what])
    assert (caught.value.code, caught.value.retryable) == ("malformed_stream", True)


def test_what_no_text_can_hold_becomes_the_replacement_character() -> None:
    """Invalid UTF-8 and lone surrogates are no reason to lose an answer; NUL is a character like any other."""
    assert read(b'{"choices":[{"delta":{"content":"a\xffb"}}]}') == [Piece(0, "a\ufffdb")]
    assert read(b'{"choices":[{"delta":{"content":"a\\ud800b"}}]}') == [Piece(0, "a\ufffdb")]
    assert read(b'{"choices":[{"delta":{"content":"a\\u0000b"}}]}') == [Piece(0, "a\x00b")]
    assert read(b'{"choices":[{"delta":{"content":"\\ud83c\\udf3e"}}]}') == [Piece(0, "🌾")]


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_give_parts_or_a_failure(data: bytes) -> None:
    """Nothing an upstream sends raises anything but UpstreamFailure."""
    try:
        read(data)
    except UpstreamFailure as failure:
        assert failure.code  # noqa: PT017 - both ways out are right


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["choices", "delta", "content", "index", "finish_reason", "error", "usage", "code", "message"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(JSONS)
def test_any_json_gives_parts_or_a_failure(value: Any) -> None:
    """The right names in the wrong places are no harder."""
    try:
        read(json.dumps(value).encode())
    except UpstreamFailure as failure:
        assert failure.code  # noqa: PT017 - both ways out are right


def test_named_events_are_errors_or_nothing() -> None:
    """`event: error` is a failure, in JSON or not; pings and others carry nothing."""
    assert list(Chunks().named("ping", b"{}")) == []
    assert list(Chunks().named("anything", b"\xff")) == []
    for data, message in (
        (b'{"message":"Busy"}', "Busy"),
        (b'{"error":{"message":"Busy"}}', "Busy"),
        (b"Busy", "Busy"),
    ):
        with pytest.raises(UpstreamFailure) as caught:
            list(Chunks().named("error", data))
        assert caught.value.message == message


# Verdicts ------------------------------------------------------------------------------------------------------------


def answer(*said: Part, choices: int = 1, prompt_bytes: int = 0) -> Answer:
    made = Answer(choices=choices, prompt_bytes=prompt_bytes)
    for part in said:
        made.take(part)
    return made


@pytest.mark.parametrize(
    ("reasons", "status"),
    [(("stop",), "completed"), (("tool_calls",), "completed"), (("function_call",), "completed"),
     (("length",), "incomplete"), (("content_filter",), "incomplete"), (("stop", "length"), "incomplete"),
     (("stop", "stop"), "completed")],
)  # fmt: skip
def test_a_whole_answer_is_judged_by_its_finish_reasons(reasons: tuple[str, ...], status: str) -> None:
    """Completed when every choice says it is; incomplete when one was cut short by the upstream's own word."""
    verdict = answer(*(Finish(i, reason) for i, reason in enumerate(reasons)), choices=len(reasons)).verdict(done=True)
    assert verdict.status == status
    assert verdict.finish_reasons == dict(enumerate(reasons))


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_choice_without_its_reason_is_no_answer(missing: int, done: bool) -> None:
    """`[DONE]`, a closed connection or the other choices prove nothing."""
    reasons = [Finish(i, "stop") for i in range(3) if i != missing]
    with pytest.raises(UpstreamFailure) as caught:
        answer(Piece(missing, "text"), *reasons, choices=3).verdict(done=done)
    assert (caught.value.code, caught.value.retryable) == ("stream_truncated", True)
    assert ("[DONE]" in caught.value.message) == done
    assert str(missing) in caught.value.message


@pytest.mark.parametrize("reason", ["abort", "error", "cancelled", "STOP", "unknown"])
def test_a_reason_that_means_no_end_is_no_answer(reason: str) -> None:
    """Servers that were killed say `abort`: never completed."""
    with pytest.raises(UpstreamFailure) as caught:
        answer(Finish(0, reason)).verdict(done=True)
    assert (caught.value.code, caught.value.retryable) == ("upstream_aborted", True)
    assert repr(reason) in caught.value.message


def test_usage_is_the_upstreams_else_an_estimate_that_says_so() -> None:
    """Four bytes of prompt are about a token, a piece is about one; what the upstream counted wins."""
    estimated = answer(Piece(0, "a"), Piece(0, "b"), prompt_bytes=9)
    assert estimated.usage == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "estimated": True}
    estimated.take(Usage({"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}))
    assert estimated.usage == {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}
