"""From events to an answer: what a consumer has to show, and the OpenAI `chat.completion` it amounts to. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from .events import AnyEvent, Chunk, Failed, Started, Terminal


@dataclass(slots=True)
class _Call:
    """One tool call."""

    index: int
    whole: dict[str, Any] = field(default_factory=dict)

    def fits(self, piece: dict[str, Any]) -> bool:
        """Whether a piece with the same index is of this call, as its id does not say otherwise."""
        return not piece.get("id") or self.whole.get("id") in (None, piece["id"])

    def add(self, piece: dict[str, Any]) -> None:
        if isinstance(function := piece.get("function"), dict):
            _join_function(self.whole.setdefault("function", {"name": "", "arguments": ""}), function)
        self.whole.update({
            name: value for name, value in piece.items() if name not in ("index", "function") and value is not None
        })  # fmt: skip


def _join_function(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    """Name and arguments come in pieces; some repeat the name with each, or send the arguments as an object."""
    if isinstance(name := piece.get("name"), str) and name != whole["name"]:
        whole["name"] += name
    arguments = piece.get("arguments")
    if isinstance(arguments, str):
        whole["arguments"] += arguments
    elif arguments is not None:
        whole["arguments"] += msgspec.json.encode(arguments).decode()


def _join(whole: dict[str, Any], piece: dict[str, Any], texts: tuple[str, ...]) -> None:
    for name, value in piece.items():
        joins = name in texts and isinstance(value, str) and isinstance(whole.get(name), str)
        whole[name] = whole[name] + value if joins else value


@dataclass(slots=True)
class _Choice:
    texts: dict[str, list[str]] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)
    function_call: dict[str, Any] | None = None
    lists: dict[str, list[Any]] = field(default_factory=dict)
    audio: dict[str, Any] = field(default_factory=dict)
    likely: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, delta: dict[str, Any]) -> None:
        for name in ("content", "reasoning", "refusal"):
            if isinstance(text := delta.get(name), str):
                self.texts.setdefault(name, []).append(text)
        for name in ("reasoning_details", "annotations"):
            if isinstance(pieces := delta.get(name), list):
                self.lists.setdefault(name, []).extend(pieces)
        if isinstance(found := delta.get("logprobs"), dict):
            for name in ("content", "refusal"):
                if isinstance(tokens := found.get(name), list):
                    self.likely.setdefault(name, []).extend(tokens)
        if isinstance(audio := delta.get("audio"), dict):
            _join(self.audio, audio, ("data", "transcript"))
        if isinstance(function := delta.get("function_call"), dict):
            self.function_call = self.function_call or {"name": "", "arguments": ""}
            _join_function(self.function_call, function)
        calls = delta.get("tool_calls")
        for position, call in enumerate(calls if isinstance(calls, list) else ()):
            if isinstance(call, dict):  # the log holds what an upstream sent, right or wrong
                self._call(call, position).add(call)

    def _call(self, piece: dict[str, Any], position: int) -> _Call:
        """The call that a piece belongs to: its index says so, unless it has an id of its own.

        Some servers send parallel calls whole, all with the index 0 or with none.
        """
        index = found if isinstance(found := piece.get("index"), int) else position
        same = next((call for call in reversed(self.calls) if call.index == index), None)
        if same is None or not same.fits(piece):
            same = _Call(index)
            self.calls.append(same)
        return same

    def text(self, name: str = "content") -> str:
        return "".join(self.texts.get(name, ()))

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text() if "content" in self.texts else None}
        message["refusal"] = self.text("refusal") if "refusal" in self.texts else None
        if "reasoning" in self.texts:
            message["reasoning"] = self.text("reasoning")
        if self.calls:
            message["tool_calls"] = [call.whole for call in sorted(self.calls, key=lambda call: call.index)]
        if self.function_call:
            message["function_call"] = self.function_call
        if self.audio:
            message["audio"] = self.audio
        return message | self.lists

    def logprobs(self) -> dict[str, Any] | None:
        """Of all tokens; None where the upstream sent none."""
        return {name: self.likely.get(name) for name in ("content", "refusal")} if self.likely else None


@dataclass(slots=True)
class Transcript:
    """What the events so far amount to. Feed it every event; a new attempt voids what came before."""

    attempt: int = 0
    model: str = ""
    started_at: float = 0.0
    end: Terminal | None = None
    _choices: dict[int, _Choice] = field(default_factory=dict)

    def feed(self, event: AnyEvent) -> None:
        """Take the next event, in order."""
        if isinstance(event, Chunk):
            self._choices.setdefault(event.index, _Choice()).add(event.delta)
        elif isinstance(event, Started):
            self._choices.clear()
            self.attempt, self.model, self.started_at = event.attempt, event.model, event.at
        elif isinstance(event, Terminal):
            self.end = event

    @property
    def text(self) -> str:
        """The content of choice 0."""
        return self._choices[0].text() if 0 in self._choices else ""

    @property
    def error(self) -> dict[str, Any] | None:
        """The `error` of a failed job."""
        return self.end.error if isinstance(self.end, Failed) else None

    def completion(self, job_id: str) -> dict[str, Any]:
        """The answer as an OpenAI `chat.completion` object; `finish_reason` is None for a choice that was cut off."""
        reasons = self.end.finish_reasons if self.end else {}
        return {
            "id": f"chatcmpl-{job_id}",
            "object": "chat.completion",
            "created": int(self.started_at),
            "model": self.model,
            "choices": [
                {"index": i, "message": choice.message(), "logprobs": choice.logprobs(),
                 "finish_reason": reasons.get(i)}
                for i in sorted({*self._choices, *reasons})
                for choice in [self._choices.get(i) or _Choice()]
            ],
            "usage": self.end.usage if self.end else None,
        }  # fmt: skip
