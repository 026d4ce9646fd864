"""Events: what a job's log holds, their JSON on the channel, and the packs they rest in.

On the channel an event is one JSON object, `{"v":1,"seq":7,"attempt":1,"type":"chunk","at":1732264000.123,...}`.
In the log, events rest in packs (docs/wire.md): a pack is a stream entry with the id `LASTSEQ-0` and the fields
`a` (attempt), `t` (server time, milliseconds) and `e`, a JSON array with one element per event:

    "text"              a chunk of choice 0 holding that content, one upstream chunk
    [index, n, "text"]  a chunk holding content
    {"type": ..., ...}  any other event, without seq, attempt and at

Readers ignore fields they do not know and skip types they do not know: that is how the format grows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import msgspec
from msgspec import Struct

VERSION: Final = 1
TERMINAL_STATUSES: Final = frozenset({"completed", "incomplete", "failed", "cancelled"})


class Event(Struct, frozen=True, kw_only=True, tag_field="type"):
    """What all events have: `seq` counts 1, 2, 3 ... without gaps; `at` is the server's clock, Unix seconds."""

    seq: int
    attempt: int
    at: float
    v: int = VERSION

    terminal: ClassVar[bool] = False

    @property
    def type(self) -> str:
        """The event's type as written on the channel."""
        return str(self.__struct_config__.tag)


class Started(Event, frozen=True, kw_only=True, tag="started"):
    """An attempt begins. From attempt 2 on, `reason` says why, and all earlier text is void.

    `mark` is random: it tells the attempt from another that got its number after Redis lost the first.
    """

    worker: str = ""
    model: str = ""
    upstream: str = ""
    reason: str | None = None
    mark: str | None = None


class Chunk(Event, frozen=True, kw_only=True, tag="chunk"):
    """A piece of choice `index`; `n` upstream chunks were merged into it; 0 for `logprobs`, whose content came before.

    `delta` holds one thing the upstream sent: `content`, `reasoning`, `refusal` (text), `tool_calls` (a list), or
    another that docs/wire.md names.
    """

    delta: dict[str, Any]
    index: int = 0
    n: int = 1

    @property
    def content(self) -> str:
        """The text of this piece, empty when it carries something else."""
        text = self.delta.get("content")
        return text if isinstance(text, str) else ""


class Retrying(Event, frozen=True, kw_only=True, tag="retrying"):
    """The worker waits `delay` seconds and asks the upstream again; voids nothing."""

    error: dict[str, Any] = msgspec.field(default_factory=dict)
    delay: float = 0.0


class Resumed(Event, frozen=True, kw_only=True, tag="resumed"):
    """The answer goes on from its partial text inside the same attempt: a seam, nothing void."""


class Terminal(Event, frozen=True, kw_only=True):
    """The last event of a log. `finish_reasons` by choice; `usage` in tokens, `estimated` where it was not measured."""

    finish_reasons: dict[int, str] = msgspec.field(default_factory=dict)
    usage: dict[str, Any] | None = None

    terminal: ClassVar[bool] = True


class Completed(Terminal, frozen=True, kw_only=True, tag="completed"):
    """The upstream itself said that the answer is complete."""


class Incomplete(Terminal, frozen=True, kw_only=True, tag="incomplete"):
    """The upstream stopped early and said why: `length` or `content_filter`."""


class Failed(Terminal, frozen=True, kw_only=True, tag="failed"):
    """No answer; `error` has `code` (one word) and `message`."""

    error: dict[str, Any] = msgspec.field(default_factory=dict)


class Cancelled(Terminal, frozen=True, kw_only=True, tag="cancelled"):
    """Somebody cancelled the job; the text so far stays readable."""


class Unknown(Struct, frozen=True, kw_only=True):
    """An event of a type this version does not know: it has a place in the order and is shown to nobody."""

    seq: int
    attempt: int
    at: float
    type: str

    terminal: ClassVar[bool] = False


KNOWN = Started | Chunk | Retrying | Resumed | Completed | Incomplete | Failed | Cancelled
AnyEvent = Event | Unknown

_decoder = msgspec.json.Decoder(KNOWN)
_unknown_decoder = msgspec.json.Decoder(Unknown)
_encoder = msgspec.json.Encoder()


def decode(message: bytes | str) -> AnyEvent:
    """Decode one message of the channel. Raises msgspec.ValidationError or DecodeError when it is no event."""
    try:
        event: Event = _decoder.decode(message)
    except msgspec.ValidationError:
        return _as_unknown(_unknown_decoder.decode(message))
    return event


def encode(event: Event) -> bytes:
    """The event as it stands on the channel: one line of JSON, fields that are None left out."""
    fields = msgspec.to_builtins(event)
    return _encoder.encode({name: value for name, value in fields.items() if value is not None})


def _as_unknown(event: Unknown) -> Unknown:
    known = {"started", "chunk", "retrying", "resumed", *TERMINAL_STATUSES}
    if event.type in known:
        raise msgspec.ValidationError(f"event {event.seq} is no valid {event.type!r}")
    return event


# The compact form, as a worker writes it -------------------------------------------------------------------------


def compact_text(text: str, index: int = 0, n: int = 1) -> bytes:
    """The compact form of a chunk that holds content only."""
    if index == 0 and n == 1:
        return _encoder.encode(text)
    return _encoder.encode([index, n, text])


def compact(type_: str, **fields: Any) -> bytes:
    """The compact form of any other event; fields that are None are left out."""
    return _encoder.encode({"type": type_, **{name: value for name, value in fields.items() if value is not None}})


def unpack(entry_id: bytes, fields: Mapping[bytes, bytes]) -> list[AnyEvent]:
    """The events of one pack, in order."""
    last = int(entry_id.partition(b"-")[0])
    attempt, at = int(fields[b"a"]), int(fields[b"t"]) / 1000
    items: Sequence[Any] = msgspec.json.decode(fields[b"e"])
    first = last - len(items) + 1
    return [_expand(item, first + i, attempt, at) for i, item in enumerate(items)]


def _expand(item: Any, seq: int, attempt: int, at: float) -> AnyEvent:
    if isinstance(item, str):
        return Chunk(seq=seq, attempt=attempt, at=at, delta={"content": item})
    if isinstance(item, list):
        index, n, text = item
        return Chunk(seq=seq, attempt=attempt, at=at, index=index, n=n, delta={"content": text})
    whole = {**item, "seq": seq, "attempt": attempt, "at": at}
    try:
        event: Event = msgspec.convert(whole, KNOWN, str_keys=True)
    except msgspec.ValidationError:
        return _as_unknown(msgspec.convert(whole, Unknown))
    return event
