"""The decoder: bytes in any packets to events to parts of an answer, and every odd stream to a typed outcome."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.upstream import Answer, Finish, Part, Piece, UpstreamFailure
from worker.upstream.chunks import DONE, Chunks
from worker.upstream.sse import MAX_EVENT, EventTooLargeError, Named, SseDecoder

Events = list[bytes | Named]

SPLITS, CHUNKS, CUTS = 400, 600, 150
"""Examples that are drawn for the properties below."""


def decode(packets: Iterable[bytes]) -> Events:
    decoder = SseDecoder()
    found: Events = []
    for packet in packets:
        found += decoder.feed(packet)
    return found + decoder.close()


def cut(stream: bytes, at: Sequence[int]) -> list[bytes]:
    places = sorted(place % (len(stream) + 1) for place in at)
    return [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]


def read(*chunks: Any) -> list[Part]:
    reader = Chunks()
    parts: list[Part] = []
    for chunk in chunks:
        parts += reader.parts(chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode())
    return parts


def delta(index: int = 0, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": fields, "finish_reason": finish}]}


# The grammar ---------------------------------------------------------------------------------------------------------

GRAMMAR: list[tuple[bytes, Events]] = [
    (b"data: a\n\n", [b"a"]),
    (b"data:a\n\n", [b"a"]),
    (b"data:  a\n\n", [b" a"]),
    (b"data: a\r\n\r\n", [b"a"]),
    (b"data: a\r\r", [b"a"]),
    (b"data: a\n\rdata: b\r\n\n", [b"a", b"b"]),
    (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
    (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", [b"b"]),
    (b"data: a\ndata: b\n\n", [b"a\nb"]),
    (b"data: a\ndata\ndata:\n\n", [b"a\n\n"]),
    (b"data\n\n", [b""]),
    (b": comment\n\ndata: a\n: another\n\n", [b"a"]),
    (b"id: 7\nretry: 3000\ndata: a\n\n", [b"a"]),
    (b"id: 7\n\nretry: 10\n\n", []),
    (b"event: ping\ndata: {}\n\n", [Named("ping", b"{}")]),
    (b"event: ping\n\ndata: a\n\n", [b"a"]),
    (b"event: message\ndata: a\n\n", [b"a"]),
    (b"event: error\nevent\ndata: a\n\n", [b"a"]),
    (b"datax: no\ndata : no\n data: no\n\n", []),
    (b"data: cut", []),
    (b"data: a\n\ndata: cut\n", [b"a"]),
    (b"\n\n\n\ndata: a\n\n\n\n", [b"a"]),
    ("data: 流れ\u2028\x85\n\n".encode(), ["流れ\u2028\x85".encode()]),
    (b"data: \xff\xfe\x00\n\n", [b"\xff\xfe\x00"]),
]


@pytest.mark.parametrize(("stream", "events"), GRAMMAR, ids=lambda value: repr(value)[:40])
def test_the_grammar_is_the_standards(stream: bytes, events: Events) -> None:
    """Whole, byte by byte and cut at every single place: the same events."""
    assert decode([stream]) == events
    assert decode(stream[i : i + 1] for i in range(len(stream))) == events
    for place in range(len(stream) + 1):
        assert decode(cut(stream, [place])) == events, place


FIELD = st.sampled_from(
    [b"data: ", b"data:", b"data", b"event: ", b"event: error", b"id: ", b"retry: ", b": ", b"", b"x"]
)
VALUE = st.one_of(st.sampled_from([b"", b"{}", b"[DONE]", b"\xef\xbb\xbf", "🌾é".encode()]), st.binary(max_size=6))
END = st.sampled_from([b"\n", b"\r", b"\r\n", b"\n\n", b"\r\n\r\n", b"\r\r", b""])
STREAM = st.one_of(
    st.binary(max_size=60),
    st.lists(st.tuples(FIELD, VALUE, END).map(b"".join), max_size=12).map(b"".join),
)


@settings(max_examples=SPLITS, deadline=None)
@given(st.sampled_from([b"", b"\xef\xbb\xbf"]), STREAM, st.lists(st.integers(0, 10**6), max_size=12))
def test_any_split_of_any_stream_decodes_the_same(bom: bytes, stream: bytes, places: list[int]) -> None:
    """Packets end where they like: inside a CRLF, a character or the BOM."""
    stream = bom + stream
    whole = decode([stream])
    assert decode(cut(stream, places)) == whole
    assert decode(stream[i : i + 1] for i in range(len(stream))) == whole


def reference(stream: bytes) -> Events:
    """The standard's algorithm, step by step over a whole stream, slowly."""
    text = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    events: Events = []
    data: list[bytes] = []
    name = b""
    for line in text.split(b"\n")[:-1]:
        if not line:
            if data:
                whole = b"\n".join(data)
                plain = name in (b"", b"message")
                events.append(whole if plain else Named(name[:64].decode("utf-8", "replace"), whole))
            data, name = [], b""
            continue
        field, colon, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
        assert colon or not value
    return events


