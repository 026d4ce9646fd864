"""A job's state, as its hash in Redis says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from .events import TERMINAL_STATUSES


class Status(Struct, frozen=True, kw_only=True):
    """One job's state. Times are Unix seconds by the server's clock, None while they lie ahead.

    `status`: queued, in_progress, completed, incomplete, failed or cancelled. `seq`: events in the log.
    `attempt`: the newest attempt; `broken`: how many broke or were lost. `wait`: what a queued job waits for, until
    when.
    """

    id: str
    status: str
    lane: str
    model: str
    attempt: int = 0
    broken: int = 0
    seq: int = 0
    created_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    wait: dict[str, Any] | None = None
    finish_reasons: dict[int, str] = {}
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    metadata: dict[str, str] = {}

    @property
    def ended(self) -> bool:
        """Whether the terminal event has been written."""
        return self.status in TERMINAL_STATUSES


def from_hash(job_id: str, fields: Mapping[bytes, bytes], metadata: dict[str, str] | None = None) -> Status:
    """Read the state hash. Raises KeyError, ValueError or the like for one that Millstream did not write."""

    def number(name: bytes) -> int:
        return int(fields.get(name) or 0)

    def seconds(name: bytes) -> float | None:
        return int(fields[name]) / 1000 if fields.get(name) else None

    def parsed(name: bytes) -> Any:
        return msgspec.json.decode(fields[name]) if fields.get(name) else None

    wait = parsed(b"wait")
    if wait is not None or fields.get(b"not_before"):
        wait = {**(wait or {}), "until": seconds(b"not_before") or seconds(b"until")}
    return Status(
        id=job_id,
        status=fields[b"status"].decode(),
        lane=fields.get(b"lane", b"").decode(),
        model=fields.get(b"model", b"").decode(),
        attempt=number(b"attempt"),
        broken=number(b"broken"),
        seq=number(b"seq"),
        created_at=seconds(b"created"),
        started_at=seconds(b"started"),
        ended_at=seconds(b"ended"),
        wait=wait,
        finish_reasons={int(index): reason for index, reason in (parsed(b"finish_reasons") or {}).items()},
        usage=parsed(b"usage"),
        error=parsed(b"error"),
        metadata=metadata or {},
    )


def from_replies(job_ids: Sequence[str], replies: Sequence[Any]) -> list[Status]:
    """The jobs that are there, from the replies of HGETALL state and GET spec for each.

    A state that somebody else wrote over is left out: it must not hide the other jobs.
    """
    found = []
    for job_id, fields, spec in zip(job_ids, replies[::2], replies[1::2], strict=True):
        if not (isinstance(fields, dict) and fields):  # the error of a key that was made another type
            continue
        try:
            found.append(from_hash(job_id, fields, _metadata_in(spec) if isinstance(spec, bytes) else None))
        except (
            LookupError,
            ArithmeticError,
            ValueError,
            TypeError,
            AttributeError,
            RecursionError,
            msgspec.MsgspecError,
        ):
            continue
    return found


def _metadata_in(spec: bytes) -> dict[str, str]:
    try:
        return _metadata.decode(spec).metadata
    except (msgspec.MsgspecError, UnicodeError, RecursionError):  # one malformed spec must not hide the other jobs
        return {}


class _Metadata(Struct):
    metadata: dict[str, str] = {}


_metadata = msgspec.json.Decoder(_Metadata)
