"""Chat completion chunks: from the data of an event to pieces of an answer, tolerant of every dialect met. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from msgspec import UNSET, Struct

from .failures import UpstreamFailure, from_error

DONE: Final = b"[DONE]"
MAX_CHOICE: Final = 127


class _Delta(Struct):
    content: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class _Choice(Struct):
    index: int = 0
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(Struct):
    choices: list[_Choice] | None = None
    usage: dict[str, Any] | None = None
    error: Any = UNSET


_decoder = msgspec.json.Decoder(_Chunk)


class Piece(Struct, frozen=True, gc=False):
    """Something of choice `index`: either its `delta` or, with `text` set, content alone (the usual case)."""

    index: int
    text: str = ""
    delta: dict[str, Any] | None = None


class Finish(Struct, frozen=True, gc=False):
    """Choice `index` ended, in the upstream's own word."""

    index: int
    reason: str


class Usage(Struct, frozen=True, gc=False):
    """The tokens used, as the upstream counted them."""

    usage: dict[str, Any]


Part = Piece | Finish | Usage


def parts(data: bytes) -> Iterator[Part]:
    """What one event's data holds. Raises UpstreamFailure for an error or something that is no chunk."""
    chunk = _decode(data)
    if chunk.error is not UNSET and chunk.error:
        raise from_error(chunk.error)
    for choice in chunk.choices or ():
        if not 0 <= choice.index <= MAX_CHOICE:
            raise _malformed(f"a choice has the index {choice.index}")
        if choice.delta is not None:
            yield from _pieces(choice.index, choice.delta)
        if choice.finish_reason:  # some send "" on every chunk: that is none
            yield Finish(choice.index, choice.finish_reason[:64])
    if chunk.usage:
        yield Usage(chunk.usage)


def _pieces(index: int, delta: _Delta) -> Iterator[Piece]:
    if delta.content:
        yield Piece(index, delta.content)
    if reasoning := delta.reasoning or delta.reasoning_content:
        yield Piece(index, delta={"reasoning": reasoning})
    if delta.refusal:
        yield Piece(index, delta={"refusal": delta.refusal})
    if delta.tool_calls:
        yield Piece(index, delta={"tool_calls": delta.tool_calls})


def _decode(data: bytes) -> _Chunk:
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return _decode_tolerantly(data)


def _decode_tolerantly(data: bytes) -> _Chunk:
    """Bad bytes and lone surrogates become U+FFFD; anything else that is no chunk is the upstream's failure."""
    try:
        value = json.loads(data.decode("utf-8", "replace"))
        # An encoder that refuses surrogates is the border where they end.
        text = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise _malformed("an event is not JSON") from None
    if isinstance(value, dict) and value.get("error"):
        raise from_error(value["error"])
    try:
        return msgspec.convert(value, _Chunk)
    except (msgspec.ValidationError, RecursionError) as error:
        raise _malformed(f"an event is no chat completion chunk ({str(error)[:120]})") from None


def _malformed(what: str) -> UpstreamFailure:
    return UpstreamFailure("malformed_stream", what)


def named(name: str, data: bytes) -> None:
    """A named event: `error` is one; others (`ping`, ...) carry nothing. Raises UpstreamFailure."""
    if name != "error":
        return
    try:
        body: Any = json.loads(data)
    except (ValueError, RecursionError):
        body = data.decode("utf-8", "replace")
    raise from_error(body)
