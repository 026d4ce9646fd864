"""A finished job as one value, and what its ending means for a caller. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from .errors import JobCancelled, JobFailed
from .events import AnyEvent, Cancelled, Chunk, Failed, Started
from .keys import text_of
from .transcript import Transcript

OnContent = Callable[[str], object]
OnRestart = Callable[[int, str | None], object]


class Job(Struct, frozen=True, kw_only=True):
    """What `submit` returns. `created` is False when the same job had been submitted before."""

    id: str
    created: bool = True


class Ended(Struct, frozen=True, kw_only=True):
    """One entry of the feed of finished jobs; `cursor` is where to go on after it."""

    id: str
    status: str
    cursor: str


class Result(Struct, frozen=True, kw_only=True):
    """A finished answer. `status` is completed or incomplete; `completion` is an OpenAI `chat.completion` object."""

    id: str
    status: str
    text: str
    completion: dict[str, Any]
    usage: dict[str, Any] | None
    attempts: int
    error: dict[str, Any] | None = None


def endings(reply: Sequence[Any] | None) -> list[Ended]:
    """What XREAD of the feed answered, in its order; nothing when nothing came."""
    return [
        Ended(id=text_of(fields[b"id"]), status=text_of(fields[b"status"]), cursor=entry_id.decode())
        for _, entries in reply or ()
        for entry_id, fields in entries
    ]


def outcome(job_id: str, transcript: Transcript) -> Result:
    """The result of a transcript that has its end, whatever the status."""
    if transcript.end is None:
        raise ValueError(f"job {job_id!r} has no terminal event yet: follow it to its end first")
    return Result(
        id=job_id,
        status=transcript.end.type,
        text=transcript.text,
        completion=transcript.completion(job_id),
        usage=transcript.end.usage,
        attempts=transcript.attempt,
        error=transcript.error,
    )


def raise_for_end(job_id: str, transcript: Transcript) -> None:
    """Raise JobFailed or JobCancelled when that is how it ended."""
    if isinstance(transcript.end, Failed):
        error = transcript.end.error
        raise JobFailed(job_id, str(error.get("code", "unknown")), str(error.get("message", "no reason was given")))
    if isinstance(transcript.end, Cancelled):
        raise JobCancelled(job_id)


class Narrator:
    """Turns events into the two callbacks of `stream`: content as it comes, and a word when what was shown is void."""

    def __init__(self, on_content: OnContent | None, on_restart: OnRestart | None, *, shown: bool = False) -> None:
        """`shown`: the caller goes on from a cursor, so text may have been shown already."""
        self.transcript = Transcript()
        self._on_content = on_content
        self._on_restart = on_restart
        self._shown = shown

    def feed(self, event: AnyEvent) -> None:
        """Take the next event, in order."""
        self.transcript.feed(event)
        if isinstance(event, Chunk) and event.index == 0 and event.content:
            self._shown = True
            if self._on_content:
                self._on_content(event.content)
        elif isinstance(event, Started) and self._shown:
            self._shown = False
            if self._on_restart:
                self._on_restart(event.attempt, event.reason)
