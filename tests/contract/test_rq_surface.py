"""Everything of RQ that worker/rq_worker.py and millstream/delivery.py stand on, named, so that a new RQ is compared.

RQ documents its command line and `Queue.enqueue`; a worker class of one's own stands on its insides.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from rq import command, exceptions, suspension, utils
from rq.defaults import RQ_KEY_PREFIX
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.version import VERSION
from rq.worker import BaseWorker, WorkerStatus

from millstream import Settings, SettingsError
from millstream.delivery import FAILURE_TTL, QUEUES_KEY, RESULT_TTL, deliver, queue_key
from millstream.keys import Keys
from tests.valkey import Valkey
from worker import rq_worker
from worker.rq_worker import Entry, StreamWorker

SIGNATURES: Final[dict[Callable[..., Any], str]] = {
    command.handle_command: "worker, payload",
    command.parse_payload: "payload",
    utils.now: "",
    utils.utcformat: "dt",
    Queue.__init__: "self, name, connection, default_timeout, is_async, job_class, serializer, death_penalty_class, "
    "**kwargs",
    Job.create: "func, args, kwargs, connection, result_ttl, ttl, status, description, depends_on, timeout, retry, id, "
    "origin, meta, failure_ttl, serializer, group_id, on_success, on_failure, on_stopped, webhooks",
    Job.prepare_for_execution: "self, worker_name, pipeline",
    Job.set_status: "self, status, pipeline",
    Job._handle_success: "self, result_ttl, pipeline, worker_name, execution_id, execution_started_at, "
    "execution_ended_at",
    Job._handle_failure: "self, exc_string, pipeline, worker_name, execution_id, execution_started_at, "
    "execution_ended_at",
    Job.cleanup: "self, ttl, pipeline, remove_from_queue",
    Job.heartbeat: "self, timestamp, ttl, pipeline, xx",
    Job.restore: "self, raw_data",
    Job.to_dict: "self, include_meta, include_result",
    Execution.create: "job, ttl, pipeline, worker_name",
    Execution.heartbeat: "self, started_job_registry, ttl, pipeline",
    BaseWorker.__init__: "self, queues, name, default_result_ttl, connection, exception_handlers, "
    "maintenance_interval, default_worker_ttl, worker_ttl, job_class, queue_class, log_job_description, "
    "job_monitoring_interval, disable_default_exception_handler, prepare_for_work, serializer, "
    "work_horse_killed_handler",
    BaseWorker.register_birth: "self",
    BaseWorker.subscribe: "self",
    BaseWorker.teardown: "self",
    BaseWorker.handle_payload: "self, message",
    BaseWorker.set_state: "self, state, pipeline",
    BaseWorker.heartbeat: "self, timeout, pipeline",
    BaseWorker.get_heartbeat_ttl: "self, job, working_time",
    BaseWorker.increment_failed_job_count: "self, pipeline",
    BaseWorker.increment_successful_job_count: "self, pipeline",
    BaseWorker.increment_total_working_time: "self, job_execution_time, pipeline",
    BaseWorker.cleanup_execution: "self, job, pipeline, execution",
    BaseWorker.handle_job_failure: "self, job, queue, started_job_registry, exc_string, execution",
    BaseWorker.handle_job_success: "self, job, queue, started_job_registry, execution",
    BaseWorker.run_maintenance_tasks: "self",
    BaseWorker.queue_names: "self",
    BaseWorker.queue_keys: "self",
}

INHERITED: Final = {
    "cleanup_execution", "connection", "executions", "get_heartbeat_ttl", "handle_job_failure", "handle_job_success",
    "heartbeat", "increment_failed_job_count", "increment_successful_job_count", "increment_total_working_time",
    "job_monitoring_interval", "log", "name", "pubsub", "pubsub_thread", "queues", "register_birth",
    "run_maintenance_tasks", "set_state", "should_run_maintenance_tasks", "subscribe",
}  # fmt: skip
"""What StreamWorker uses of itself that BaseWorker gives; besides, `teardown`, `queue_names` and `queue_keys` are
called from outside."""

OF_A_JOB: Final = {
    "_handle_failure", "_handle_success", "_result", "cleanup", "dependents_key", "ended_at", "heartbeat", "id", "key",
    "origin", "prepare_for_execution", "set_status", "started_at", "started_job_registry",
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_a_signature_is_as_we_call_it(function: Callable[..., Any]) -> None:
    """Parameter names and their order; a new one is a reason to look."""
    found = [str(each).partition(":")[0].partition("=")[0] for each in inspect.signature(function).parameters.values()]
    assert ", ".join(found) == SIGNATURES[function]


def test_these_are_all_the_names_we_use(worker: StreamWorker) -> None:
    """What StreamWorker reads of itself and does not define is in INHERITED, so that no use goes uncompared."""
    tree = ast.parse(inspect.getsource(StreamWorker))
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    used = {each.attr for each in attributes if isinstance(each.value, ast.Name) and each.value.id == "self"}
    own = set(vars(StreamWorker)) | {"on_stop", "_entries"}
    assert used - own == INHERITED
    assert [name for name in INHERITED if not hasattr(worker, name)] == []


def test_these_are_all_the_names_we_use_of_an_rq_job() -> None:
    """The same for `job` and `entry.rq_job` in rq_worker.py."""
    tree = ast.parse(inspect.getsource(rq_worker))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_job(node.value)}
    assert used - {"create"} == OF_A_JOB
    job = Job.create("operator.add", connection=redis.Redis(), origin="q", serializer=JSONSerializer)
    assert [name for name in OF_A_JOB if not hasattr(job, name)] == []


def _is_job(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id == "job") or (
        isinstance(node, ast.Attribute) and node.attr == "rq_job"
    )


def test_names_in_redis_are_as_we_spell_them() -> None:
    """RQ's prefix, queues, intermediate lists, job hashes, suspension flag and command channel."""
    assert RQ_KEY_PREFIX == "rq"
    assert QUEUES_KEY == "rq:queues"
    assert suspension.WORKERS_SUSPENDED == "rq:suspended"
    assert command.PUBSUB_CHANNEL_TEMPLATE == "rq:pubsub:%s"
    queue = Queue("p-batch", connection=redis.Redis(), serializer=JSONSerializer)
    assert queue.key == queue_key(Keys("p"), "batch") == "rq:queue:p-batch"
    assert queue.intermediate_queue_key == "rq:queue:p-batch:intermediate"
    assert StartedJobRegistry(queue=queue).key == "rq:wip:p-batch"
    job = Job.create("f", id="x", connection=redis.Redis())
    assert (job.key, job.dependents_key) == ("rq:job:x", "rq:job:x:dependents")


