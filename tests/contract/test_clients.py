"""The library people call, sync and async: results, callbacks, listings, the feed, and a server that goes away."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Iterator
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
    LogRewound,
    RedisUnavailable,
    ResultTimeout,
    Settings,
)
from millstream import client as client_module
from millstream.testing import ManualClock, ScriptedChannel, fake_async_client, fake_client
from tests.contract.consumers import Consumer, wait_until
from tests.oracle import check_consumers, check_keys, check_log
from tests.valkey import Valkey

only_valkey = pytest.mark.parametrize("backend", ["valkey"], indirect=True)

Api = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


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
    assert 0.2 <= time.monotonic() - began < 2.0
    assert client.status("j").status == "queued"


def test_jobs_are_listed_open_ones_first(api: Api, client: Client, channel: ScriptedChannel) -> None:
    """Then ended ones with the newest first; by state, up to the limit; a broken spec hides nobody."""
    client.submit_many([{"prompt": "Hi", "id": f"j{i}"} for i in range(6)])
    channel.start("j5")
    client.cancel("j0")
    client.cancel("j1")
    channel.complete("j5")
    client.redis.set(client.keys.spec("j2"), b"\xff not JSON", keepttl=True)
    ids = [each.id for each in api("list")]
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


# A server that goes away -------------------------------------------------------------------------------------------


@pytest.fixture
def own_server(valkey: Valkey) -> Iterator[Valkey]:
    """A server of this test's own, to be killed; every write is on disk before it is answered."""
    server = Valkey.start(appendfsync="always")
    yield server
    server.close()


def test_following_outlasts_a_server_that_is_killed(own_server: Valkey, kind: str) -> None:
    """kill -9 and a restart with its AOF, three times in the middle of a stream: every list equals the log."""
    settings = Settings(redis_url=own_server.url)
    with Client(settings=settings) as client:
        channel = ScriptedChannel(client)
        client.submit("Hi", id="j")
        channel.start("j")

        def make() -> Client | AsyncClient:
            return Client(settings=settings) if kind == "sync" else AsyncClient(settings=settings)

        consumers = [Consumer(make, ["j"]) for _ in range(3)]
        for _ in range(3):
            for i in range(20):
                channel.chunk("j", f"{i} ")
            for consumer in consumers:
                consumer.wait_for(2)
            own_server.kill()
            own_server.restart()
            channel.chunk("j", "again ")
        channel.complete("j")
        seen = [consumer.join()["j"] for consumer in consumers]
        log = check_log(client, "j")
        assert len(log) == 65
        check_consumers(seen, log)
        check_keys(client.redis, client.keys)


def test_a_server_that_lost_its_data_shows_no_mixture(own_server: Valkey, kind: str) -> None:
    """What was read is longer than what is there now: the reader says so."""
    settings = Settings(redis_url=own_server.url)
    with Client(settings=settings) as client:
        channel = ScriptedChannel(client)
        client.submit("Hi", id="j")
        channel.start("j")
        channel.chunk("j", "a")
        kept = {name: client.redis.dump(name) for name in (client.keys.log("j"), client.keys.state("j"))}
        channel.chunk("j", "b")
        consumer = Consumer(
            lambda: Client(settings=settings) if kind == "sync" else AsyncClient(settings=settings), ["j"]
        )
        consumer.wait_for(3)
        for name, dump in kept.items():
            client.redis.restore(name, 0, dump, replace=True)
        client.redis.client_kill_filter(_type="pubsub")
        with pytest.raises(LogRewound, match="event 3 was seen, the log ends at 2"):
            consumer.join()
        client.redis.flushall()


