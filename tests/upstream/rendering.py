"""Steps to bytes: chunks as OpenAI writes them, events as SSE has them, bodies as HTTP frames them. Nothing waits."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from itertools import count

from .script import BodyStep, Chunk, Comment, Done, Event, Filler, Finish, Ping, Raw, Script, Text, Usage
from .text import pieces

_FILLER_BLOCK = 65536
_PHRASES = {int(status): status.phrase for status in HTTPStatus}


def to_json(value: object) -> bytes:
    """Compact JSON in UTF-8; what UTF-8 cannot carry (a lone surrogate) turns the whole value to ASCII escapes."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


_piece_json = cache(to_json)  # the pieces of a Text are few, and most of what a load sends


@dataclass(frozen=True)
class Identity:
    """What is the same in every chunk of one answer. `created` is Unix seconds."""

    id: str
    created: int
    model: str

    def chunk(self, choices: object, **more: object) -> dict[str, object]:
        """A whole chunk with these choices."""
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "service_tier": "default",
            "system_fingerprint": "fp_5c3a9e1b7d",
            "choices": choices,
            **more,
        }


class Renderer:
    """The events of one answer. It counts the chunks that carry content, for `Usage` to tell."""

    def __init__(self, script: Script, identity: Identity) -> None:
        """`script` gives the dialect only; steps are handed to `blocks` one by one."""
        self._end = script.line_end.encode()
        self._colon = script.colon.encode()
        self._identity = identity
        self._tokens = 0

    def blocks(self, step: BodyStep) -> Iterator[bytes]:
        """The body of one step, a block per event (of a `Filler`, per 64 KiB)."""
        match step:
            case Text():
                yield from self._text(step)
            case Filler():
                yield from _filler(step)
            case Raw():
                yield step.data
            case Comment():
                yield b":" + self._colon[1:] + step.text.encode() + self._end * 2
            case Ping():
                yield self.event(b"{}", event="ping")
            case Done():
                yield self.event(b"[DONE]")
            case Event():
                data = step.data if isinstance(step.data, str | None) else to_json(step.data).decode()
                yield self.event(None if data is None else data.encode(), step.event, step.id, step.retry)
            case Chunk():
                self._tokens += bool(step.content or step.reasoning or step.refusal or step.tool_calls)
                yield self.event(to_json(self._chunk(step)))
            case Finish():
                yield self.event(to_json(self._chunk(Chunk(finish_reason=step.reason, index=step.index))))
            case Usage():
                yield self.event(to_json(self._usage(step)))

    def event(
        self, data: bytes | None, event: str | None = None, event_id: str | None = None, retry: int | None = None
    ) -> bytes:
        """One event; data is split into lines at LF, an event without any line is just its empty line."""
        lines = []
        for name, value in ((b"event", event), (b"id", event_id), (b"retry", retry)):
            if value is not None:
                lines.append(name + self._colon + str(value).encode())
        if data is not None:
            lines += [b"data" + self._colon + line for line in data.split(b"\n")]
        return self._end.join([*lines, b"", b""])

    def _chunk(self, step: Chunk) -> dict[str, object]:
        delta = {
            "role": step.role,
            "content": step.content,
            step.reasoning_field: step.reasoning,
            "refusal": step.refusal,
            "tool_calls": step.tool_calls,
        }
        choice = {
            "index": step.index,
            "delta": {name: value for name, value in delta.items() if value is not None},
            "logprobs": None,
            "finish_reason": step.finish_reason,
        }
        usage = {} if step.usage is None else {"usage": step.usage}
        return self._identity.chunk([choice], **usage) | dict(step.raw or {})

    def _usage(self, step: Usage) -> dict[str, object]:
        completion = self._tokens if step.completion_tokens is None else step.completion_tokens
        usage = {
            "prompt_tokens": step.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": step.prompt_tokens + completion,
        }
        return self._identity.chunk([], usage=usage)

    def _text(self, step: Text) -> Iterator[bytes]:
        # The chunk around the content is rendered once per index: a load is nearly all Text.
        voices = []
        for i in range(step.choices):
            whole = self.event(to_json(self._chunk(Chunk("\0", index=step.index + i))))
            before, after = whole.split(b'"\\u0000"')
            voices.append((before, pieces(step.seed + i), after))
        rounds: Iterator[int] = count() if step.n_chunks is None else iter(range(step.n_chunks))
        for _ in rounds:
            for before, said, after in voices:
                self._tokens += 1
                yield before + _piece_json(next(said)) + after


def _filler(step: Filler) -> Iterator[bytes]:
    block = step.byte * _FILLER_BLOCK
    if step.total_bytes is None:
        while True:
            yield block
    whole, rest = divmod(step.total_bytes, _FILLER_BLOCK)
    for _ in range(whole):
        yield block
    yield block[:rest]


class Body:
    """The HTTP body around the blocks: compression first, then framing."""

    def __init__(self, script: Script) -> None:
        """A body as this script wants it; nothing is encoded yet."""
        self._chunked = script.framing == "chunked"
        self._gzip = zlib.compressobj(wbits=31) if script.gzip else None

    def compress(self, block: bytes) -> bytes:
        """The block as the content encoding has it, flushed so that the client can read it at once."""
        if self._gzip is None:
            return block
        return self._gzip.compress(block) + self._gzip.flush(zlib.Z_SYNC_FLUSH)

    def frame(self, data: bytes) -> bytes:
        """Compressed bytes as the transfer encoding has them. No bytes stay no bytes: an empty chunk would end it."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked and data else data

    def end(self) -> bytes:
        """What ends the body properly."""
        tail = b"" if self._gzip is None else self._gzip.flush()
        return self.frame(tail) + (b"0\r\n\r\n" if self._chunked else b"")


def body_length(script: Script, identity: Identity) -> int:
    """The length of the whole body of a script framed by content-length, in bytes as sent."""
    texts = [step.n_chunks for step in script.body_steps if isinstance(step, Text)]
    fillers = [step.total_bytes for step in script.body_steps if isinstance(step, Filler)]
    if None in texts or None in fillers:
        raise ValueError("an endless step has no content-length: use chunked or close framing")
    renderer, body = Renderer(script, identity), Body(script)
    sent = sum(len(body.compress(block)) for step in script.body_steps for block in renderer.blocks(step))
    return sent + len(body.end())


def head(code: int, headers: Mapping[str, str]) -> bytes:
    """Status line and headers; an unregistered code (529, say) gets a reason phrase all the same."""
    reason = _PHRASES.get(code, "Overloaded")
    lines = [f"HTTP/1.1 {code} {reason}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")
