"""The job spec: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream import SpecError
from millstream.job import MAX_MESSAGES, MAX_SPEC_BYTES, build, check_id, complete, new_id, parse

USER = {"role": "user", "content": "Hi"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


def spec(*prompt: str, **asked: Any) -> bytes:
    return build(*prompt, **{"model": "m", **asked}).encode()


def nested(depth: int) -> Any:
    inner: Any = 1
    for _ in range(depth):
        inner = [inner]
    return inner


def cyclic() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


def test_a_prompt_is_one_user_message() -> None:
    """`build("Hi")` and `build(messages=[...])` are the same job."""
    assert spec("Hi") == spec(messages=[USER])


@given(
    content=TEXT.filter(str.strip),
    schema=JSON,
    temperature=st.floats(0, 2),
    pairs=st.dictionaries(TEXT, TEXT, max_size=3),
)
def test_a_spec_survives_redis(content: str, schema: Any, temperature: float, pairs: dict[str, str]) -> None:
    """What is built, encoded and parsed again is the same spec, and encodes to the same bytes."""
    metadata = {name[:64]: text[:512] for name, text in pairs.items() if name}
    built = build(content, model="m", temperature=temperature, response_format=schema, metadata=metadata)
    body = built.encode()
    assert parse(body) == built
    assert parse(body).encode() == body


def test_the_same_spec_is_the_same_bytes() -> None:
    """The order in which a caller names things makes no other job."""
    one = spec("Hi", temperature=0.2, top_p=1, metadata={"a": "1", "b": "2"})
    other = spec("Hi", metadata={"b": "2", "a": "1"}, top_p=1, temperature=0.2)
    assert one == other


@pytest.mark.parametrize("content", ["x", "\0", "x\u2028", "👩‍👩‍👧", "{}", "</script>", "x" * 1_000_000])
def test_any_text_is_a_prompt(content: str) -> None:
    """From one byte to a megabyte, whatever the characters."""
    assert parse(spec(content)).messages == [{"role": "user", "content": content}]


GOOD_MESSAGES: list[list[dict[str, Any]]] = [
    [{"role": "system", "content": "Be brief"}, USER],
    [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, {"role": "tool", "content": "42"}],
    [{**USER, "name": "Ann"}],
    [USER] * MAX_MESSAGES,
]


@pytest.mark.parametrize("messages", GOOD_MESSAGES, ids=["system", "parts", "tools", "name", "most"])
def test_what_the_api_takes_is_taken(messages: list[dict[str, Any]]) -> None:
    """Messages as the OpenAI API documents them."""
    assert parse(spec(messages=messages)).messages == messages


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "nothing": (spec, "prompt or messages"),
    "both": (lambda: spec("Hi", messages=[USER]), "not both"),
    "empty": (lambda: spec(""), "prompt is empty"),
    "blank": (lambda: spec(" \n"), "prompt is empty"),
    "no text": (lambda: spec(3), "prompt is empty"),  # type: ignore[arg-type]
    "no messages": (lambda: spec(messages=[]), "messages: found 0"),
    "100,000 messages": (lambda: spec(messages=[USER] * 100_000), "messages: found 100,000"),
    "messages text": (lambda: spec(messages="Hi"), "messages: expected a list"),
    "messages dict": (lambda: spec(messages=USER), "messages: expected a list"),
    "messages number": (lambda: spec(messages=3), "messages: expected a list"),
    "message text": (lambda: spec(messages=["Hi"]), "messages: found str"),
    "no role": (lambda: spec(messages=[{"content": "Hi"}]), "messages[0].role"),
    "odd role": (lambda: spec(messages=[USER, {"role": "root", "content": "Hi"}]), "messages[1].role"),
    "role list": (lambda: spec(messages=[{"role": ["user"], "content": "Hi"}]), "messages[0].role"),
    "no content": (lambda: spec(messages=[{"role": "user"}]), "messages[0].content"),
    "content number": (lambda: spec(messages=[{"role": "user", "content": 3}]), "messages[0].content"),
    "all empty": (lambda: spec(messages=[{"role": "user", "content": ""}]), "prompt is empty"),
    "64 MB": (lambda: spec("x" * 64_000_000), f"at most {MAX_SPEC_BYTES:,}"),
    "no model": (lambda: build("Hi"), "model"),
    "empty model": (lambda: spec("Hi", model=""), "model"),
    "model list": (lambda: spec("Hi", model=["m"]), "model"),
    "model CRLF": (lambda: spec("Hi", model="m\r\nX-Key: 1"), "model"),
    "model long": (lambda: spec("Hi", model="m" * 257), "model"),
    "model surrogate": (lambda: spec("Hi", model="\ud800"), "model"),
    "lane": (lambda: spec("Hi", lane="express"), "lane"),
    "on_break": (lambda: spec("Hi", on_break="explode"), "on_break"),
    "timeout 0": (lambda: spec("Hi", timeout=0), "timeout"),
    "timeout NaN": (lambda: spec("Hi", timeout=math.nan), "timeout"),
    "timeout text": (lambda: spec("Hi", timeout="5"), "timeout"),
    "timeout True": (lambda: spec("Hi", timeout=True), "timeout"),
    "timeout huge": (lambda: spec("Hi", timeout=10**400), "timeout"),
    "timeout inf": (lambda: spec("Hi", timeout=math.inf), "timeout"),
    "expires -1": (lambda: spec("Hi", expires=-1), "expires"),
    "retention 0": (lambda: spec("Hi", retention=0), "retention"),
    "attempts 0": (lambda: spec("Hi", max_attempts=0), "max_attempts"),
    "attempts 1.5": (lambda: spec("Hi", max_attempts=1.5), "max_attempts"),
    "attempts 101": (lambda: spec("Hi", max_attempts=101), "max_attempts"),
    "metadata list": (lambda: spec("Hi", metadata=["a"]), "metadata"),
    "metadata number": (lambda: spec("Hi", metadata={"a": 1}), "metadata 'a'"),
    "metadata 17": (lambda: spec("Hi", metadata={str(i): "" for i in range(17)}), "metadata"),
    "metadata long": (lambda: spec("Hi", metadata={"a": "x" * 513}), "metadata 'a'"),
    "metadata no name": (lambda: spec("Hi", metadata={"": "x"}), "metadata ''"),
    "metadata surrogate": (lambda: spec("Hi", metadata={"a": "\ud800"}), "surrogate"),
    "surrogate": (lambda: spec("\ud83d"), "surrogate"),
    "surrogate key": (lambda: spec("Hi", tools=[{"\ud83d": 1}]), "surrogate"),
    "NaN": (lambda: spec("Hi", temperature=math.nan), "temperature"),
    "NaN in a parameter": (lambda: spec("Hi", logit_bias={"50256": math.nan}), "nan"),
    "infinity in a parameter": (lambda: spec("Hi", tools=[{"a": [1, {"b": -math.inf}]}]), "inf"),
    "NaN in a message": (lambda: spec(messages=[{"role": "user", "content": [{"type": "x", "v": math.nan}]}]), "nan"),
    "bytes": (lambda: spec("Hi", stop=b"\xff"), "bytes"),
    "a set": (lambda: spec("Hi", stop={"a"}), "set"),
    "an object": (lambda: spec("Hi", tools=[object()]), "object"),
    "a number as a name": (lambda: spec("Hi", tools=[{1.5: 1}]), "float"),
    "a huge number": (lambda: spec("Hi", options=10**5000), "number"),
    "deep": (lambda: spec("Hi", tools=nested(100_000)), "nested too deeply"),
    "a ring": (lambda: spec("Hi", tools=cyclic()), "nested too deeply"),
    "base_url": (lambda: spec("Hi", base_url="http://169.254.169.254"), "worker's own settings"),
    "api_base": (lambda: spec("Hi", api_base="http://169.254.169.254"), "worker's own settings"),
    "api_key": (lambda: spec("Hi", api_key="sk-secret"), "worker's own settings"),
    "extra_headers": (lambda: spec("Hi", extra_headers={"Authorization": "x"}), "extra_headers"),
    "extra_body": (lambda: spec("Hi", extra_body={"a": 1}), "give its fields as parameters"),
    "stream": (lambda: spec("Hi", stream=True), "always streams"),
    "stream_options": (lambda: spec("Hi", stream_options={}), "always streams"),
    "params": (lambda: spec("Hi", params={"api_key": "x"}), "params"),
    "v": (lambda: spec("Hi", v=2), "v"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_job_is_refused_before_anything_is_written(case: str) -> None:
    """Whatever is wrong is a SpecError of one short line that names it, and never shows a secret."""
    make, words = BAD[case]
    with pytest.raises(SpecError) as caught:
        make()
    message = str(caught.value)
    assert words.lower() in message.lower()
    assert "\n" not in message
    assert len(message) < 400
    assert "sk-secret" not in message


def foreign(**fields: str) -> bytes:
    parts = {"messages": '[{"role":"user","content":"Hi"}]', "model": '"m"', **fields}
    return ("{" + ",".join(f'"{name}":{text}' for name, text in parts.items()) + "}").encode()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"{}", b"\xff\xfe", b'{"model":"m"}', foreign(model="3"), foreign(messages='"Hi"'),
        foreign(messages="[[1]]"), foreign(base_url='"http://x"'), foreign(webhooks='["http://x"]'), foreign(v="2"),
        foreign(params='{"api_key":"x"}'), foreign(params='{"temperature":NaN}'), foreign(params='{"options":1e999}'),
        foreign(params='{"tools":' + "[" * 100_000 + "]" * 100_000 + "}"), foreign(lane='"express"'),
        foreign(timeout="1e9"), foreign(max_attempts="1.5"), foreign(metadata='{"a":1}'),
        foreign(model='"m\\ud800"'), b" " * (MAX_SPEC_BYTES + 1),
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)  # fmt: skip
def test_a_hostile_spec_in_redis_is_refused(body: bytes) -> None:
    """A worker checks what it finds: whoever can write to Redis can name no address, no callback and crash nothing."""
    with pytest.raises(SpecError):
        parse(body)


@pytest.mark.parametrize(
    "job_id",
    [
        "",
        "../x",
        "*",
        "a:b",
        "{}",
        "a\r\nb",
        "a\n",
        "x" * 65,
        "x" * 10_240,
        "é",
        "٣",
        "a b",
        "a\0b",
        "{a}",
        None,
        7,
        b"a",
    ],
)
def test_an_id_that_could_name_something_else_is_refused(job_id: Any) -> None:
    """1 to 64 of A-Z a-z 0-9 _ - and nothing else, since an id becomes part of key and channel names."""
    with pytest.raises(SpecError, match="job id"):
        check_id(job_id)


@pytest.mark.parametrize("job_id", ["a", "-", "A-Z_09", "x" * 64])
def test_a_good_id_is_taken_as_it_is(job_id: str) -> None:
    """Ids are compared as they are given."""
    assert check_id(job_id) == job_id


def test_a_fresh_id_has_128_random_bits() -> None:
    """Whoever knows an id can read the job."""
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(check_id(each) and len(bytes.fromhex(each)) == 16 for each in ids)


def test_a_stock_worker_says_what_is_needed() -> None:
    """RQ's own worker fails the delivery with words that name the remedy; the job itself is not lost."""
    with pytest.raises(RuntimeError, match="millstream-worker"):
        complete("a1")
