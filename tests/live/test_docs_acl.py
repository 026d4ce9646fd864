"""The users of docs/operations.md, on a real server: each can do its work and not another's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from millstream import Client, RedisUnavailable, Settings
from millstream.redis_door import connect
from tests.upstream import ScriptedUpstream
from tests.valkey import Valkey

ROOT = Path(__file__).parents[2]
USERS = re.findall(r"^user (\w+) (on .+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)


@pytest.fixture
def server(valkey: Valkey) -> Iterator[Valkey]:
    """An empty server with the page's users. Its default user stays, as the administrator who reads the ACL log."""
    with connect(valkey.url) as connection:
        connection.flushall()
        connection.acl_log_reset()
        for name, rules in USERS:
            connection.execute_command("ACL", "SETUSER", name, *rules.split())
        yield valkey
        connection.acl_deluser("guest", *(name for name, _ in USERS))
        connection.flushall()


def _url(server: Valkey, user: str) -> str:
    return server.url.replace("redis://", f"redis://{user}:PASSWORD@")


def _client(server: Valkey, user: str) -> Client:
    return Client(settings=Settings(redis_url=_url(server, user), model="m", retention=60))


def _denials(server: Valkey) -> list[tuple[str, str]]:
    with connect(server.url) as connection:
        return [(each["username"], each["object"]) for each in connection.acl_log()]


def _work_off(server: Valkey, base_url: str) -> None:
    """Run the worker until the lanes are empty."""
    environ = {**os.environ, "REDIS_URL": _url(server, "worker"), "OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": "k"}
    environ["MILLSTREAM_RPM"] = "1000"
    command = [sys.executable, "-m", "worker", "--burst"]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_each_user_may_do_its_work(server: Valkey) -> None:
    """Nothing that producer, worker and consumer need is denied."""
    with _client(server, "producer") as producer, ScriptedUpstream() as upstream:
        asked = [producer.submit("Hello"), *producer.submit_many([{"prompt": "A"}, {"prompt": "B", "lane": "batch"}])]
        dropped = producer.submit("Never mind")
        assert producer.cancel(dropped.id) == "cancelled"
        _work_off(server, upstream.base_url)
        assert [producer.result(job.id, timeout=10).status for job in asked] == ["completed"] * 3
        producer.forget(asked[0].id)
        assert [each.requests.limit for each in producer.limits()] == [1000]
        assert {each.id for each in producer.list()} == {dropped.id, *(job.id for job in asked)}
    with _client(server, "consumer") as consumer:
        assert [event.seq for event in consumer.follow(asked[1].id)][:2] == [1, 2]
        assert consumer.status(asked[1].id).ended
        assert next(consumer.ended("0")).id == dropped.id
        assert len(consumer.list()) == 4
    assert _denials(server) == []


def test_a_consumer_can_write_nothing(server: Valkey) -> None:
    """It can neither ask for a job, nor end one, nor speak on a channel."""
    with _client(server, "producer") as producer:
        job = producer.submit("Hello")
    with _client(server, "consumer") as consumer:
        for forbidden in (lambda: consumer.submit("Hello"), lambda: consumer.cancel(job.id)):
            with pytest.raises(RedisUnavailable, match="check its ACL"):
                forbidden()
        assert consumer.status(job.id).status == "queued"
    assert {user for user, _ in _denials(server)} == {"consumer"}


def test_a_consumer_of_one_job_sees_no_other(server: Valkey) -> None:
    """With a job's id in the patterns, reading that job works, and reading another is denied."""
    with _client(server, "producer") as producer:
        mine, other = producer.submit("Hello"), producer.submit("Hello")
        for job in (mine, other):
            producer.cancel(job.id)
    rules = dict(USERS)["consumer"].replace("millstream:*", f"millstream:{{{mine.id}}}:*")
    with connect(server.url) as connection:
        connection.execute_command("ACL", "SETUSER", "guest", *rules.split())
    with _client(server, "guest") as guest:
        assert [event.type for event in guest.follow(mine.id)] == ["cancelled"]
        with guest.redis.pubsub() as live:
            live.subscribe(guest.keys.chunks(mine.id))
            assert live.get_message(timeout=5)["type"] == "subscribe"
        with pytest.raises(RedisUnavailable, match="check its ACL"):
            guest.status(other.id)
