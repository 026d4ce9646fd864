"""Everything of RQ that this worker touches, in one place. `tests/contract/test_rq_surface.py` names each of it.

`StreamWorker` is an RQ worker to everyone outside: registered, with a heartbeat, a state, executions and counters;
it obeys commands. What it does not do is fork, nor is RQ's `work` called: process.py runs the jobs on one loop. RQ's
bookkeeping is done in batches, in one thread beside the loop, with RQ's own functions on one transaction per batch
instead of 20 round trips per job. Kept thin, to move onto RQ's own AsyncWorker when it comes (rq pull request 2445).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import redis
import redis.exceptions
from redis.client import PubSub, PubSubWorkerThread
from rq.command import handle_command, parse_payload
from rq.defaults import RQ_KEY_PREFIX
from rq.exceptions import NoSuchJobError
from rq.executions import Execution
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.suspension import WORKERS_SUSPENDED
from rq.utils import now, utcformat
from rq.version import VERSION
from rq.worker import BaseWorker, WorkerStatus

from millstream.calls import Call
from millstream.delivery import BULK, FAILURE_TTL, RESULT_TTL
from millstream.errors import SettingsError
from millstream.job import FUNCTION, check_id
from millstream.redis_door import COMMAND_TIMEOUT

CHECKED: Final = ("3.0",)
"""RQ releases (major.minor) whose insides were compared with this module."""

MAX_DATA: Final = 4096
"""Bytes of a delivery's call, unpacked: function, id and brackets are about 120."""

BEATS_PER_TRANSACTION: Final = 100
_REFUSED: Final = (
    "success_callback_name", "failure_callback_name", "stopped_callback_name", "webhooks", "retries_left",
    "retry_intervals", "repeats_left", "rate_limit_key",
)  # fmt: skip


class PoisonError(Exception):
    """A queue entry that must not run; the message says why."""


def check_release() -> None:
    """Refuse an RQ whose insides nobody has compared with this module."""
    if ".".join(VERSION.split(".")[:2]) not in CHECKED:
        raise SettingsError(
            f"rq {VERSION} is installed; this worker was checked with rq {', '.join(CHECKED)}.x: install one of these"
        )


@dataclass(slots=True)
class Entry:
    """One delivery in hand: an RQ job that asks for a Millstream job."""

    job_id: str
    rq_job: Job
    execution: Execution | None = None
    since: float = 0.0
    """When the job was submitted (ms), once its state was read."""


class DeliveryJob(Job):
    """An RQ job as its hash says, but for what would make RQ run something: its maintenance reads hashes too."""

    def restore(self, raw_data: Mapping[bytes, Any]) -> Any:
        """Raises NoSuchJobError, which RQ expects, for a hash that cannot be read."""
        harmless = {name: value for name, value in raw_data.items() if name.decode("utf-8", "replace") not in _REFUSED}
        try:
            return super().restore(harmless)
        except (ValueError, TypeError, AttributeError) as error:
            raise NoSuchJobError(f"the hash of job {self.id} cannot be read: {error}") from None