def test_words_are_as_we_write_them() -> None:
    """The statuses people and dashboards see, and the error RQ's own code expects for a job that is not there."""
    assert [JobStatus.QUEUED, JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED, JobStatus.STARTED] == [
        "queued", "finished", "failed", "stopped", "started"
    ]  # fmt: skip
    assert (WorkerStatus.IDLE, WorkerStatus.BUSY) == ("idle", "busy")
    assert issubclass(exceptions.NoSuchJobError, Exception)
    assert isinstance(inspect.getattr_static(BaseWorker, "connection_timeout"), property)
    assert isinstance(inspect.getattr_static(BaseWorker, "should_run_maintenance_tasks"), property)


def test_an_rq_that_nobody_compared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed RQ is one that was compared; of another the worker says which to install."""
    rq_worker.check_release()
    assert VERSION.startswith("3.0.")
    for other in ("2.12.0", "3.1.0", "4.0"):
        monkeypatch.setattr(rq_worker, "VERSION", other)
        with pytest.raises(SettingsError, match=f"rq {other} is installed; this worker was checked with rq 3.0.x"):
            rq_worker.check_release()


# What is left in Redis, beside what RQ's own worker leaves -----------------------------------------------------------


@pytest.fixture
def connection(valkey: Valkey) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey.url) as made:
        made.flushall()
        yield made
        made.flushall()


def a_worker(connection: redis.Redis) -> StreamWorker:
    keys = Settings().keys
    return StreamWorker([keys.queue("interactive"), keys.queue("batch")], connection, "ours")


@pytest.fixture
def worker(connection: redis.Redis) -> Iterator[StreamWorker]:
    """A worker that is registered, and signs off after the test."""
    made = a_worker(connection)
    made.born()
    yield made
    made.teardown()  # type: ignore[no-untyped-call]


def take(
    worker: StreamWorker, connection: redis.Redis, job_id: str = "job", lane: str = "interactive"
) -> Entry:  # fmt: skip
    """An entry as intake has it: taken into the intermediate list, read and checked."""
    delivery = deliver(Settings().keys, job_id, lane)
    mapping: Any = delivery.fields
    connection.hset(delivery.job_key, mapping=mapping)
    connection.sadd(QUEUES_KEY, delivery.queue_key)
    connection.rpush(f"{delivery.queue_key}:intermediate", delivery.rq_id)
    fields: Any = connection.hgetall(delivery.job_key)
    return worker.read(["interactive", "batch"].index(lane), delivery.rq_id, fields)


def left(connection: redis.Redis, rq_id: str, worker_name: str) -> dict[str, tuple[object, bool]]:
    """Every key with its names made equal: the fields of a hash or the type, and whether it expires."""
    found: dict[str, tuple[object, bool]] = {}
    stored: Any = connection
    for key in map(bytes.decode, stored.scan_iter("*")):
        kind = stored.type(key)
        shape = frozenset(stored.hkeys(key)) if kind == b"hash" else kind
        name = key.replace(rq_id, "JOB").replace(worker_name, "WORKER").replace("millstream-interactive", "QUEUE")
        found[name] = (shape, stored.ttl(key) > 0)
    return found


def test_we_leave_what_rqs_own_worker_leaves(connection: redis.Redis, valkey: Valkey) -> None:
    """After one job that went well: the same keys, the same fields, the same of them expiring.

    The stock worker runs a job with the same options in a process of its own.
    """
    queue = Queue("millstream-interactive", connection=connection, serializer=JSONSerializer)
    stock = queue.enqueue("operator.add", 1, 1, result_ttl=RESULT_TTL, failure_ttl=FAILURE_TTL, job_timeout=-1)
    program = str(Path(sys.executable).with_name("rq"))
    options = ["--burst", "--quiet", "--serializer", "json", "--worker-class", "rq.worker.SimpleWorker"]
    command_line = [program, "worker", *options, "--name", "theirs", "--url", valkey.url, queue.name]
    subprocess.run(command_line, check=True, timeout=60)
    theirs = left(connection, stock.id, "theirs")
    connection.flushall()

    worker = a_worker(connection)
    worker.born()
    entry = take(worker, connection)
    worker.book([entry], [])
    worker.book([], [(entry, "completed")])
    worker.teardown()  # type: ignore[no-untyped-call]
    ours = left(connection, entry.rq_job.id, "ours")
    del theirs["rq:clean_groups"]  # the lock of a maintenance that ours had no reason for
    assert set(ours) == set(theirs)
    for name, (shape, expires) in theirs.items():
        assert ours[name] == (shape, expires), name
    job = Job.fetch(entry.rq_job.id, connection=connection, serializer=JSONSerializer)
    assert (job.get_status(), job.return_value()) == ("finished", "completed")


@pytest.mark.parametrize(("status", "counters"), [("completed", (1, 0)), ("failed", (0, 1))])
def test_of_a_batch_rq_keeps_the_counters_alone(
    worker: StreamWorker, connection: redis.Redis, status: str, counters: tuple[int, int]
) -> None:
    """A million rows would fill its registries; no key of the job stays."""
    entry = take(worker, connection, lane="batch")
    worker.book([entry], [])
    worker.book([], [(entry, status)])
    assert list(connection.scan_iter(f"rq:*{entry.job_id}*")) == []
    assert connection.keys("rq:finished:*") + connection.keys("rq:failed:*") + connection.keys("rq:wip:*") == []
    worker.refresh()  # type: ignore[no-untyped-call]
    assert (worker.successful_job_count, worker.failed_job_count) == counters
    assert worker.get_state() == "idle"


@pytest.mark.parametrize(
    ("status", "said", "counters"),
    [("completed", "finished", (1, 0)), ("incomplete", "finished", (1, 0)), ("cancelled", "finished", (1, 0)),
     ("failed", "failed", (0, 1)), ("stopped", "stopped", (0, 0))],
)  # fmt: skip
def test_an_end_is_booked(
    worker: StreamWorker, connection: redis.Redis, status: str, said: str, counters: tuple[int, int]
) -> None:
    """RQ's status, its counters and registries; nothing stays started, in between, or without an expiry."""
    entry = take(worker, connection)
    rq_id = entry.rq_job.id
    worker.book([entry], [])
    stored: Any = connection
    assert entry.execution is not None
    assert stored.zrange("rq:wip:millstream-interactive", 0, -1) == [f"{rq_id}:{entry.execution.id}".encode()]
    assert stored.lrange("rq:queue:millstream-interactive:intermediate", 0, -1) == []
    assert worker.get_state() == "busy"
    assert Job.fetch(rq_id, connection=connection, serializer=JSONSerializer).worker_name == "ours"
    worker.beat()
    worker.book([], [(entry, status)])
    assert Job.fetch(rq_id, connection=connection, serializer=JSONSerializer).get_status() == said
    assert stored.zrange("rq:wip:millstream-interactive", 0, -1) == []
    assert worker.get_state() == "idle"
    worker.refresh()  # type: ignore[no-untyped-call]
    assert (worker.successful_job_count, worker.failed_job_count) == counters
    assert 0 < stored.ttl(entry.rq_job.key) <= (FAILURE_TTL if status == "failed" else RESULT_TTL)


