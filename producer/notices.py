"""What is said on stderr beside the text: restarts, waits, endings, and what a text cannot show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from millstream.events import Cancelled, Chunk, Event, Failed, Incomplete, Retrying, Started

BESIDE_TEXT = ("refusal", "tool_calls")
"""What an answer may hold instead of text, and a reader of the text alone would miss."""


class Notices:
    """One line at a time, through `say`; each names its job when there are several."""

    def __init__(self, say: Callable[[str], None], *, name_jobs: bool) -> None:
        self._say = say
        self._name_jobs = name_jobs
        self._beside: dict[str, dict[str, None]] = {}  # by job: the kinds of BESIDE_TEXT its newest attempt holds

    def feed(self, job_id: str, event: Event) -> None:
        """Say what the event means, unless it is text. A restart is the view's to tell: it knows what was shown."""
        if isinstance(event, Started):
            self._beside.pop(job_id, None)
        elif isinstance(event, Chunk):
            for kind in BESIDE_TEXT:
                if event.index == 0 and event.delta.get(kind):
                    self._beside.setdefault(job_id, {})[kind] = None
        elif isinstance(event, Retrying):
            self.say(job_id, f"waits {event.delay:.3g} s, then asks again ({in_words(event.error)})")
        elif event.terminal:
            if kinds := self._beside.pop(job_id, None):
                self.say(job_id, f"besides its text the answer holds {', '.join(kinds)}: see result --json")
            if ending := how_it_ended(event):
                self.say(job_id, ending)

    def say(self, job_id: str, text: str) -> None:
        """Say a line about a job."""
        self._say(f"{job_id}: {text}" if self._name_jobs else text)


def attempt(event: Started) -> str:
    """The title of a restart."""
    return f"attempt {event.attempt} · {event.reason or 'restarted'}"


def how_it_ended(event: Event) -> str:
    """The ending in words; nothing for `completed`, which the exit status says."""
    if isinstance(event, Failed):
        return f"failed: {in_words(event.error)}"
    if isinstance(event, Incomplete):
        reasons = ", ".join(dict.fromkeys(event.finish_reasons.values())) or "no reason was given"
        return f"incomplete: the model stopped early ({reasons})"
    if isinstance(event, Cancelled):
        return "cancelled: the text is what there was until then"
    return ""


def in_words(error: dict[str, Any] | None) -> str:
    """`code: message` of an event's error."""
    return ": ".join(str(part) for part in map((error or {}).get, ("code", "message")) if part) or "no reason was given"