def test_a_log_that_was_written_anew_shows_no_mixture(own_server: Valkey, kind: str) -> None:
    """It is longer than what was read, but a newer attempt wrote the event that was read last."""
    settings = Settings(redis_url=own_server.url)
    with Client(settings=settings) as client:
        channel = ScriptedChannel(client)
        names = (client.keys.log("j"), client.keys.state("j"))
        client.submit("Hi", id="j")
        channel.start("j")
        channel.chunk("j", "a")
        before = {name: client.redis.dump(name) for name in names}
        channel.restart("j")
        channel.chunk("j", "z")
        anew = {name: client.redis.dump(name) for name in names}
        for name, dump in before.items():
            client.redis.restore(name, 0, dump, replace=True)
        channel = ScriptedChannel(client)
        channel.start("j")  # the same token: goes on as attempt 1
        consumer = Consumer(
            lambda: Client(settings=settings) if kind == "sync" else AsyncClient(settings=settings), ["j"]
        )
        consumer.wait_for(3)
        for name, dump in anew.items():
            client.redis.restore(name, 0, dump, replace=True)
        client.redis.client_kill_filter(_type="pubsub")
        with pytest.raises(LogRewound, match="event 3 was seen, the log ends at 4 or was written anew"):
            consumer.join()
        client.redis.flushall()


def test_a_result_keeps_its_time_while_the_server_is_away(
    own_server: Valkey, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller's timeout holds during an outage too: it is told that Redis cannot be reached."""
    monkeypatch.setattr("millstream.redis_door.RETRIES", 1)
    settings = Settings(redis_url=own_server.url)
    with Client(settings=settings) as client:
        client.submit("Hi", id="j")

    async def ask() -> None:
        async with AsyncClient(settings=settings) as made:
            await made.result("j", timeout=1.0)

    caught: list[BaseException] = []

    def wait_for_it() -> None:
        try:
            if kind == "sync":
                with Client(settings=settings) as made:
                    made.result("j", timeout=1.0)
            else:
                asyncio.run(ask())
        except RedisUnavailable as error:
            caught.append(error)

    waiter = threading.Thread(target=wait_for_it, daemon=True)
    waiter.start()
    with Client(settings=settings) as client:
        wait_until(lambda: client.redis.pubsub_numsub(client.keys.chunks("j"))[0][1] == 1, "the subscription")
    own_server.kill()
    waiter.join(20)
    assert not waiter.is_alive()
    assert "cannot be reached" in str(caught[0])


def test_an_outage_that_lasts_is_said(own_server: Valkey, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower outlasts OUTAGE seconds of a server that is away, then raises RedisUnavailable."""
    monkeypatch.setattr("millstream.redis_door.RETRIES", 0)
    monkeypatch.setattr(client_module, "OUTAGE", 0.5)
    monkeypatch.setattr("millstream.async_client.OUTAGE", 0.5)
    settings = Settings(redis_url=own_server.url)
    with Client(settings=settings) as client:
        channel = ScriptedChannel(client)
        client.submit("Hi", id="j")
        channel.start("j")
        consumer = Consumer(
            lambda: Client(settings=settings) if kind == "sync" else AsyncClient(settings=settings), ["j"]
        )
        consumer.wait_for(1)
        own_server.kill()
        with pytest.raises(RedisUnavailable, match="make up starts one"):
            consumer.join()


def test_what_happens_before_the_subscription_is_not_missed(
    kind: str, client: Client, channel: ScriptedChannel, settings: Settings, backend: str,
    fake_server: fakeredis.FakeServer, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The job ends between the first look at its log and the subscription, so no message will ever tell of it."""
    client.submit("Hi", id="j")
    channel.start("j")
    made: list[Client | AsyncClient] = []
    subscribe: Any = {"sync": Client._subscribed, "async": AsyncClient._subscribed}[kind]

    def too_late(self: Any, job_ids: Any) -> Any:
        made.append(self)
        channel.chunk("j", "meanwhile")
        channel.complete("j")
        return subscribe(self, job_ids)

    def make() -> Client | AsyncClient:
        options: dict[str, Any] = {"clock": ManualClock()}  # silence never comes
        if backend == "fake":
            if kind == "sync":
                return fake_client(settings, server=fake_server, **options)
            return fake_async_client(settings, server=fake_server, **options)
        return Client(settings=settings, **options) if kind == "sync" else AsyncClient(settings=settings, **options)

    monkeypatch.setattr(Client if kind == "sync" else AsyncClient, "_subscribed", too_late)
    seen = Consumer(make, ["j"]).join()["j"]
    assert len(made) == 1
    check_consumers([seen], check_log(client, "j"))
