"""Chat completion chunks: from the data of an event to pieces of an answer, tolerant of every dialect met. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeGuard

import msgspec
from msgspec import UNSET, Struct

from .failures import UpstreamFailure, from_error

DONE: Final = b"[DONE]"
MAX_CHOICE: Final = 127
MAX_USAGE: Final = 16 * 1024
"""Bytes of a usage that is believed: it goes into the state and the last event as it is."""

_MAX_COUNT: Final = 2**53
_AS_SENT: Final = ("tool_calls", "function_call", "reasoning_details", "annotations", "audio")
_TEXTS: Final = ("content", "refusal", "reasoning", "reasoning_content")
_Place = tuple[int, str]


class _Delta(Struct):
    content: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    function_call: dict[str, Any] | None = None
    reasoning_details: list[Any] | None = None
    annotations: list[Any] | None = None
    audio: dict[str, Any] | None = None


class _Choice(Struct):
    index: int = 0
    delta: _Delta | None = None
    message: Any = None
    logprobs: Any = None
    finish_reason: str | None = None


class _Chunk(Struct):
    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = UNSET


_decode = msgspec.json.Decoder(_Chunk).decode


class Piece(Struct, frozen=True, gc=False):
    """Something of choice `index`: either its `delta` or, with `text` set, content alone (the usual case)."""

    index: int
    text: str = ""
    delta: dict[str, Any] | None = None


class Logprobs(Struct, frozen=True, gc=False):
    """How likely the tokens of choice `index` were: lists by `content` and `refusal`, of the pieces before."""

    index: int
    lists: dict[str, list[Any]]


class Finish(Struct, frozen=True, gc=False):
    """Choice `index` ended, in the upstream's own word."""

    index: int
    reason: str


class Usage(Struct, frozen=True, gc=False):
    """The tokens used, as the upstream counted them."""

    usage: dict[str, Any]


Part = Piece | Logprobs | Finish | Usage


class Chunks:
    """Reads one stream's chunks. It remembers half characters: some upstreams cut an emoji's escapes in two chunks."""

    __slots__ = ("_halves", "_told")

    def __init__(self) -> None:
        self._halves: dict[_Place, str] = {}
        self._told = False
        """Whether anything was said: then a `message` repeats what came in pieces."""

    def parts(self, data: bytes) -> Sequence[Part]:
        """What one event's data holds. Raises UpstreamFailure for an error or something that is no chunk."""
        try:
            chunk = _decode(data)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            chunk = self._decode_tolerantly(data)
        else:
            if self._halves:
                self._mend(chunk)
        # Nearly every chunk is some text of one choice: told by its values, it is spared the questions below.
        choices = chunk.choices
        if choices and len(choices) == 1 and chunk.usage is None and chunk.error is UNSET:
            choice = choices[0]
            delta = choice.delta
            if (
                delta is not None
                and delta.content
                and not (choice.finish_reason or choice.logprobs)
                and 0 <= choice.index <= MAX_CHOICE
                and not (delta.reasoning or delta.reasoning_content or delta.refusal or delta.tool_calls)
                and not (delta.function_call or delta.reasoning_details or delta.annotations or delta.audio)
            ):
                self._told = True
                return (Piece(choice.index, delta.content),)
        return list(self._parts(chunk, len(data)))

    def _parts(self, chunk: _Chunk, size: int) -> Iterator[Part]:
        if chunk.error is not UNSET and chunk.error:
            raise from_error(chunk.error)
        streamed = self._told
        for choice in chunk.choices or ():
            index = choice.index
            if not 0 <= index <= MAX_CHOICE:
                raise _malformed(f"a choice has the index {index}")
            delta = choice.delta
            if delta is None and choice.message is not None and not streamed:
                delta = _message(choice.message)
            if delta is not None:
                if delta.content:
                    self._told = True
                    yield Piece(index, delta.content)
                for piece in _others(index, delta):
                    self._told = True
                    yield piece
            if choice.logprobs and not (streamed and choice.delta is None):  # beside a message they repeat, too
                yield from _logprobs(index, choice.logprobs)
            if choice.finish_reason:  # some send "" on every chunk: that is none
                yield from self._halves_of(index)
                yield Finish(index, choice.finish_reason[:64])
        if chunk.usage and (usage := _believed(chunk.usage, size)):
            yield Usage(usage)

    def named(self, name: str, data: bytes) -> Sequence[Part]:
        """A named event: `error` is one, others (`ping`, ...) mostly carry nothing. Raises UpstreamFailure."""
        if name.lower() == "error":
            raise from_error(_json_or_text(data))
        if b'"choices"' in data or b'"error"' in data:
            return self.parts(data)
        return ()

    def whole(self, body: bytes) -> Sequence[Part]:
        """A JSON body instead of a stream. Raises UpstreamFailure for an error, which may stand in a list."""
        found = _json_or_text(body)
        if isinstance(found, list) and found and isinstance(found[0], dict) and found[0].get("error"):
            raise from_error(found[0]["error"])
        return self.parts(body)

    def _decode_tolerantly(self, data: bytes) -> _Chunk:
        """Bad bytes and lone surrogates become U+FFFD; anything else that is no chunk is the upstream's failure."""
        try:
            value = json.loads(data.decode("utf-8", "replace"), parse_int=_bounded)
        except (ValueError, RecursionError):
            raise _malformed("an event is not JSON") from None
        if isinstance(value, dict) and value.get("error"):
            raise from_error(value["error"])
        try:
            chunk = msgspec.convert(value, _Chunk)
            self._mend(chunk)
        except (msgspec.ValidationError, RecursionError) as error:
            raise _malformed(f"an event is no chat completion chunk ({_shown(error)})") from None
        return chunk

    def _mend(self, chunk: _Chunk) -> None:
        """Give texts back the halves that came earlier, and take off halves at their ends."""
        for choice in chunk.choices or ():
            delta = choice.delta
            choice.finish_reason = _whole(choice.finish_reason or "")
            choice.message = _whole_all(choice.message)
            choice.logprobs = _whole_all(choice.logprobs)
            if delta is None:
                continue
            for name in _TEXTS:
                if text := getattr(delta, name):
                    setattr(delta, name, self._mended((choice.index, name), text))
            for position, call in enumerate(delta.tool_calls or ()):
                function, number = call.get("function"), call.get("index", position)
                if isinstance(function, dict) and isinstance(text := function.get("arguments"), str):
                    place = (choice.index, f"arguments {str(number)[:20]}")
                    call["function"] = {**function, "arguments": self._mended(place, text)}
            for name in _AS_SENT:
                setattr(delta, name, _whole_all(getattr(delta, name)))
        chunk.usage = _whole_all(chunk.usage)

    def _mended(self, place: _Place, text: str) -> str:
        text = self._halves.pop(place, "") + text
        if "\ud800" <= text[-1] <= "\udbff" and len(self._halves) < MAX_CHOICE:
            self._halves[place] = text[-1]
            text = text[:-1]
        return _whole(text)

    def _halves_of(self, index: int) -> Iterator[Piece]:
        """What was cut in half and never came: said to be missing."""
        for place in [place for place in self._halves if place[0] == index]:
            del self._halves[place]
            if place[1] == "content":
                yield Piece(index, "\ufffd")