class StreamWorker(BaseWorker):
    """An RQ worker that runs many jobs on one loop."""

    def __init__(self, queue_names: Sequence[str], connection: redis.Redis, name: str | None, **kwargs: Any) -> None:
        super().__init__(
            [
                Queue(each, connection=connection, serializer=JSONSerializer, job_class=DeliveryJob)
                for each in queue_names
            ],
            name=name, connection=connection, serializer=JSONSerializer, job_class=DeliveryJob,
            log_job_description=False, **kwargs,
        )  # fmt: skip
        self.on_stop: Callable[[str], object] = lambda _rq_id: None
        """Called from RQ's command thread with the RQ id of a job that is to stop."""
        self._entries: dict[str, Entry] = {}

    @property
    def connection_timeout(self) -> int:
        """RQ lengthens the socket timeout to outlast a blocking pop; nothing blocks on this connection."""
        return int(COMMAND_TIMEOUT)

    # Life ----------------------------------------------------------------------------------------------------------

    def born(self) -> None:
        """Register and listen for commands."""
        self.register_birth()  # type: ignore[no-untyped-call]
        self.subscribe()  # type: ignore[no-untyped-call]
        self.set_state(WorkerStatus.IDLE)

    def unsubscribe(self) -> None:
        """Stop listening. RQ's own order wakes the thread before it may stop, and often waits a second in vain."""
        thread: Any = self.pubsub_thread
        if thread is not None and self.pubsub is not None:
            thread.stop()
            self.pubsub.unsubscribe()  # wakes the thread, which closes it
            thread.join(timeout=1)

    def _pubsub_exception_handler(self, exc: Exception, pubsub: PubSub, pubsub_thread: PubSubWorkerThread) -> None:
        """Go on listening for commands whatever Redis says; RQ's own gives up after a timeout or an error reply."""
        away = redis.exceptions.ConnectionError(str(exc)) if isinstance(exc, redis.exceptions.RedisError) else exc
        super()._pubsub_exception_handler(away, pubsub, pubsub_thread)

    def handle_payload(self, message: Mapping[str, Any]) -> None:
        """A command: stopping a job cancels it; the rest is RQ's (shutdown is a SIGINT to this process)."""
        try:
            payload = parse_payload(dict(message))
            if payload["command"] in ("stop-job", "stop-execution"):
                self.on_stop(str(payload["job_id"]))
            elif payload["command"] != "kill-horse":  # there is no horse
                handle_command(self, payload)
        except (KeyError, TypeError, ValueError):
            self.log.warning("a command that cannot be read was ignored")

    # Taking --------------------------------------------------------------------------------------------------------

    def take(self, most: int) -> Call[list[tuple[int, str]] | None]:
        """The call that moves up to `most` entries into the intermediate lists: (queue number, RQ id), None =
        suspended.
        """
        names = [WORKERS_SUSPENDED]
        for queue in self.queues:
            names += (queue.key, queue.intermediate_queue_key)

        def decode(reply: list[Any]) -> list[tuple[int, str]] | None:
            if reply[0] == b"suspended":
                return None
            return [
                (int(i) - 1, rq_id.decode("utf-8", "surrogateescape"))
                for i, rq_id in zip(reply[1::2], reply[2::2], strict=True)
            ]

        return Call("take", names, [most], decode)

    def intermediate_of(self, queue_name: str) -> str:
        """The list that holds what was taken from a queue, whether this worker serves it or not."""
        return IntermediateQueue.get_intermediate_queue_key(f"{Queue.redis_queue_namespace_prefix}{queue_name}")

    def job_key(self, rq_id: str) -> bytes:
        """Where RQ keeps the hash of a job."""
        return _raw(f"{RQ_KEY_PREFIX}:job:{rq_id}")

    def queue_of(self, fields: Mapping[bytes, bytes]) -> int:
        """The number of the queue an entry's hash says it comes from. Raises PoisonError."""
        origin = fields.get(b"origin", b"").decode("utf-8", "replace")
        for number, queue in enumerate(self.queues):
            if queue.name == origin:
                return number
        raise PoisonError(
            "its hash is gone" if not fields else f"it comes from no lane of this worker: {origin[:60]!r}"
        )

    def read(self, queue_number: int, rq_id: str, fields: Mapping[bytes, bytes]) -> Entry:
        """Check an entry's hash, which anybody may have written. Raises PoisonError.

        Nothing of it is used but the job's id: the RQ job for the bookkeeping is made anew.
        """
        if not fields:
            raise PoisonError("its hash is gone")
        for name in _REFUSED:
            if fields.get(name.encode()):
                raise PoisonError(f"it carries {name}, which this worker does not run")
        job_id = _asked_for(fields.get(b"data", b""))
        rq_job = Job.create(
            FUNCTION,
            args=(job_id,),
            id=rq_id,
            origin=self.queues[queue_number].name,
            description=f"millstream job {job_id}",
            timeout=-1,
            result_ttl=RESULT_TTL,
            failure_ttl=FAILURE_TTL,
            connection=self.connection,
            serializer=JSONSerializer,
        )
        return Entry(job_id, rq_job)

    # Books: all of this runs in one thread -------------------------------------------------------------------------

    def book(self, started: Sequence[Entry], ended: Sequence[tuple[Entry, str]]) -> None:
        """Write what began and what ended: one transaction, after one look for dependents."""
        with self.connection.pipeline(transaction=True) as pipe:
            waited_for: set[str] = set()
            if ended:
                keys = [entry.rq_job.dependents_key for entry, _ in ended]
                pipe.watch(*keys)
                if pipe.exists(*keys):
                    waited_for = {key for key in keys if pipe.exists(key)}
            pipe.multi()
            for entry in started:
                self._book_start(entry, pipe)
            for entry, status in ended:
                if entry.rq_job.dependents_key not in waited_for:
                    self._book_end(entry, status, pipe)
            self._tell_state(pipe)
            pipe.execute()
        for entry, status in ended:
            if entry.rq_job.dependents_key in waited_for:
                self._end_for_dependents(entry, status)
        if waited_for:
            self._tell_state()

    def _tell_state(self, pipe: Any = None) -> None:
        self.set_state(WorkerStatus.BUSY if self._entries else WorkerStatus.IDLE, pipeline=pipe)

    def _book_start(self, entry: Entry, pipe: Any) -> None:
        job = entry.rq_job
        pipe.lrem(self._queue_of(job).intermediate_queue_key, 1, job.id)
        entry.execution = Execution.create(job, self.get_heartbeat_ttl(job), pipeline=pipe, worker_name=self.name)
        self.executions[entry.execution.id] = entry.execution
        job.prepare_for_execution(self.name, pipeline=pipe)
        pipe.persist(job.key)
        self._entries[job.id] = entry

    def _book_end(self, entry: Entry, status: str, pipe: Any) -> None:
        job, execution = entry.rq_job, entry.execution
        self._entries.pop(job.id, None)
        job.ended_at = now()
        job._result = status  # noqa: SLF001 - what RQ's own finish stores as the return value
        times: dict[str, Any] = {
            "worker_name": self.name, "execution_id": execution.id if execution else None,
            "execution_started_at": execution.created_at if execution else None, "execution_ended_at": job.ended_at,
        }  # fmt: skip
        if execution is None:
            pipe.lrem(self._queue_of(job).intermediate_queue_key, 1, job.id)
            job.started_at = job.ended_at
        if job.origin.endswith(f"-{BULK}"):
            # RQ's hash, result and registry entry of a job take 6 KB for a minute: of a batch, that would be nearly all
            # of Redis. What became of its rows stands in its output.
            counted = self.increment_failed_job_count if status == "failed" else self.increment_successful_job_count
            counted(pipeline=pipe)
            pipe.delete(job.key)
        elif status == "failed":
            self.increment_failed_job_count(pipeline=pipe)
            job.set_status(JobStatus.FAILED, pipeline=pipe)
            job._handle_failure("the job failed; its log says why", pipeline=pipe, **times)  # noqa: SLF001
        elif status == "stopped":
            job.set_status(JobStatus.STOPPED, pipeline=pipe)
            pipe.expire(job.key, RESULT_TTL)
        else:
            self.increment_successful_job_count(pipeline=pipe)
            job._handle_success(RESULT_TTL, pipeline=pipe, **times)  # noqa: SLF001
            job.cleanup(RESULT_TTL, pipeline=pipe, remove_from_queue=False)
        self.increment_total_working_time(job.ended_at - (job.started_at or job.ended_at), pipe)
        self.cleanup_execution(job, pipeline=pipe, execution=execution)

    def _end_for_dependents(self, entry: Entry, status: str) -> None:
        try:
            self._end_with_dependents(entry, status)
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
            raise
        except Exception as error:  # noqa: BLE001 - RQ's code on what anybody may have written there
            self.log.warning("the dependents of %s cannot be enqueued: %s", entry.rq_job.id, type(error).__name__)
            with self.connection.pipeline(transaction=True) as pipe:
                self._book_end(entry, status, pipe)
                pipe.execute()

    def _end_with_dependents(self, entry: Entry, status: str) -> None:
        """RQ's own way: other RQ jobs wait for this one."""
        job = entry.rq_job
        self._entries.pop(job.id, None)
        job.ended_at = now()
        job.started_at = job.started_at or job.ended_at
        job._result = status  # noqa: SLF001
        queue = self._queue_of(job)
        if status in ("failed", "stopped") or entry.execution is None:
            self.handle_job_failure(
                job, queue, exc_string="the job failed; its log says why", execution=entry.execution
            )
        else:
            self.handle_job_success(job, queue, queue.started_job_registry, entry.execution)

    def put_aside(self, queue_number: int, rq_id: str, reason: str, keep: bool) -> None:
        """Take a poisoned entry out of the way; with `keep` its hash stays for a while, failed, with the reason."""
        queue = self.queues[queue_number]
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.lrem(queue.intermediate_queue_key, 1, _raw(rq_id))  # type: ignore[arg-type]
            if keep:
                key = self.job_key(rq_id)
                mapping: dict[str, Any] = {
                    "status": "failed",
                    "ended_at": utcformat(now()),
                    "exc_info": zlib.compress(reason.encode()),
                }
                pipe.hset(key, mapping=mapping)  # type: ignore[arg-type]
                pipe.expire(key, FAILURE_TTL)
            pipe.execute(raise_on_error=False)

    def beat(self) -> None:
        """Heartbeats of the worker and of every execution, so that RQ does not take them for abandoned."""
        entries = list(self._entries.values())
        for start in range(0, max(1, len(entries)), BEATS_PER_TRANSACTION):
            with self.connection.pipeline(transaction=True) as pipe:
                self.heartbeat(self.job_monitoring_interval + 60, pipeline=pipe)
                for entry in entries[start : start + BEATS_PER_TRANSACTION]:
                    if entry.execution is not None:
                        ttl = self.get_heartbeat_ttl(entry.rq_job)
                        entry.execution.heartbeat(entry.rq_job.started_job_registry, ttl, pipeline=pipe)
                        entry.rq_job.heartbeat(now(), ttl, pipeline=pipe, xx=True)
                pipe.execute()

    def maintain(self) -> None:
        """RQ's own maintenance, when it is due. It judges deliveries; the fate of a job is decided by its log."""
        if self.should_run_maintenance_tasks:
            self.run_maintenance_tasks()  # type: ignore[no-untyped-call]

    def _queue_of(self, job: Job) -> Queue:
        return next(queue for queue in self.queues if queue.name == job.origin)


def _raw(name: str) -> bytes:
    """As it stood in the queue: not everything there is text."""
    return name.encode("utf-8", "surrogateescape")


def _asked_for(data: bytes) -> str:
    """The job id in a delivery's call. Raises PoisonError unless it is a call of our one function with one id."""
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(data, MAX_DATA) if data[:1] == b"x" else data[: MAX_DATA + 1]
    except zlib.error:
        raise PoisonError("its data cannot be unpacked") from None
    if len(plain) > MAX_DATA or unpacker.unconsumed_tail:
        raise PoisonError("its data is larger than a delivery's")
    try:
        function, instance, args, kwargs = JSONSerializer.loads(plain)
    except (ValueError, TypeError, RecursionError):
        raise PoisonError("its data is not the JSON of a call") from None
    if function != FUNCTION:
        raise PoisonError(f"it asks for the function {str(function)[:60]!r}; only {FUNCTION} runs here")
    if instance is not None or kwargs or not isinstance(args, list) or len(args) != 1:
        raise PoisonError("its call has more than one argument")
    try:
        return check_id(args[0])
    except ValueError as error:
        raise PoisonError(str(error)) from None
