"""The decoder of server-sent events: the same events however the bytes are cut, and an end to what has none."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.upstream.sse import EventTooLargeError, Named, SseDecoder

ENDS = st.sampled_from(["\n", "\r", "\r\n"])
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=12)
LINES = st.one_of(
    TEXTS.map(lambda text: f"data: {text}"),
    TEXTS.map(lambda text: f"data:{text}"),
    TEXTS.map(lambda text: f": {text}"),
    st.sampled_from(
        ["data", "", "", "id: 7", "retry: 10", "event: error", "event:ping", "event: message", "datax: no"]
    ),
)


def decode(packets: Sequence[bytes]) -> list[bytes | Named]:
    decoder = SseDecoder()
    return [event for packet in packets for event in decoder.feed(packet)] + decoder.close()


def reference(text: str) -> list[bytes | Named]:
    """The standard's algorithm, one line at a time, on all of the text; the slow way, to compare with."""
    text = text.removeprefix("\ufeff")
    events: list[bytes | Named] = []
    data: list[str] = []
    name = ""
    whole = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for line in whole[:-1]:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line == "":
            if data:
                joined = "\n".join(data).encode()
                events.append(joined if name in ("", "message") else Named(name, joined))
            data, name = [], ""
        elif field == "data":
            data.append(value)
        elif field == "event":
            name = value
    return events


def cut(body: bytes, seed: int) -> list[bytes]:
    """The body in packets of 1 to 9 bytes, the cuts drawn from a seed."""
    draw = random.Random(seed)
    packets = []
    while body:
        size = draw.randint(1, 9)
        packets.append(body[:size])
        body = body[size:]
    return packets


@given(st.lists(st.tuples(LINES, ENDS), max_size=30), st.booleans(), st.integers(0, 2**32))
@example([("data: a", "\r"), ("", "\n"), ("data: b", "\r\n"), ("", "\r")], True, 0)
def test_the_events_do_not_depend_on_the_packets(lines: list[tuple[str, str]], bom: bool, seed: int) -> None:
    """At once, byte by byte or in any pieces: what the standard says, with any ends of lines, and with a BOM."""
    text = "".join(line + end for line, end in lines)
    body = (b"\xef\xbb\xbf" if bom else b"") + text.encode()
    expected = reference(("\ufeff" if bom else "") + text)
    for packets in ([body], [body[i : i + 1] for i in range(len(body))], cut(body, seed)):
        assert decode(packets) == expected


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_every_single_cut_gives_the_same(end: str) -> None:
    """Cut in two at every byte, inside a CRLF and inside a character of four bytes too."""
    body = f"data: 🌾 one{end}data: two{end}{end}event: ping{end}data: {{}}{end}{end}data: three{end}{end}".encode()
    expected = ["🌾 one\ntwo".encode(), Named("ping", b"{}"), b"three"]
    assert decode([body]) == expected
    for at in range(len(body) + 1):
        assert decode([body[:at], body[at:]]) == expected, at


def test_an_event_without_its_empty_line_is_no_event() -> None:
    """A body that ends inside an event drops it, as the standard says: its end may be missing."""
    assert decode([b"data: whole\n\ndata: cut"]) == [b"whole"]
    assert decode([b"data: whole\n\ndata: cut\n"]) == [b"whole"]


def test_a_carriage_return_at_the_end_ends_the_event() -> None:
    """The last CR might have been half of a CRLF; at the end of the body it was an end of its own."""
    decoder = SseDecoder()
    assert decoder.feed(b"data: a\r\r") == []
    assert decoder.close() == [b"a"]


def test_a_byte_order_mark_counts_at_the_start_alone() -> None:
    """One BOM is skipped, a second is text, and a start that only looks like one is kept."""
    assert decode([b"\xef", b"\xbb", b"\xbfdata: a\n\n"]) == [b"a"]
    assert decode([b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n"]) == []
    assert decode([b"\xef", b"\xbbdata: a\n\ndata: b\n\n"]) == [b"b"]


def test_bytes_that_are_no_text_pass_through() -> None:
    """The decoder looks at line ends and field names; what a value means is for whoever reads it."""
    assert decode([b"data: \xff\xfe\x00\n\n"]) == [b"\xff\xfe\x00"]
    assert decode([b"event: \xff\ndata: x\n\n"]) == [Named("\ufffd", b"x")]


@pytest.mark.parametrize("packet", [1, 7, 64, 1000])
def test_a_line_without_end_is_ended_by_a_cap(packet: int) -> None:
    """However it comes, no more than the cap and one packet is held."""
    decoder = SseDecoder(max_event=1000)
    for _ in range(1000 // packet):
        decoder.feed(b"a" * packet)
    with pytest.raises(EventTooLargeError):
        decoder.feed(b"a" * packet)


def test_an_event_of_many_lines_is_ended_by_a_cap() -> None:
    """Lines that are short one by one add up."""
    decoder = SseDecoder(max_event=1000)
    line = b"data: " + b"a" * 60 + b"\n"
    for _ in range(1000 // 60):
        decoder.feed(line)
    with pytest.raises(EventTooLargeError):
        decoder.feed(line)


def test_events_up_to_the_cap_are_whole() -> None:
    """The cap is for one event: many large ones may follow each other."""
    decoder = SseDecoder(max_event=1000)
    for _ in range(10):
        assert decoder.feed(b"data: " + b"a" * 990 + b"\n\n") == [b"a" * 990]
