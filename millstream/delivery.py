"""The RQ job that brings a Millstream job to a worker: its name, its hash, its queue.

RQ delivers, the log decides: a delivery carries the job's id and nothing else, and may come twice. Its RQ id is
`JOB-NONCE`, fresh each time, because a reused one loses the job when RQ expires the hash of an earlier delivery
(RQ allows letters, digits, `_` and `-` in an id, so the nonce is set off by a dash and has a fixed length).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Final

from rq.defaults import RQ_KEY_PREFIX
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.utils import now

from .job import FUNCTION, ID_PATTERN
from .keys import LANES, Keys

NONCE_LENGTH: Final = 8
RESULT_TTL: Final = 60
"""Seconds RQ keeps a delivery's hash after its end; the truth is in the log."""
FAILURE_TTL: Final = 3600
BULK: Final = LANES[1]
"""The lane of whose jobs RQ keeps nothing after their end but its counters."""
QUEUES_KEY: Final = Queue.redis_queues_keys


@dataclass(frozen=True, slots=True)
class Delivery:
    """One entry for an RQ queue. `fields` is the hash RQ's own enqueue would write."""

    rq_id: str
    job_key: str
    queue_key: str
    fields: dict[str, Any]

    @property
    def flat_fields(self) -> list[Any]:
        """field, value, field, value, ..."""
        return [part for pair in self.fields.items() for part in pair]


def queue_key(keys: Keys, lane: str) -> str:
    """The Redis list behind a lane's RQ queue."""
    return f"{RQ_KEY_PREFIX}:queue:{keys.queue(lane)}"


def deliver(keys: Keys, job_id: str, lane: str) -> Delivery:
    """A fresh delivery of a job. The description is set, since RQ's default would be the call with its arguments."""
    rq_job = Job.create(
        FUNCTION,
        args=(job_id,),
        id=f"{job_id}-{secrets.token_hex(NONCE_LENGTH // 2)}",
        origin=keys.queue(lane),
        description=f"millstream job {job_id}",
        timeout=-1,  # the worker's own clocks decide
        result_ttl=RESULT_TTL,
        failure_ttl=FAILURE_TTL,
        status=JobStatus.QUEUED,
        connection=_NEVER_USED,
        serializer=JSONSerializer,
    )
    rq_job.enqueued_at = now()
    return Delivery(rq_job.id, rq_job.key, queue_key(keys, lane), rq_job.to_dict())


def job_of(rq_id: str) -> str | None:
    """The Millstream job a delivery is for, or None when the name is not one of ours."""
    job_id, dash, nonce = rq_id[: -NONCE_LENGTH - 1], rq_id[-NONCE_LENGTH - 1 : -NONCE_LENGTH], rq_id[-NONCE_LENGTH:]
    ours = dash == "-" and len(nonce) == NONCE_LENGTH and ID_PATTERN.fullmatch(job_id)
    return job_id if ours else None


class _NoConnection:
    """RQ wants a connection to make a job; making and describing one needs none."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a delivery must not talk to Redis ({name})")


_NEVER_USED: Any = _NoConnection()
