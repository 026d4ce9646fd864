"""Going on from a partial answer instead of asking for all of it again, the way each kind of server wants it. Pure.

The partial text goes back as the start of the assistant's message and the model writes on. What was shown is never
rewritten, so exactly the shown text is sent, even where it ends within a word. Where an answer is more than one plain
text (several choices, tools, reasoning, logprobs), nobody can go on; then the attempt is begun anew.

| server | wants |
|---|---|
| vLLM, SGLang | `continue_final_message` true and `add_generation_prompt` false |
| llama.cpp | an assistant message at the end, nothing else |
| DeepSeek (base URL with `/beta`) | `prefix` true on that message |
| Mistral | the same; it repeats the text before it goes on |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from millstream.job import Spec

MAX_TEXT: Final = 1024 * 1024
"""Characters of an answer that are kept to go on from; a longer one is begun anew when it breaks."""

_FIELDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "vllm": {"continue_final_message": True, "add_generation_prompt": False},
    "llama.cpp": {},
    "deepseek": {},
    "mistral": {},
}
_MESSAGE: Final[Mapping[str, Mapping[str, Any]]] = {"deepseek": {"prefix": True}, "mistral": {"prefix": True}}
_REPEATS: Final = frozenset({"mistral"})
_LENGTHS: Final = ("max_tokens", "max_completion_tokens")
_NOT_PLAIN: Final = ("tools", "functions", "modalities", "audio", "logprobs")


def possible(spec: Spec, dialect: str) -> bool:
    """Whether an answer to this spec is a text that a server of this dialect can go on with."""
    plain = not any(spec.params.get(name) for name in _NOT_PLAIN) and (spec.params.get("n") or 1) == 1
    return bool(dialect) and plain and spec.messages[-1].get("role") != "assistant"


def request(body: Mapping[str, Any], dialect: str, text: str, tokens: int) -> dict[str, Any]:
    """The request that goes on from `text`; `tokens`: about how many it has, taken off the length asked for."""
    message = {"role": "assistant", "content": text, **_MESSAGE.get(dialect, {})}
    lengths = {name: max(1, body[name] - tokens) for name in _LENGTHS if isinstance(body.get(name), int)}
    return {**body, **lengths, **_FIELDS[dialect], "messages": [*body["messages"], message]}


class Partial:
    """The text of an attempt so far, as long as it is one that can be gone on from."""

    __slots__ = ("_length", "_pieces", "plain")

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._length = 0
        self.plain = True
        """Whether there is nothing but text of choice 0, and not too much."""

    def add(self, index: int, text: str, delta: Mapping[str, Any] | None) -> None:
        """A further piece."""
        self._length += len(text)
        if delta is not None or index != 0 or self._length > MAX_TEXT:
            self.plain = False
            self._pieces.clear()
        elif self.plain:
            self._pieces.append(text)

    def text(self) -> str:
        """All of it."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]


class Echo:
    """Takes off the beginning of a continuation what it repeats of the text, should it repeat all of it."""

    __slots__ = ("_expected", "_held")

    def __init__(self, dialect: str, text: str) -> None:
        self._expected = text if dialect in _REPEATS else ""
        self._held = ""

    def new(self, text: str) -> str:
        """What of a piece is new; nothing while it may still be a repetition."""
        if not self._expected:
            return text
        held = self._held + text
        if self._expected.startswith(held) and held != self._expected:
            self._held = held
            return ""
        new = held.removeprefix(self._expected)
        self._expected = self._held = ""
        return new

    def rest(self) -> str:
        """At the end: what was held and is no repetition after all."""
        held, self._held, self._expected = self._held, "", ""
        return held
