"""What the server can do to a call: forget its scripts, be full, be RQ's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from rq import Queue
from rq.serializers import JSONSerializer

from millstream import AsyncClient, Client, RedisUnavailable, Settings
from millstream.calls import submit
from millstream.delivery import queue_key
from millstream.job import FUNCTION, build
from millstream.scripts import NAMES
from tests.contract.conftest import COMPLETED, DONE, STARTED, Hands
from tests.oracle import check_log

only_valkey = pytest.mark.parametrize("backend", ["valkey"], indirect=True)

TIMES = {b"created_at", b"enqueued_at"}


@pytest.mark.parametrize("lane", ["interactive", "batch"])
def test_our_delivery_is_what_rq_itself_would_write(client: Client, lane: str) -> None:
    """The hash, the queue's list and the set of queues of `Queue.enqueue_call`: fields and values, but for times."""
    rq_queue = Queue(client.keys.queue(lane), connection=client.redis, serializer=JSONSerializer)
    client.submit("Hi", id="j", lane=lane)
    (ours,) = client.redis.lrange(queue_key(client.keys, lane), 0, -1)
    our_hash = client.redis.hgetall(b"rq:job:" + ours)
    our_queues = client.redis.smembers("rq:queues")
    client.redis.delete(b"rq:job:" + ours, "rq:queues", queue_key(client.keys, lane))

    rq_queue.enqueue_call(
        FUNCTION, args=("j",), job_id=ours.decode(), description="millstream job j", timeout=-1, result_ttl=60,
        failure_ttl=3600,
    )  # fmt: skip
    theirs = client.redis.hgetall(b"rq:job:" + ours)
    assert client.redis.lrange(queue_key(client.keys, lane), 0, -1) == [ours]
    assert client.redis.smembers("rq:queues") == our_queues
    assert set(our_hash) == set(theirs)
    assert {k: v for k, v in our_hash.items() if k not in TIMES} == {k: v for k, v in theirs.items() if k not in TIMES}
    assert all(len(our_hash[name]) == len(theirs[name]) for name in TIMES)


def test_rq_finds_our_delivery(client: Client) -> None:
    """RQ's own classes read it: its function, its one argument, its limits."""
    client.submit("Hi", id="j")
    rq_queue = Queue(client.keys.queue("interactive"), connection=client.redis, serializer=JSONSerializer)
    (job,) = rq_queue.get_jobs()
    assert (job.func_name, job.args, job.kwargs, job.timeout) == (FUNCTION, ["j"], {}, -1)
    assert (job.result_ttl, job.failure_ttl, job.description) == (60, 3600, "millstream job j")


def whole_life(client: Client, hands: Hands) -> None:
    """One call of every script."""
    client.submit("Hi", id="j")
    hands.begin("j", "a")
    hands.release("j")
    hands.make_due("j")
    assert hands.sweep("j")
    client.cancel("j")
    client.forget("j")


@only_valkey
def test_a_server_that_forgot_the_scripts_gets_them_again(client: Client, hands: Hands) -> None:
    """SCRIPT FLUSH, a restart or a failover before any call: every script is sent once more, and works."""

    class Forgetful:
        """Flushes the server's scripts before each call by name."""

        def __init__(self, redis: Any) -> None:
            self.redis, self.flushed = redis, 0

        def __getattr__(self, name: str) -> Any:
            if name == "evalsha":
                self.redis.script_flush()
                self.flushed += 1
            return getattr(self.redis, name)

    forgetful = Forgetful(client.redis)
    client.redis = forgetful
    whole_life(client, hands)
    life = {name for name in NAMES if not name.startswith("limit_")} - {"deliver", "take", "repack"}
    assert forgetful.flushed >= len(life), "all of a job's life"
    client.submit_many([{"prompt": "Hi", "id": f"m{i}"} for i in range(3)])
    for i in range(3):
        client.cancel(f"m{i}")
        check_log(client, f"m{i}")


@only_valkey
async def test_the_async_client_sends_scripts_again_too(async_client: AsyncClient, client: Client) -> None:
    """NOSCRIPT on the other client."""
    client.redis.script_flush()
    await async_client.submit("Hi", id="j")
    client.redis.script_flush()
    assert await async_client.cancel("j") == "cancelled"
    check_log(client, "j")


