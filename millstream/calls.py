"""What can be asked of Redis, as values: a script, its keys, its arguments, and what the reply means. Pure.

`Client`, `AsyncClient` and the worker run these; nobody else spells a script's arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from .delivery import QUEUES_KEY, deliver
from .errors import JobExists, JobNotFound, MillstreamError, RedisUnavailable
from .job import Spec
from .keys import Keys, text_of
from .scripts import Script, load
from .settings import Settings

T = TypeVar("T")

PATIENCE_LEASES: Final = 4
"""A queued job is looked after once this many leases have passed: 60 s by default. Looking earlier re-delivers jobs
that merely wait (measured: 1,300 useless deliveries for 300 jobs with a patience of 200 ms)."""

FORGET_MS: Final = 60_000

PACK_BYTES: Final = 16 * 1024
"""Events of a repacked log rest in packs of this size: a page of 256 packs stays within 4 MB."""

BUILDING_MS: Final = 60_000
"""How long an unfinished copy of a log lives."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One script call. `decode` turns the reply into a value or raises what it means."""

    script: str
    keys: Sequence[str]
    args: Sequence[Any]
    decode: Callable[[Any], T]

    def load(self, *, header: bool) -> Script:
        """The script's text as this kind of server wants it."""
        return load(self.script, header=header)


def milliseconds(seconds: float) -> int:
    """Whole milliseconds, at least 1."""
    return max(1, math.ceil(seconds * 1000))


def patience_ms(lease: float) -> int:
    """How long a queued job is left alone before a sweep looks for its delivery."""
    return milliseconds(lease * PATIENCE_LEASES)


def submit(keys: Keys, settings: Settings, job_id: str, spec: Spec) -> Call[bool]:
    """Accept a job and deliver it. The call's value is whether the job is new."""
    call = accept(keys, settings, job_id, spec, spec.encode())

    def decode(reply: Sequence[bytes]) -> bool:
        outcome, words = call.decode(reply)
        if outcome == "conflict":
            raise JobExists(job_id)
        if outcome == "full":
            raise RedisUnavailable(words)
        return outcome == "created"

    return Call(call.script, call.keys, call.args, decode)


def accept(keys: Keys, settings: Settings, job_id: str, spec: Spec, body: bytes) -> Call[tuple[str, str]]:
    """As `submit`, with `body` as the encoded spec.

    The value is (`created`, `exists` or `conflict`, the status), or (`full`, why).
    """
    delivery = deliver(keys, job_id, spec.lane)
    retention = settings.retention if spec.retention is None else spec.retention
    args = [
        body, job_id, spec.lane, spec.model, milliseconds(retention), spec.max_attempts or settings.max_attempts,
        "" if spec.expires is None else milliseconds(spec.expires), patience_ms(settings.lease),
        delivery.queue_key, delivery.rq_id, *delivery.flat_fields,
    ]  # fmt: skip
    names = [keys.spec(job_id), keys.state(job_id), keys.open, delivery.queue_key, QUEUES_KEY, delivery.job_key]
    return Call("submit", names, args, _decode_accept)


def _decode_accept(reply: Sequence[bytes]) -> tuple[str, str]:
    if reply[0] == b"full":
        return "full", (
            f"Redis is full: {int(reply[1]):,} bytes of its maxmemory of {int(reply[2]):,} are used, and the last "
            "tenth is kept for the jobs it has; nothing was accepted: wait for ended jobs to expire, "
            "or give it more memory"
        )
    return _decode_words(reply)


def _decode_words(reply: Sequence[bytes]) -> tuple[str, str]:
    return reply[0].decode(), (reply[1] or b"").decode() if len(reply) > 1 else ""


def redeliver(keys: Keys, job_id: str, lane: str, *, last: bool = False) -> Call[bool]:
    """Deliver a job that is accepted already once more, at the head of its queue, or as the last of it.

    The value is whether it was put there now.
    """
    delivery = deliver(keys, job_id, lane)
    names = [delivery.queue_key, QUEUES_KEY, delivery.job_key]
    where = "last" if last else "first"
    return Call("deliver", names, [delivery.queue_key, delivery.rq_id, where, *delivery.flat_fields], bool)


def cancel(keys: Keys, job_id: str) -> Call[str]:
    """End an open job. The value is the status it has now."""

    def decode(reply: Sequence[bytes]) -> str:
        if reply[0] == b"unknown":
            raise JobNotFound(job_id)
        return reply[-1].decode()

    return Call("cancel", _ending_keys(keys, job_id), [job_id], decode)


def withdraw(keys: Keys, job_id: str) -> Call[tuple[str, str]]:
    """As `cancel`, for a job that may not be there: (`cancelled`, `closed` or `unknown`, the status it had)."""
    return Call("cancel", _ending_keys(keys, job_id), [job_id], _decode_words)


def forget(keys: Keys, job_id: str) -> Call[None]:
    """Let Redis drop an ended job in a minute."""

    def decode(reply: Sequence[bytes]) -> None:
        if reply[0] == b"unknown":
            raise JobNotFound(job_id)
        if reply[0] == b"open":
            raise MillstreamError(
                f"job {job_id!r} is {reply[1].decode()}; only an ended job can be forgotten: cancel it first"
            )

    return Call("forget", list(keys.forgotten(job_id)), [FORGET_MS, FORGET_MS], decode)


