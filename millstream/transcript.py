"""From events to an answer: what a consumer has to show, and the OpenAI `chat.completion` it amounts to. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .events import AnyEvent, Chunk, Failed, Started, Terminal


@dataclass(slots=True)
class _Choice:
    texts: dict[str, list[str]] = field(default_factory=dict)
    tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict)

    def add(self, delta: dict[str, Any]) -> None:
        for name in ("content", "reasoning", "refusal"):
            if isinstance(text := delta.get(name), str):
                self.texts.setdefault(name, []).append(text)
        calls = delta.get("tool_calls")
        for position, call in enumerate(calls if isinstance(calls, list) else ()):
            if isinstance(call, dict):  # the log holds what an upstream sent, right or wrong
                self._add_call(call, position)

    def _add_call(self, call: dict[str, Any], position: int) -> None:
        index = call.get("index")
        whole = self.tool_calls.setdefault(index if isinstance(index, int) else position, {})
        function = call.get("function")
        if isinstance(function, dict):
            parts = whole.setdefault("function", {"name": "", "arguments": ""})
            for name in ("name", "arguments"):
                parts[name] += piece if isinstance(piece := function.get(name), str) else ""
        rest = {name: value for name, value in call.items() if name not in ("index", "function")}
        whole.update({name: value for name, value in rest.items() if value is not None})

    def text(self, name: str = "content") -> str:
        return "".join(self.texts.get(name, ()))

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text() if "content" in self.texts else None}
        message["refusal"] = self.text("refusal") if "refusal" in self.texts else None
        if "reasoning" in self.texts:
            message["reasoning"] = self.text("reasoning")
        if self.tool_calls:
            message["tool_calls"] = [self.tool_calls[i] for i in sorted(self.tool_calls)]
        return message


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
                {"index": i, "message": self._choices[i].message() if i in self._choices else _Choice().message(),
                 "logprobs": None, "finish_reason": reasons.get(i)}
                for i in sorted({*self._choices, *reasons})
            ],
            "usage": self.end.usage if self.end else None,
        }  # fmt: skip