@settings(max_examples=SPLITS, deadline=None)
@given(STREAM)
def test_it_decodes_what_the_standards_own_algorithm_does(stream: bytes) -> None:
    """An independent reading of the grammar, line by line, as the oracle."""
    assert decode([stream]) == reference(stream)


# Caps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flood",
    [b"a" * 65536, b"data: " + b"a" * 65530 + b"\n", b"data:\n" * 10000, b"data\n" * 10000, b"data: a\r" * 8000],
    ids=["a line", "lines of data", "empty lines of data", "bare lines of data", "CR"],
)
def test_an_event_without_end_stops_at_the_cap(flood: bytes) -> None:
    """Whatever it is made of, it is refused while it is still small."""
    tracemalloc.start()
    try:
        with pytest.raises(EventTooLargeError):
            decode(itertools.repeat(flood, 3 * MAX_EVENT // len(flood)))
        assert tracemalloc.get_traced_memory()[1] < 64 * 1024 * 1024
    finally:
        tracemalloc.stop()


def test_a_line_in_single_bytes_takes_no_more_than_itself() -> None:
    """A packet a byte must not cost an object a byte."""
    decoder = SseDecoder()
    tracemalloc.start()
    try:
        for _ in range(100_000):
            decoder.feed(b"a")
        assert tracemalloc.get_traced_memory()[1] < 512 * 1024
    finally:
        tracemalloc.stop()


def test_comments_without_end_take_nothing() -> None:
    """They are no event, so nothing of them is kept."""
    decoder = SseDecoder()
    tracemalloc.start()
    try:
        for _ in range(100):
            assert decoder.feed(b": keep-alive\n\n" * 1000) == []
        assert tracemalloc.get_traced_memory()[1] < 2 * 1024 * 1024
    finally:
        tracemalloc.stop()


# Chunks of any shape -------------------------------------------------------------------------------------------------


def test_every_part_of_a_chunk_is_carried_with_its_index() -> None:
    """Content, reasoning under both names, refusals, tool calls in both forms, and several choices in one chunk."""
    calls = [{"index": 0, "function": {"arguments": "{}"}}]
    assert read(delta(2, content="a")) == [Piece(2, "a")]
    assert read(delta(reasoning="r"), delta(reasoning_content="c")) == [
        Piece(0, delta={"reasoning": "r"}), Piece(0, delta={"reasoning": "c"}),
    ]  # fmt: skip
    assert read(delta(refusal="no")) == [Piece(0, delta={"refusal": "no"})]
    assert read(delta(1, tool_calls=calls)) == [Piece(1, delta={"tool_calls": calls})]
    assert read(delta(function_call={"name": "f"})) == [Piece(0, delta={"function_call": {"name": "f"}})]
    both = {"choices": [delta(0, content="a")["choices"][0], delta(1, "stop", content="b")["choices"][0]]}
    assert read(both) == [Piece(0, "a"), Piece(1, "b"), Finish(1, "stop")]
    everything = delta(finish="stop", content="a", reasoning="r", refusal="n", tool_calls=calls)
    assert [type(part) for part in read(everything)] == [Piece, Piece, Piece, Piece, Finish]


NOTHING: list[Any] = [
    {}, {"choices": []}, {"choices": None}, delta(), delta(content=None), delta(content=""), delta(role="assistant"),
    {"choices": [{"index": 0, "delta": None, "finish_reason": None}]}, {"choices": [{"index": 0}]}, {"choices": [{}]},
    {"choices": [], "usage": None}, {"choices": [], "usage": 3}, b'{"usage":' + b"9" * 10_000 + b"}",
    {"error": None}, {"error": {}}, {"error": ""}, delta(finish=""),
    {"choices": [], "prompt_filter_results": [{}]}, delta(reasoning_details=[], annotations=[], audio={}),
]  # fmt: skip


@pytest.mark.parametrize("chunk", NOTHING, ids=lambda chunk: str(chunk)[:60])
def test_a_chunk_with_nothing_in_it_is_nothing(chunk: Any) -> None:
    """Role chunks, Azure's first and last ones, empty finish reasons: no part, no error."""
    assert read(chunk) == []


MALFORMED: list[Any] = [
    b"{", b"<html>", b"nothing", b"", b"[]", b"3", b'"text"', b"null", b"\xff\xfe", b"[" * 100_000,
    b'{"choices":' + b"[" * 100_000, {"choices": {}}, {"choices": [3]}, {"choices": [None]}, {"choices": "x"},
    delta(content=5), delta(content=[{"type": "text", "text": "a"}]), delta(content={}), delta(tool_calls={}),
    delta(tool_calls=["x"]), {"choices": [{"index": "0", "delta": {}}]}, {"choices": [{"index": -1, "delta": {}}]},
    {"choices": [{"index": 128, "delta": {}}]}, {"choices": [{"index": 10**30, "delta": {}}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": 3}]}, {"choices": [{"index": 0, "delta": []}]},
    {"choices": [{"message": {"content": 5}}]}, {"choices": [{"message": "text"}]},
]  # fmt: skip


@pytest.mark.parametrize("chunk", MALFORMED, ids=lambda chunk: str(chunk)[:50])
def test_what_is_no_chunk_is_a_typed_failure(chunk: Any) -> None:
    """`malformed_stream`, worth another try, whatever was sent instead."""
    with pytest.raises(UpstreamFailure) as caught:
        read(chunk)
    assert (caught.value.code, caught.value.retryable) == ("malformed_stream", True)
    assert len(str(caught.value)) < 300


WORDS = [
    "choices", "delta", "index", "content", "finish_reason", "error", "usage", "tool_calls", "function", "arguments",
    "reasoning", "message", "code",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=CHUNKS, deadline=None)
@given(st.one_of(JSON.map(lambda value: json.dumps(value).encode()), st.binary(max_size=40)))
def test_any_data_gives_parts_or_a_typed_failure(data: bytes) -> None:
    """And what it gives can be written as JSON again."""
    try:
        said = [msgspec.json.encode(part) for part in read(data)]
    except UpstreamFailure as failure:
        said = [msgspec.json.encode([failure.code, failure.error])]
    assert all(said)


# Characters ----------------------------------------------------------------------------------------------------------


def text_of(*chunks: Any) -> str:
    return "".join(part.text for part in read(*chunks) if isinstance(part, Piece))


def escaped(*texts: str) -> list[bytes]:
    """Chunks with their texts as ASCII escapes, so that a text may be half a character."""
    return [json.dumps(delta(content=text)).encode() for text in texts]


def test_half_characters_in_two_chunks_are_joined() -> None:
    """An emoji's escapes cut after the first one: the pair is one character, in the second chunk."""
    assert text_of(*escaped("mill \ud83c", "\udf3e!")) == "mill 🌾!"
    assert text_of(*escaped("\ud83c", "\udf3e\ud83c", "\udf3e")) == "🌾🌾"
    calls = [delta(tool_calls=[{"index": 0, "function": {"arguments": half}}]) for half in ("\ud83c", "\udf3e")]
    [piece] = [part for part in read(*calls) if isinstance(part, Piece) and "🌾" in str(part.delta)]
    assert piece.delta == {"tool_calls": [{"index": 0, "function": {"arguments": "🌾"}}]}


def test_half_characters_that_stay_alone_are_replaced() -> None:
    """A half whose other half does not come is U+FFFD where it stood, also at the end of a choice."""
    assert text_of(*escaped("a\ud83c", "b")) == "a\ufffdb"
    assert text_of(*escaped("a\udf3eb")) == "a\ufffdb"
    assert text_of(*escaped("a\ud83c"), delta(finish="stop")) == "a\ufffd"
    assert text_of(*escaped("a\ud83c"), delta(1, content="x"), *escaped("\udf3e")) == "ax🌾"


def test_bad_bytes_are_replaced() -> None:
    """A byte that is no UTF-8 does not end the answer."""
    assert text_of(b'{"choices":[{"index":0,"delta":{"content":"a\xffb"}}]}') == "a\ufffdb"


def test_nul_and_controls_are_carried_as_they_are() -> None:
    """What they do on a screen is the screen's matter."""
    assert text_of(delta(content="\x00\x1b[2J\u202e")) == "\x00\x1b[2J\u202e"


@settings(max_examples=CUTS, deadline=None)
@given(st.text(alphabet=st.characters(categories=["Lu", "So", "Cs"]), max_size=12), st.data())
def test_any_cut_of_a_text_in_escapes_reads_the_same(text: str, data: st.DataObject) -> None:
    """Cut between any two UTF-16 units, into as many chunks as you like."""
    units = [text.encode("utf-16-le", "surrogatepass")[i : i + 2] for i in range(0, 2 * _units(text), 2)]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(units)), max_size=5)))
    pieces = [
        b"".join(units[a:b]).decode("utf-16-le", "surrogatepass")
        for a, b in zip([0, *cuts], [*cuts, len(units)], strict=True)
    ]
    expected = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert text_of(*escaped(*filter(None, pieces)), delta(finish="stop")) == expected