@pytest.fixture
def full(client: Client, hands: Hands) -> Iterator[Client]:
    """A server at maxmemory, with j0 queued, j1 running, j2 held, j3 ended and j4 to be swept."""
    for i in range(5):
        client.submit("Hi", id=f"j{i}")
    hands.begin("j1", "a")
    hands.begin("j2", "a")
    client.cancel("j3")
    hands.make_due("j4")
    client.redis.config_set("maxmemory", "1mb")
    yield client
    client.redis.config_set("maxmemory", "0")


@only_valkey
def test_a_full_server_refuses_a_job_and_keeps_nothing_of_it(full: Client, hands: Hands) -> None:
    """In words that say what to do; the same submit succeeds once there is room."""
    before = hands.everything()
    with pytest.raises(RedisUnavailable, match=r"is full \(maxmemory\): nothing was accepted"):
        full.submit("Hi", id="new")
    with pytest.raises(RedisUnavailable, match="is full"):
        full.submit_many([{"prompt": "Hi", "id": f"new{i}"} for i in range(3)])
    assert hands.everything() == before
    full.redis.config_set("maxmemory", "0")
    assert full.submit("Hi", id="new").created
    full.cancel("new")


@only_valkey
def test_a_full_server_lets_running_jobs_end(full: Client, hands: Hands) -> None:
    """claim, append, heartbeat, release, cancel, sweep and forget still work: they are what makes room again."""
    assert hands.claim("j0").outcome == "claimed"
    assert hands.append("j0", 1, STARTED, b'"a"') == ("ok", 2)
    assert hands.append("j0", 3, DONE, ending=COMPLETED) == ("ok", 3)
    assert full.cancel("j1") == "cancelled"
    assert hands.append("j2", 3) == ("ok", 2)
    assert hands.release("j2") == "released"
    assert hands.sweep("j4") == [("j4", "interactive", "vanished")]
    full.forget("j3")
    for job_id in ("j0", "j1", "j3"):
        check_log(full, job_id)
    assert [event.type for event in full.follow("j1")] == ["started", "chunk", "cancelled"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://:hunter2@127.0.0.1:1/0", "Redis at 127.0.0.1:1 cannot be reached"),
        ("unix:///nowhere/redis.sock", "Redis at /nowhere/redis.sock cannot be reached"),
    ],
)
def test_a_server_that_is_away_is_named_without_its_password(
    url: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was looked for, and what to do: start one, or set REDIS_URL."""
    monkeypatch.setattr("millstream.redis_door.RETRIES", 1)
    with Client(url) as client:
        for call in (lambda: client.submit("Hi"), lambda: client.status("j"), lambda: list(client.follow("j"))):
            with pytest.raises(RedisUnavailable, match=words) as caught:
                call()
            assert "set REDIS_URL" in str(caught.value)
            assert "hunter2" not in str(caught.value)


@only_valkey
def test_refusals_of_the_server_are_said_in_words(
    client: Client, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong password, a user who may not, a key that is something else."""
    monkeypatch.setattr("millstream.redis_door.RETRIES", 0)
    client.redis.config_set("requirepass", "right")
    try:
        with Client(settings.redis_url.replace("//", "//:wrong@")) as stranger:
            with pytest.raises(RedisUnavailable, match="refused the password; check REDIS_URL") as caught:
                stranger.status("j")
            assert "wrong" not in str(caught.value)
        with Client(settings.redis_url) as stranger, pytest.raises(RedisUnavailable, match="password and got none"):
            stranger.status("j")
    finally:
        client.redis.config_set("requirepass", "")
    client.redis.acl_setuser("reader", enabled=True, passwords=["+pw"], commands=["+get"], keys=["*"])
    reader = Client(settings.redis_url.replace("//", "//reader:pw@"))
    with reader, pytest.raises(RedisUnavailable, match="does not allow this user"):
        reader.submit("Hi")
    client.redis.acl_deluser("reader")
    client.redis.set(client.keys.open, "no zset", ex=60)
    with pytest.raises(RedisUnavailable, match="refused: WRONGTYPE"):
        client.list()
    client.redis.delete(client.keys.open)


@only_valkey
def test_a_spec_of_four_megabytes_is_carried(client: Client) -> None:
    """The largest that is taken."""
    text = "x" * (4 * 1024 * 1024 - 200)
    client.submit(text, id="j")
    assert client.redis.strlen(client.keys.spec("j")) > len(text)
    call = submit(client.keys, client.settings, "j", build(text, model=client.settings.model))
    assert client.run(call) is False
    client.cancel("j")