def drop(keys: Keys, job_id: str) -> Call[tuple[str, str]]:
    """Let Redis drop an ended job now, or in a minute where somebody follows it. No error if it is gone."""
    return Call("forget", list(keys.forgotten(job_id)), [FORGET_MS, 0], _decode_words)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a claim was answered. `outcome`: claimed, busy, closed, fenced, unknown; the rest is set when claimed."""

    outcome: str
    attempt: int = 0
    seq: int = 0
    reason: str | None = None
    broken: int = 0
    max_attempts: int = 0
    status: str = ""
    busy_ms: int = 0


def claim(keys: Keys, job_id: str, token: str, lease: float, next_attempt: int | None = None) -> Call[Claim]:
    """Take a job as its newest attempt, or begin a further attempt of one that is held. The value is a Claim."""

    def decode(reply: Sequence[Any]) -> Claim:
        outcome = reply[0].decode()
        if outcome == "claimed":
            return Claim(outcome, int(reply[1]), int(reply[2]), reply[3].decode() or None, int(reply[4]), int(reply[5]))
        if outcome == "busy":
            return Claim(outcome, busy_ms=int(reply[1]))
        return Claim(outcome, status=reply[1].decode() if outcome == "closed" else "")

    args = [job_id, token, milliseconds(lease), "" if next_attempt is None else next_attempt]
    return Call("claim", _ending_keys(keys, job_id), args, decode)


def holder(token: str, attempt: int) -> str:
    """Who may write: a delivery's token and the attempt it runs."""
    return f"{token}:{attempt}"


def release(
    keys: Keys, job_id: str, held_by: str, *, lease: float, delay: float = 0.0, waits_for: bytes | str = ""
) -> Call[str]:
    """Hand a held job back without counting an attempt. The value is the script's word for what happened."""
    delay_ms = milliseconds(delay) if delay > 0 else 0
    look_again = delay_ms or patience_ms(lease)
    args = [job_id, held_by, delay_ms, look_again, waits_for]
    return Call("release", [keys.state(job_id), keys.open], args, lambda reply: reply[0].decode())


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ends: `status`, and what its state keeps of it, as JSON."""

    status: str
    finish_reasons: bytes = b"{}"
    error: bytes = b""


@dataclass(slots=True)
class Frame:
    """What one append call carries for one job: events `first`, `first` + 1, ... in compact form; none = heartbeat.

    `keys`: the names of its state and log; `holder`: see `holder`.
    """

    job_id: str
    keys: tuple[str, str]
    holder: str
    first: int
    events: Sequence[bytes] = ()
    usage: bytes = b""
    ending: Ending | None = None


def append(keys: Keys, lease: float, frames: Sequence[Frame]) -> Call[list[tuple[str, int, str]]]:
    """Write many jobs' events. The value is a list of (code, last seq, message), one per frame."""
    names = [keys.open, keys.ended, keys.repack]
    specs: list[str] = []
    args: list[Any] = [milliseconds(lease), len(frames)]
    for frame in frames:
        names += frame.keys
        if frame.ending is not None:
            args += (frame.holder, frame.first, len(frame.events), "end", *frame.events, frame.usage)
            args += (frame.ending.status, frame.ending.finish_reasons, frame.ending.error)
            specs.append(keys.spec(frame.job_id))
        elif frame.usage:
            args += (frame.holder, frame.first, len(frame.events), "usage", *frame.events, frame.usage)
        else:
            args += (frame.holder, frame.first, len(frame.events), "", *frame.events)
    names += specs
    return Call("append", names, args, _decode_append)


def _decode_append(reply: Sequence[Sequence[Any]]) -> list[tuple[str, int, str]]:
    return [(each[0].decode(), int(each[1]), each[2].decode() if len(each) > 2 else "") for each in reply]


def sweep(
    keys: Keys, lease: float, job_ids: Sequence[str], oldest: Mapping[str, int | None],
    lines: Mapping[str, str] | None = None,
) -> Call[list[tuple[str, ...]]]:  # fmt: skip
    """Find the due jobs nobody works on. `oldest`: by lane, since when the first of its deliveries has its place (ms);
    `lines`: by job, the key of the line its state names.

    The value is a list of (job id, lane, why), the youngest first.
    """
    names = [keys.open, keys.ended, keys.repack]
    for job_id in job_ids:
        names += (keys.state(job_id), keys.log(job_id), keys.spec(job_id), (lines or {}).get(job_id, keys.waiting))
    args: list[Any] = [milliseconds(lease), patience_ms(lease), len(oldest)]
    for lane, at in oldest.items():
        args += (lane, "" if at is None else at)
    return Call("sweep", names, [*args, *job_ids], lambda reply: [tuple(map(text_of, row)) for row in reply])


def repack(keys: Keys, job_id: str, packs: int = 64) -> Call[str]:
    """One step of moving an ended log into large packs. The value is `more`, `done` or `gone`."""
    names = [keys.state(job_id), keys.log(job_id), keys.building(job_id), keys.repack]
    return Call("repack", names, [job_id, packs, PACK_BYTES, BUILDING_MS], lambda reply: str(reply.decode()))


def _ending_keys(keys: Keys, job_id: str) -> list[str]:
    return [keys.state(job_id), keys.log(job_id), keys.spec(job_id), keys.open, keys.ended, keys.repack]