def _units(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


# Errors inside -------------------------------------------------------------------------------------------------------

ERRORS: list[tuple[Any, str, str, bool]] = [
    ({"error": {"message": "Overloaded.", "type": "server_error", "code": None}}, "server_error", "Overloaded.", True),
    ({"error": {"code": 502, "message": "Provider down"}}, "upstream_error", "Provider down", True),
    ({"error": {"code": "429", "message": "Slow"}}, "upstream_error", "Slow", True),
    ({"error": {"code": 400, "message": "Too long"}}, "upstream_error", "Too long", False),
    ({"error": {"code": "insufficient_quota", "message": "Pay"}}, "insufficient_quota", "Pay", False),
    ({"error": "it broke"}, "upstream_error", "it broke", True),
    ({"error": 3}, "upstream_error", "the upstream reported an error without a message", True),
    ({"error": {"message": {"deep": 1}, "code": "\x1b[31mred"}}, "_31mred", '{"deep": 1}', True),
    ({"error": {"message": "a\ud83cb\x1b[0m\u202e", "code": "9" * 5000}}, "upstream_error", "a b [0m", True),
]  # fmt: skip


@pytest.mark.parametrize(("chunk", "code", "message", "retryable"), ERRORS, ids=lambda value: str(value)[:40])
def test_an_error_in_the_stream_keeps_its_words(chunk: Any, code: str, message: str, retryable: bool) -> None:
    """Objects, strings and numbers; nothing in them can move a cursor or break the log."""
    with pytest.raises(UpstreamFailure) as caught:
        read(chunk)
    assert (caught.value.code, caught.value.message, caught.value.retryable) == (code, message, retryable)


def test_a_named_event_is_an_error_a_chunk_or_nothing() -> None:
    """`event: error` without an error key, pings, and servers that name their chunks."""
    reader = Chunks()
    assert list(reader.named("ping", b"{}")) == []
    assert list(reader.named("chunk", json.dumps(delta(content="a")).encode())) == [Piece(0, "a")]
    for name, data in (("error", b'{"message":"m","code":"c"}'), ("oops", b'{"error":{"message":"m","code":"c"}}')):
        with pytest.raises(UpstreamFailure, match="c: m"):
            list(reader.named(name, data))
    with pytest.raises(UpstreamFailure, match="it broke"):
        list(reader.named("error", b"it broke"))


# Whole or not --------------------------------------------------------------------------------------------------------


def verdict(reasons: dict[int, str], *, choices: int = 1, done: bool = True, **settings: Any) -> str:
    answer = Answer(choices=choices, **settings)
    for index, reason in reasons.items():
        answer.take(Finish(index, reason))
    try:
        return answer.verdict(done=done).status
    except UpstreamFailure as failure:
        return failure.code


def test_completed_needs_an_allowed_finish_reason_of_every_choice() -> None:
    """`[DONE]` is neither needed nor enough; one that is missing or odd makes all of it a failure."""
    for reason in ("stop", "tool_calls", "function_call"):
        assert verdict({0: reason}) == verdict({0: reason}, done=False) == "completed"
    assert verdict({}) == verdict({}, done=False) == "stream_truncated"
    assert verdict({0: "stop", 2: "stop"}, choices=3) == "stream_truncated"
    assert verdict({0: "stop", 1: "stop", 2: "tool_calls"}, choices=3) == "completed"
    for reason in ("abort", "error", "STOP", "eos", "cancelled"):
        assert verdict({0: reason}) == "upstream_aborted"
        assert verdict({0: "stop", 1: reason}, choices=2) == "upstream_aborted"


def test_content_after_the_finish_reason_needs_an_end_of_its_own() -> None:
    """Who goes on after its end has not ended: only `[DONE]` or a further finish reason says so."""
    answer = Answer()
    for part in (Piece(0, "a"), Finish(0, "stop"), Piece(0, "b")):
        answer.take(part)
    assert answer.finished is False
    with pytest.raises(UpstreamFailure, match="stream_truncated"):
        answer.verdict(done=False)
    assert answer.verdict(done=True).status == "completed"
    answer.take(Finish(0, "length"))
    assert answer.verdict(done=False).status == "incomplete"


def test_a_message_is_an_answer_unless_it_repeats_one() -> None:
    """Servers that do not stream send one; others sum up with it what they have streamed."""
    message = {"index": 1, "message": {"content": "a", "reasoning": "r"}, "finish_reason": "stop"}
    whole = {"choices": [message, {**message, "index": 2}]}
    assert [part.index for part in read(whole) if isinstance(part, Piece)] == [1, 1, 2, 2]
    assert read(delta(content="a"), {"choices": [message]}) == [Piece(0, "a"), Finish(1, "stop")]
    begun = {"choices": [{"message": {"content": "a"}}]}
    assert read(delta(role="assistant", content=""), begun) == [Piece(0, "a")]
    assert read(b'{"choices":[{"message":{"content":"a\\ud83c"}}]}') == [Piece(0, "a\ufffd")]


def test_length_and_content_filter_are_incomplete() -> None:
    """Of any choice."""
    for reason in ("length", "content_filter"):
        assert verdict({0: reason}) == verdict({0: "stop", 1: reason}, choices=2) == "incomplete"


def test_an_upstreams_settings_may_say_what_its_end_is() -> None:
    """A further finish reason; `[DONE]` alone, which then counts as `stop`. A closed connection never."""
    assert verdict({0: "eos"}, allowed=frozenset({"eos"})) == "completed"
    assert verdict({}, done_is_enough=True) == "completed"
    assert verdict({}, done=False, done_is_enough=True) == "stream_truncated"
    assert verdict({0: "length"}, done_is_enough=True) == "incomplete"
    assert verdict({0: "abort"}, done_is_enough=True) == "upstream_aborted"
    assert Answer(done_is_enough=True).verdict(done=True).finish_reasons == {0: "stop"}


def test_done_is_the_word_itself() -> None:
    """`[DONE]` as OpenAI writes it."""
    assert DONE == b"[DONE]"


def test_how_much_was_tried(say: Callable[[str], None]) -> None:
    """For the reader of the run."""
    cuts = sum(len(stream) + 1 for stream, _ in GRAMMAR)
    say(
        f"decoder: {len(GRAMMAR)} streams cut at {cuts} places, {2 * SPLITS} random streams, {CHUNKS} random data, "
        f"{CUTS} texts cut within characters, {len(NOTHING) + len(MALFORMED) + len(ERRORS)} odd chunks"
    )
