"""About how many tokens a request takes, before it is made. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from millstream.job import Spec

BYTES_PER_TOKEN: Final = 3
"""On the safe side of the 4 that English takes on average; what was too much comes back when the request is settled."""

PER_MESSAGE: Final = 4
"""Tokens around a message, as OpenAI's cookbook counts them."""

PER_PART: Final = 1000
"""Tokens of an image or a sound: OpenAI bills 85 to 1,105 for most images."""


def prompt_tokens(spec: Spec) -> int:
    """Tokens of the messages and of the tools offered."""
    size = extra = 0
    for message in spec.messages:
        extra += PER_MESSAGE
        for part in _parts(message.get("content")):
            if isinstance(part, str):
                size += len(part.encode())
            else:
                extra += PER_PART
        if calls := message.get("tool_calls"):
            size += len(msgspec.json.encode(calls))
    if tools := spec.params.get("tools"):
        size += len(msgspec.json.encode(tools))
    return extra - (-size // BYTES_PER_TOKEN)


def answer_tokens(spec: Spec) -> int | None:
    """The most that the answer may have, all choices together; None where the job does not say."""
    most = spec.params.get("max_completion_tokens", spec.params.get("max_tokens"))
    if not isinstance(most, int) or most < 0:  # -1 is llama.cpp's word for no limit
        return None
    choices = spec.params.get("n") or 1
    return most * (choices if isinstance(choices, int) else 1)


def _parts(content: Any) -> Iterator[str | None]:
    """The texts of a message's content; None for each part that is something else."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            text = part.get("text") if isinstance(part, dict) else part
            yield text if isinstance(text, str) else None
