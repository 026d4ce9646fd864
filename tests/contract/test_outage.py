"""Following while the server dies, loses data or is away, and while a job ends at the wrong moment."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import fakeredis
import pytest

from millstream import (
    AsyncClient,
    Client,
    LogRewound,
    RedisUnavailable,
    Settings,
)
from millstream.testing import ManualClock, ScriptedChannel, fake_async_client, fake_client
from tests.contract.consumers import PATIENCE, Consumer, wait_until
from tests.oracle import check_consumers, check_keys, check_log
from tests.valkey import Valkey


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
        with pytest.raises(LogRewound, match="does not reach event 3: it ends at 2"):
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
        with pytest.raises(LogRewound, match="does not reach event 3: it ends at 4 or was written anew"):
            consumer.join()
        client.redis.flushall()


def test_an_attempt_that_got_the_number_of_a_lost_one_shows_no_mixture(own_server: Valkey, kind: str) -> None:
    """The server lost attempt 1 with its claim; another attempt 1 has written more than was read of the first."""
    settings = Settings(redis_url=own_server.url)
    with Client(settings=settings) as client:
        names = (client.keys.log("j"), client.keys.state("j"))
        client.submit("Hi", id="j")
        queued = client.redis.dump(names[1])

        def forget() -> None:
            client.redis.delete(*names)
            client.redis.restore(names[1], 0, queued)

        channel = ScriptedChannel(client)
        channel.start("j", token="second")
        for text in "wxyz":
            channel.chunk("j", text)
        anew = {name: client.redis.dump(name) for name in names}
        forget()
        channel = ScriptedChannel(client)
        channel.start("j", token="first")
        channel.chunk("j", "a")
        consumer = Consumer(
            lambda: Client(settings=settings) if kind == "sync" else AsyncClient(settings=settings), ["j"]
        )
        consumer.wait_for(2)
        for name, dump in anew.items():
            client.redis.restore(name, 0, dump, replace=True)
        client.redis.client_kill_filter(_type="pubsub")
        with pytest.raises(LogRewound, match="was written anew"):
            consumer.join()
        client.redis.flushall()


def test_a_result_keeps_its_time_while_the_server_is_away(
    own_server: Valkey, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller's timeout holds during an outage too: it is told that Redis cannot be reached."""
    monkeypatch.setattr("millstream.redis_door.RETRIES", 1)
    settings, clock = Settings(redis_url=own_server.url), ManualClock()
    with Client(settings=settings) as client:
        client.submit("Hi", id="j")

    async def ask() -> None:
        async with AsyncClient(settings=settings, clock=clock) as made:
            await made.result("j", timeout=1.0)

    caught: list[BaseException] = []

    def wait_for_it() -> None:
        try:
            if kind == "sync":
                with Client(settings=settings, clock=clock) as made:
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
    clock.advance(1.0)
    waiter.join(PATIENCE)
    assert not waiter.is_alive()
    assert "cannot be reached" in str(caught[0])


def test_the_feed_of_endings_outlasts_a_server_that_is_killed(
    own_server: Valkey, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads it hears of every job once; a server that was never there is no outage."""
    monkeypatch.setattr("millstream.redis_door.RETRIES", 0)
    settings = Settings(redis_url=own_server.url)
    heard: list[str] = []

    def read() -> None:
        if kind == "sync":
            with Client(settings=settings) as reader:
                heard.extend(each.id for each in itertools.islice(reader.ended("0"), 3))
        else:
            asyncio.run(read_async())

    async def read_async() -> None:
        async with AsyncClient(settings=settings) as reader, aclosing(reader.ended("0")) as feed:
            async for each in feed:
                heard.append(each.id)
                if len(heard) == 3:
                    return

    with Client(settings=settings) as client:
        client.submit("Hi", id="first")
        client.cancel("first")
        reading = threading.Thread(target=read, daemon=True)
        reading.start()
        if kind == "async":
            wait_until(lambda: heard == ["first"], "the first ending")
        wait_until(lambda: b"cmd=xread" in client.redis.execute_command("CLIENT", "LIST"), "the reader in its read")
        own_server.kill()
        own_server.restart()
    with Client(settings=settings) as client:
        for job_id in ("second", "third"):
            client.submit("Hi", id=job_id)
            client.cancel(job_id)
        reading.join(PATIENCE)
        assert heard == ["first", "second", "third"]
        own_server.kill()
        with pytest.raises(RedisUnavailable):
            next(client.ended("0"))


def test_an_outage_that_lasts_is_said(own_server: Valkey, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower outlasts OUTAGE seconds of a server that is away, then raises RedisUnavailable."""
    monkeypatch.setattr("millstream.redis_door.RETRIES", 0)
    monkeypatch.setattr("millstream.outage.OUTAGE", 0.5)
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
