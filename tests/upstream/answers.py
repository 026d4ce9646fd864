"""Ready scripts: the good answers, the well-formed refusals, and what clouds and proxies send instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .request import Request
from .script import Chunk, Done, Event, Finish, Framing, Json, Script, Status, Step, Text, Usage
from .text import expected_text, seed_of

DEFAULT_CHUNKS = 20


def answer(
    *middle: Step,
    finish: str | None = "stop",
    choices: int = 1,
    usage: bool = False,
    framing: Framing = "chunked",
    gzip: bool = False,
) -> Script:
    """A complete stream around these steps: role chunks before; finish reasons, usage if wanted and [DONE] after."""
    roles = [Chunk("", role="assistant", index=i) for i in range(choices)]
    ends = [Finish(finish, index=i) for i in range(choices)]
    return Script(*roles, *middle, *ends, *([Usage()] if usage else []), Done(), framing=framing, gzip=gzip)


def good_answer(
    request: Request, n_chunks: int = DEFAULT_CHUNKS, pace_seconds: float = 0.0, seed: int | None = None
) -> Script:
    """What a healthy model would say, streamed or whole as asked.

    Each choice i of `n` says `expected_text(n_chunks, seed + i)`; without a seed it is `seed_of(request.prompt)`.
    """
    seed = seed_of(request.prompt) if seed is None else seed
    if not request.stream:
        return Script(Status(body=_completion(request, n_chunks, seed)))
    text = Text(n_chunks, pace_seconds, seed, choices=request.choices)
    return answer(text, choices=request.choices, usage=request.include_usage)


def _completion(request: Request, n_chunks: int, seed: int) -> Json:
    said = [expected_text(n_chunks, seed + i) for i in range(request.choices)]
    tokens = n_chunks * request.choices
    return {
        "id": f"chatcmpl-{seed:029d}",
        "object": "chat.completion",
        "created": 1732264000,
        "model": request.model,
        "choices": [
            {
                "index": i,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
            for i, text in enumerate(said)
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens},
    }


def error(
    code: int,
    message: str = "scripted",
    *,
    type: str = "invalid_request_error",
    error_code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Script:
    """A refusal as OpenAI words it: status `code`, and JSON with `message`, `type`, `param` and `code`."""
    body = {"error": {"message": message, "type": type, "param": param, "code": error_code}}
    return Script(Status(code, headers or {}, body))


def rate_limited(headers: Mapping[str, str] | None = None, error_code: str = "rate_limit_exceeded") -> Script:
    """A 429; what it says about when to come back is all in `headers`, e.g. {"retry-after-ms": "1500"}."""
    kind = "insufficient_quota" if error_code == "insufficient_quota" else "requests"
    return error(429, "Rate limit reached", type=kind, error_code=error_code, headers=headers)


def html(code: int = 200, text: str = "<html><body><h1>Sign in</h1></body></html>") -> Script:
    """A proxy's or portal's page where a stream was expected."""
    return Script(Status(code, {"content-type": "text/html; charset=utf-8"}, text))


def redirect(location: str, code: int = 307) -> Script:
    """A redirect; with 307 and 308 an obedient client would send its prompt there once more."""
    return Script(Status(code, {"location": location}))


def error_event(message: str = "scripted", code: int | str | None = None, *, named: bool = False) -> Event:
    """An error inside the stream: an `error` object, or (`named`) `event: error` with the bare object, as some do."""
    body = {"message": message, "type": "server_error", "code": code}
    return Event(body, event="error") if named else Event({"error": body})


def azure(*middle: Step, finish: str = "stop") -> Script:
    """Azure's dialect: a first chunk with filter results and no choices, late chunks whose choices have no delta."""
    filters = {"hate": {"filtered": False, "severity": "safe"}, "violence": {"filtered": False, "severity": "safe"}}
    first = {"choices": [], "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": filters}]}
    offsets = {"check_offset": 44, "start_offset": 44, "end_offset": 198}
    late = {"index": 0, "finish_reason": None, "content_filter_results": filters, "content_filter_offsets": offsets}
    role, end = Chunk("", role="assistant"), Finish(finish)
    return Script(Chunk(raw=first), role, *middle, end, Chunk(raw={"choices": [late]}), Done())


def tool_call(name: str, arguments: Sequence[str], *, index: int = 0, call_id: str = "call_1") -> list[Chunk]:
    """The chunks of one tool call, its arguments in these pieces. Close it with `finish="tool_calls"`."""
    opening = {"index": 0, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
    deltas = [opening, *({"index": 0, "function": {"arguments": piece}} for piece in arguments)]
    return [Chunk(tool_calls=[delta], index=index) for delta in deltas]