def test_a_crowd_is_booked_at_once(worker: StreamWorker, connection: redis.Redis) -> None:
    """100 beginnings and ends: the server reads less than once for each job; RQ's own way takes 20 round trips."""
    stored: Any = connection
    entries = [take(worker, connection, f"job-{number}") for number in range(100)]
    before = stored.info("stats")["total_reads_processed"]
    worker.book(entries, [])
    worker.book([], [(entry, "completed") for entry in entries])
    spent = stored.info("stats")["total_reads_processed"] - before
    assert stored.zcard("rq:finished:millstream-interactive") == 100
    assert spent < 100


def test_broken_dependents_are_their_own_problem(worker: StreamWorker, connection: redis.Redis) -> None:
    """Whatever stands where RQ keeps the dependents of one delivery, the others' books are written, once."""
    stored: Any = connection
    entries = [take(worker, connection, f"job-{number}") for number in range(3)]
    stored.set(entries[0].rq_job.dependents_key, "text")
    stored.sadd(entries[1].rq_job.dependents_key, b"\xff\xfe", "gone")
    worker.book(entries, [])
    worker.book([], [(entry, "completed") for entry in entries])
    worker.refresh()  # type: ignore[no-untyped-call]
    assert worker.get_state() == "idle"
    done = Job.fetch(entries[2].rq_job.id, connection=connection, serializer=JSONSerializer)
    assert done.get_status() == "finished"
