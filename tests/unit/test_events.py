"""Events: their JSON on the channel, their compact form in the log, and what does not know them."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.events import (
    Cancelled,
    Chunk,
    Completed,
    Event,
    Failed,
    Incomplete,
    Resumed,
    Retrying,
    Started,
    Unknown,
    compact,
    compact_text,
    decode,
    encode,
    unpack,
)

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(
        [
            "",
            "\0",
            '"',
            "\\",
            "\u2028\u2029",
            "👩‍👩‍👧",
            "]",
            "[1,2,",
            '"}',
            "\r\n\n\ndata: x",
            "\x1b[31m",
            "%s%d%",
            "\ufeff",
        ]
    ),
)

EXAMPLES: list[Event] = [
    Started(seq=1, attempt=1, at=1.5, worker="w", model="m", upstream="u"),
    Started(seq=2, attempt=2, at=1.5, worker="w", model="m", upstream="u", reason="worker_lost"),
    Chunk(seq=3, attempt=2, at=1.5, delta={"content": "Hi"}),
    Chunk(seq=4, attempt=2, at=1.5, index=2, n=3, delta={"content": "Hi"}),
    Chunk(seq=5, attempt=2, at=1.5, delta={"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}),
    Retrying(seq=6, attempt=2, at=1.5, error={"code": "rate_limited", "message": "slow down"}, delay=2.5),
    Resumed(seq=7, attempt=2, at=1.5),
    Completed(seq=8, attempt=2, at=1.5, finish_reasons={0: "stop", 1: "tool_calls"}, usage={"total_tokens": 3}),
    Incomplete(seq=9, attempt=2, at=1.5, finish_reasons={0: "length"}),
    Failed(seq=10, attempt=2, at=1.5, error={"code": "x", "message": "y"}),
    Cancelled(seq=11, attempt=2, at=1.5, usage={"total_tokens": 1, "estimated": True}),
]


def packed(*items: bytes, last: int, attempt: int = 1, ms: int = 1500) -> tuple[bytes, dict[bytes, bytes]]:
    return b"%d-0" % last, {b"a": b"%d" % attempt, b"t": b"%d" % ms, b"e": b"[" + b",".join(items) + b"]"}


def compacted(event: Event) -> bytes:
    fields = msgspec.to_builtins(event)
    return compact(fields.pop("type"), **{k: v for k, v in fields.items() if k not in ("seq", "attempt", "at", "v")})


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: f"{event.seq}-{event.type}")
def test_an_event_survives_the_channel(event: Event) -> None:
    """What is encoded for the channel decodes to the same event, on one line, in plain JSON with its version."""
    line = encode(event)
    assert decode(line) == event
    assert b"\n" not in line
    assert json.loads(line)["v"] == 1
    assert json.loads(line)["type"] == event.type
    assert None not in json.loads(line).values(), "fields that are None are left out"


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: f"{event.seq}-{event.type}")
def test_an_event_survives_the_log(event: Event) -> None:
    """The compact form in a pack unpacks to the same event."""
    assert unpack(*packed(compacted(event), last=event.seq, attempt=event.attempt)) == [event]


@given(
    texts=st.lists(st.tuples(TEXTS, st.integers(0, 127), st.integers(1, 99)), min_size=1), before=st.integers(0, 10**9)
)
def test_any_text_survives_a_pack_and_the_channel(texts: list[tuple[str, int, int]], before: int) -> None:
    """Content is carried as it is, NUL, quotes and line separators included; seqs end at the pack's id."""
    items = [compact_text(text, index, n) for text, index, n in texts]
    events = unpack(*packed(*items, last=before + len(items)))
    assert [(e.seq, e.content, e.index, e.n) for e in events if isinstance(e, Chunk)] == [
        (before + 1 + i, *text) for i, text in enumerate(texts)
    ]
    assert [decode(encode(event)) for event in events if isinstance(event, Event)] == events
    assert all(b"\n" not in item for item in items)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 3), st.integers(1, 3))
def test_a_plain_chunk_is_as_short_as_can_be(text: str, index: int, n: int) -> None:
    """Choice 0 with one upstream chunk, the usual case, is a bare JSON string; any other says its index and count."""
    item = json.loads(compact_text(text, index, n))
    assert item == (text if (index, n) == (0, 1) else [index, n, text])


@pytest.mark.parametrize("form", ["channel", "log"])
def test_an_unknown_type_keeps_its_place(form: str) -> None:
    """A type of a later version has a seq and an attempt, and nothing else is asked of it."""
    if form == "channel":
        event = decode(b'{"v":9,"seq":4,"attempt":2,"at":1.5,"type":"heartbeat","what":[1]}')
    else:
        (event,) = unpack(*packed(b'{"type":"heartbeat","what":[1]}', last=4, attempt=2))
    assert event == Unknown(seq=4, attempt=2, at=1.5, type="heartbeat")
    assert not event.terminal


@pytest.mark.parametrize("form", ["channel", "log"])
def test_unknown_fields_are_ignored(form: str) -> None:
    """A known type with a field of a later version is the event without it."""
    if form == "channel":
        event = decode(b'{"v":1,"seq":4,"attempt":2,"at":1.5,"type":"resumed","colour":"red"}')
    else:
        (event,) = unpack(*packed(b'{"type":"resumed","colour":"red"}', last=4, attempt=2))
    assert event == Resumed(seq=4, attempt=2, at=1.5)


@pytest.mark.parametrize(
    "message",
    [
        b"", b"\xff", b"[]", b"1", b"{}", b"nonsense", b'{"type":"chunk"}',
        b'{"seq":"1","attempt":1,"at":1,"type":"other"}',
        b'{"seq":1,"attempt":1,"at":1,"type":"chunk"}',
        b'{"seq":1,"attempt":1,"at":1,"type":"chunk","delta":"text"}',
        b'{"seq":1,"attempt":1,"at":1,"type":"completed","finish_reasons":{"zero":"stop"}}',
    ],
)  # fmt: skip
def test_what_is_no_event_is_refused(message: bytes) -> None:
    """A malformed message, also one of a known type, is an error and never a half-read or unknown event."""
    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
        decode(message)


def test_a_known_type_that_is_malformed_in_the_log_is_refused() -> None:
    """A broken log is not taken for a later version's."""
    with pytest.raises(msgspec.ValidationError):
        unpack(*packed(b'{"type":"chunk","delta":3}', last=1))


@pytest.mark.parametrize(
    ("delta", "content"),
    [({"content": "a"}, "a"), ({"content": None}, ""), ({"content": 3}, ""), ({"reasoning": "a"}, ""), ({}, "")],
)
def test_content_is_text_or_nothing(delta: dict[str, Any], content: str) -> None:
    """`content` is safe to concatenate whatever the upstream sent."""
    assert Chunk(seq=1, attempt=1, at=0, delta=delta).content == content


def test_only_the_four_endings_are_terminal() -> None:
    """`terminal` says that nothing follows."""
    assert {event.type for event in EXAMPLES if event.terminal} == {"completed", "incomplete", "failed", "cancelled"}
