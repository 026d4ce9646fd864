"""Is the answer whole? What the upstream said about each choice, and what that amounts to. Pure.

`completed` only when every requested choice has a finish reason that means the end and no error was seen. `[DONE]`,
a closed connection or silence prove nothing, but for upstreams whose settings say that `[DONE]` is their way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from .chunks import Finish, Part, Piece, Usage
from .failures import UpstreamFailure

COMPLETE: Final = frozenset({"stop", "tool_calls", "function_call"})
INCOMPLETE: Final = frozenset({"length", "content_filter"})

BYTES_PER_TOKEN: Final = 4
"""For estimates only: OpenAI's own rule of thumb for English."""


@dataclass(slots=True, frozen=True)
class Verdict:
    """How an attempt ended: `completed` or `incomplete`, with the reasons by choice."""

    status: str
    finish_reasons: dict[int, str]
    usage: dict[str, Any]


@dataclass(slots=True)
class Answer:
    """One attempt's answer so far."""

    choices: int = 1
    prompt_bytes: int = 0
    allowed: frozenset[str] = frozenset()
    """Finish reasons that mean a whole answer besides COMPLETE."""
    done_is_enough: bool = False
    """Whether `[DONE]` alone means that all choices ended well."""
    earlier: dict[str, Any] | None = None
    """The usage of the requests that this one goes on from."""
    reasons: dict[int, str] = field(default_factory=dict)
    pieces: int = 0
    measured: dict[str, Any] | None = None
    went_on: set[int] = field(default_factory=set)
    """Choices that said more after their finish reason, which was then not the end."""

    def take(self, part: Part) -> None:
        """Note what a part says."""
        if isinstance(part, Piece):
            self.pieces += 1
            self.note_more(part.index)
        elif isinstance(part, Finish):
            self.reasons[part.index] = part.reason
            self.went_on.discard(part.index)
        elif isinstance(part, Usage):
            self.measured = part.usage

    def note_more(self, index: int) -> None:
        """A choice says something."""
        if index in self.reasons:
            self.went_on.add(index)

    @property
    def finished(self) -> bool:
        """Whether every choice has ended with its finish reason; only the usage may still come."""
        return not self.went_on and all(index in self.reasons for index in range(self.choices))

    @property
    def usage(self) -> dict[str, Any]:
        """The upstream's count, else an estimate marked as one: a piece is about a token."""
        prompt = -(-self.prompt_bytes // BYTES_PER_TOKEN)
        estimate = {
            "prompt_tokens": prompt, "completion_tokens": self.pieces, "total_tokens": prompt + self.pieces,
            "estimated": True,
        }  # fmt: skip
        return _summed(self.earlier, self.measured or estimate)

    def verdict(self, *, done: bool) -> Verdict:
        """What it amounts to now that the stream is over; `done`: a `[DONE]` was seen. Raises UpstreamFailure."""
        if done and self.done_is_enough:
            self.reasons = dict.fromkeys(range(self.choices), "stop") | self.reasons
        known = COMPLETE | INCOMPLETE | self.allowed
        for index, reason in self.reasons.items():
            if reason not in known:
                raise UpstreamFailure(
                    "upstream_aborted", f"choice {index} ended with {reason!r}, which does not mean a whole answer"
                )
        open_ones = set() if done else self.went_on
        missing = [index for index in range(self.choices) if index not in self.reasons or index in open_ones]
        if missing:
            how = "said [DONE]" if done else "closed the stream"
            raise UpstreamFailure(
                "stream_truncated",
                f"the upstream {how} without a finish_reason for choice {missing[0]}; the answer may be cut",
            )
        short = any(reason in INCOMPLETE for reason in self.reasons.values())
        return Verdict("incomplete" if short else "completed", dict(self.reasons), self.usage)


def _summed(earlier: dict[str, Any] | None, usage: dict[str, Any]) -> dict[str, Any]:
    """What several requests used together: an estimate, where one of them is."""
    if earlier is None:
        return usage
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    sums = {name: sum(n for each in (earlier, usage) if isinstance(n := each.get(name), int)) for name in counts}
    estimated = earlier.get("estimated") or usage.get("estimated")
    return {**sums, **({"estimated": True} if estimated else {})}