def _message(message: Any) -> _Delta:
    """The answer in one piece, from a server that does not stream."""
    try:
        return msgspec.convert(message, _Delta)
    except msgspec.ValidationError as error:
        raise _malformed(f"a message is none ({_shown(error)})") from None


def _others(index: int, delta: _Delta) -> Iterator[Piece]:
    if reasoning := delta.reasoning or delta.reasoning_content:
        yield Piece(index, delta={"reasoning": reasoning})
    if delta.refusal:
        yield Piece(index, delta={"refusal": delta.refusal})
    if delta.tool_calls or delta.function_call or delta.reasoning_details or delta.annotations or delta.audio:
        for name in _AS_SENT:
            if value := getattr(delta, name):
                yield Piece(index, delta={name: value})


def _logprobs(index: int, found: Any) -> Iterator[Logprobs]:
    lists = {
        name: tokens
        for name in ("content", "refusal")
        if isinstance(found, dict) and isinstance(tokens := found.get(name), list) and tokens
    }
    if lists:
        yield Logprobs(index, lists)


def _believed(usage: Any, size: int) -> dict[str, Any] | None:
    """The usage, if its counts are some: whoever adds them up must not meet a text or less than nothing.

    `size`: bytes of all that it came with.
    """
    if not isinstance(usage, dict) or (size > MAX_USAGE and len(msgspec.json.encode(usage)) > MAX_USAGE):
        return None
    asked, said = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (_is_count(asked) and _is_count(said)):
        return None
    total = usage.get("total_tokens")
    return {**usage, "total_tokens": total if _is_count(total) else asked + said}


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _whole(text: str) -> str:
    """The text with pairs of surrogates joined and lone ones replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _whole_all(value: Any) -> Any:
    if isinstance(value, str):
        return _whole(value)
    if isinstance(value, dict):
        return {_whole(str(name)): _whole_all(each) for name, each in value.items()}
    return [_whole_all(each) for each in value] if isinstance(value, list) else value


def _bounded(digits: str) -> int | float:
    """What an encoder can write again."""
    return int(digits) if len(digits) < 19 else float(digits)


def _json_or_text(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data.decode("utf-8", "replace")


def _shown(error: Exception) -> str:
    return _whole(str(error)[:120])


def _malformed(what: str) -> UpstreamFailure:
    return UpstreamFailure("malformed_stream", what)
