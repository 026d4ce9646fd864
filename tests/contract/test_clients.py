"""The library people call, sync and async: results, callbacks, listings and the feed."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

import fakeredis
import pytest

from millstream import (
    AsyncClient,
    Client,
    Ended,
    JobCancelled,
    JobFailed,
    JobNotFound,
    ResultTimeout,
    Settings,
)
from millstream.reading import SILENCE
from millstream.testing import ScriptedChannel, fake_async_client
from tests.oracle import check_log

Api = Callable[..., Any]


@pytest.fixture
def api(kind: str, backend: str, settings: Settings, fake_server: fakeredis.FakeServer, client: Client) -> Api:
    """Calls a method of one client or the other: `api("status", "j")`."""

    async def call(name: str, *args: Any, **options: Any) -> Any:
        made = fake_async_client(settings, server=fake_server) if backend == "fake" else AsyncClient(settings=settings)
        async with made:
            return await getattr(made, name)(*args, **options)

    def run(name: str, *args: Any, **options: Any) -> Any:
        return getattr(client, name)(*args, **options) if kind == "sync" else asyncio.run(call(name, *args, **options))

    return run


def test_both_clients_have_the_same_methods() -> None:
    """With the same parameters and defaults."""
    for name, method in inspect.getmembers(Client, inspect.isfunction):
        if not name.startswith("_"):
            twin = getattr(AsyncClient, name)
            assert [str(p) for p in inspect.signature(twin).parameters.values()] == [
                str(p) for p in inspect.signature(method).parameters.values()
            ], name


def test_a_job_is_submitted_watched_and_cancelled(api: Api, client: Client) -> None:
    """The same calls on both."""
    job = api("submit", "Hi", id="j", metadata={"team": "a"})
    assert (job.id, job.created) == ("j", True)
    assert [each.created for each in api("submit_many", [{"prompt": "Hi", "id": "j", "metadata": {"team": "a"}}])] == [
        False
    ]
    status = api("status", "j")
    assert (status.status, status.lane, status.metadata, status.ended) == (
        "queued",
        "interactive",
        {"team": "a"},
        False,
    )
    assert [each.id for each in api("list")] == ["j"]
    assert api("cancel", "j") == "cancelled"
    assert api("forget", "j") is None
    with pytest.raises(JobNotFound):
        api("status", "nobody")
    check_log(client, "j")


def test_stream_tells_content_and_restarts(api: Api, client: Client, channel: ScriptedChannel) -> None:
    """Every piece as it comes; a restart before new text; the final text alone is returned."""
    client.submit("Hi", id="j")
    channel.start("j")
    channel.chunk("j", "Hel")
    channel.restart("j", reason="worker_lost")
    channel.chunk("j", "Hello")
    channel.chunk("j", " you")
    channel.complete("j")
    told: list[Any] = []
    text = api("stream", "j", told.append, lambda attempt, reason: told.append((attempt, reason)))
    assert text == "Hello you"
    assert told == ["Hel", (2, "worker_lost"), "Hello", " you"]
    told.clear()
    assert api("stream", "j", told.append, lambda attempt, reason: told.append((attempt, reason)), 2) == "Hello you"
    assert told == [(2, "worker_lost"), "Hello", " you"]
    assert api("stream", "j") == "Hello you"


def test_an_error_in_a_callback_reaches_the_caller(api: Api, client: Client, channel: ScriptedChannel) -> None:
    """As it is, and nothing stays behind."""
    client.submit("Hi", id="j")
    channel.start("j")
    channel.chunk("j", "a")

    def burst(content: str) -> None:
        raise ZeroDivisionError(content)

    with pytest.raises(ZeroDivisionError):
        api("stream", "j", burst)
    assert client.cancel("j") == "cancelled"


def test_results_of_every_ending(api: Api, client: Client, channel: ScriptedChannel) -> None:
    """`completed` and `incomplete` are answers; `failed` and `cancelled` raise; `outcome` never does."""
    for job_id in "abcd":
        client.submit("Hi", id=job_id)
        channel.start(job_id)
        channel.chunk(job_id, "text")
    channel.complete("a", total_tokens=3)
    channel.stop_short("b")
    channel.fail("c", "no_model", "there is none")
    client.cancel("d")
    assert (api("result", "a").status, api("result", "a").usage) == ("completed", {"total_tokens": 3})
    assert (api("result", "b").status, api("result", "b").text) == ("incomplete", "text")
    for call in ("result", "stream"):
        with pytest.raises(JobFailed, match="there is none") as caught:
            api(call, "c")
        assert caught.value.code == "no_model"
        with pytest.raises(JobCancelled):
            api(call, "d")
    found = {job_id: api("outcome", job_id)[0] for job_id in "abcd"}
    assert {job_id: each.status for job_id, each in found.items()} == {
        "a": "completed", "b": "incomplete", "c": "failed", "d": "cancelled",
    }  # fmt: skip
    assert all(each.text == "text" for each in found.values())
    assert client.status("c").error == found["c"].error == {"code": "no_model", "message": "there is none"}
    for job_id in "abcd":
        check_log(client, job_id)


def test_a_result_that_does_not_come_is_a_timeout(api: Api, client: Client) -> None:
    """After the time that was given, a TimeoutError that names the job; the job goes on."""
    client.submit("Hi", id="j")
    began = time.monotonic()
    with pytest.raises(ResultTimeout, match=r"'j' has not ended within 0\.2 s") as caught:
        api("result", "j", timeout=0.2)
    assert isinstance(caught.value, TimeoutError)
    assert 0.2 <= time.monotonic() - began < SILENCE, "it did not wait for the next look at the log"
    assert client.status("j").status == "queued"


def test_jobs_are_listed_open_ones_first(api: Api, client: Client, channel: ScriptedChannel) -> None:
    """Then ended ones with the newest first; by state, up to the limit; a broken spec or state hides nobody."""
    client.submit_many([{"prompt": "Hi", "id": f"j{i}"} for i in range(6)])
    channel.start("j5")
    client.cancel("j0")
    client.cancel("j1")
    channel.complete("j5")
    client.redis.set(client.keys.spec("j2"), b"\xff not JSON", keepttl=True)
    for name, broken in (("k", {"seq": "x"}), ("l", {"lane": "batch"}), ("m", {"status": "failed", "error": "{"})):
        client.redis.hset(client.keys.state(name), mapping=broken)
        client.redis.expire(client.keys.state(name), 60)
        client.redis.zadd(client.keys.open, {name: 1})
    client.redis.zadd(client.keys.open, {b"\xff": 1, "no id": 1})
    ids = [each.id for each in api("list")]
    client.redis.zrem(client.keys.open, b"\xff", "no id", "k", "l", "m")
    assert (set(ids[:3]), ids[3:]) == ({"j2", "j3", "j4"}, ["j5", "j1", "j0"])
    assert [each.id for each in api("list", "cancelled")] == ["j1", "j0"]
    assert [each.id for each in api("list", state="completed")] == ["j5"]
    assert len(api("list", limit=2)) == 2
    assert api("list", "failed") == []


def test_the_feed_tells_every_end_once(client: Client, channel: ScriptedChannel) -> None:
    """From the start, or after a cursor that an earlier entry gave."""
    client.submit_many([{"prompt": "Hi", "id": f"j{i}"} for i in range(3)])
    channel.start("j1")
    channel.complete("j1")
    client.cancel("j0")
    client.cancel("j2")
    feed = client.ended(after="0")
    entries = [next(feed) for _ in range(3)]
    assert [(each.id, each.status) for each in entries] == [
        ("j1", "completed"),
        ("j0", "cancelled"),
        ("j2", "cancelled"),
    ]
    assert next(client.ended(after=entries[0].cursor)) == entries[1]


async def test_the_async_feed_tells_the_same(async_client: AsyncClient, client: Client) -> None:
    """From now on: what ended before is not told, what ends while it waits is."""
    client.submit("Hi", id="j0")
    client.cancel("j0")
    feed = async_client.ended()

    async def first() -> Ended:
        return await anext(feed)

    waiting = asyncio.create_task(first())
    number = 0
    while not waiting.done():  # where "now" is depends on when it first asks, so something ends until it is told
        number += 1
        client.submit("Hi", id=f"k{number}")
        client.cancel(f"k{number}")
        await asyncio.wait([waiting], timeout=0.02)
    found = await waiting
    await feed.aclose()
    assert (found.id[0], found.status) == ("k", "cancelled")
