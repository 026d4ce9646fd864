"""Following: early, late, from any cursor, many jobs, over killed connections, with both clients."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

import fakeredis
import pytest
from redis.exceptions import ResponseError

from millstream import AsyncClient, Client, Event, JobExpired, JobNotFound, LogRewound, Settings, SpecError
from millstream.events import compact_text, decode
from millstream.testing import ScriptedChannel, fake_async_client, fake_client
from tests.contract.conftest import Hands
from tests.contract.consumers import Consumer, join_all, wait_until
from tests.oracle import check_consumers, check_log

only_valkey = pytest.mark.parametrize("backend", ["valkey"], indirect=True)

Follow = Callable[..., Consumer]


@pytest.fixture(params=["sync", "async"])
def follow(
    request: pytest.FixtureRequest, backend: str, settings: Settings, fake_server: fakeredis.FakeServer
) -> Follow:
    """Starts a consumer: `follow("j", "k", after=0, on_event=...)`."""

    def make() -> Client | AsyncClient:
        if request.param == "sync":
            return fake_client(settings, server=fake_server) if backend == "fake" else Client(settings=settings)
        return fake_async_client(settings, server=fake_server) if backend == "fake" else AsyncClient(settings=settings)

    def start(*job_ids: str, after: int = 0, on_event: Callable[[Event], None] = lambda event: None) -> Consumer:
        return Consumer(make, job_ids, after, on_event)

    return start


def tell(channel: ScriptedChannel, job_id: str) -> None:
    """A story with a restart, a wait, merged chunks, tool calls and an end: 12 events."""
    channel.start(job_id)
    channel.chunk(job_id, "Hel")
    channel.chunk(job_id, "lo", n=2)
    channel.retrying(job_id)
    channel.chunk(job_id, "x", index=1)
    channel.restart(job_id)
    channel.delta(job_id, reasoning="hm")
    channel.delta(job_id, tool_calls=[{"index": 0, "function": {"arguments": '{"a":"\u2028"}'}}])
    channel.write(job_id, *map(compact_text, ("Hello ", "world")))
    channel.write(job_id, b'{"type":"later","what":[1]}')
    channel.complete(job_id, total_tokens=3)


def test_an_early_consumer_sees_the_whole_log(client: Client, channel: ScriptedChannel, follow: Follow) -> None:
    """It was there before the first event."""
    client.submit("Hi", id="j")
    consumer = follow("j")
    channel.start("j")
    consumer.wait_for(1)
    for i in range(20):
        channel.chunk("j", f"{i} ")
    channel.complete("j")
    seen = consumer.join()["j"]
    check_consumers([seen], check_log(client, "j"))


def test_a_late_consumer_sees_the_same(client: Client, channel: ScriptedChannel, follow: Follow) -> None:
    """The job has long ended; unknown types are not shown, and leave no gap."""
    client.submit("Hi", id="j")
    tell(channel, "j")
    log = check_log(client, "j")
    assert (len(log), log[10].type) == (12, "later")
    check_consumers([follow("j").join()["j"]], [*log[:10], log[11]])


@pytest.mark.parametrize("live", [False, True], ids=["ended", "live"])
def test_a_consumer_goes_on_from_every_cursor(
    client: Client, channel: ScriptedChannel, follow: Follow, live: bool
) -> None:
    """Inside packs too: it sees exactly what lies above its cursor, and ends at once where nothing does."""
    client.submit("Hi", id="j")
    channel.start("j")
    for texts in (["a"], ["b", "c", "d", "e"], ["f"], ["g", "h"]):
        channel.write("j", *map(compact_text, texts))
    consumers = [follow("j", after=after) for after in range(10)] if live else []
    channel.chunk("j", "i")
    channel.complete("j")
    log = check_log(client, "j")
    consumers = consumers or [follow("j", after=after) for after in range(len(log) + 1)]
    for after, seen in enumerate(join_all(consumers)):
        check_consumers([seen["j"]], log[after:])


def test_several_jobs_are_followed_over_one_subscription(
    client: Client, channel: ScriptedChannel, follow: Follow
) -> None:
    """One has ended, one runs, one is queued; each list equals its log, and the end of all is the end."""
    ids = ["a", "b", "c"]
    for job_id in ids:
        client.submit("Hi", id=job_id)
    tell(channel, "a")
    channel.start("b")
    consumer = follow(*ids)
    consumer.wait_for(12, "a")
    consumer.wait_for(1, "b")
    channel.start("c")
    for i in range(20):
        channel.chunk("b" if i % 3 else "c", f"{i}")
    channel.complete("b")
    client.cancel("c")
    seen = consumer.join()
    for job_id in ids:
        check_consumers([seen[job_id]], [event for event in check_log(client, job_id) if event.type != "later"])


def test_a_log_of_many_pages_is_read_whole(client: Client, channel: ScriptedChannel, follow: Follow) -> None:
    """More packs than one page holds, exactly two pages among them."""
    client.submit("Hi", id="j")
    channel.start("j")
    for i in range(510):
        channel.chunk("j", f"{i}")
    consumer = follow("j")
    consumer.wait_for(511)
    channel.complete("j")
    log = check_log(client, "j")
    assert len(log) == 512
    check_consumers([consumer.join()["j"], follow("j").join()["j"]], log)


def test_a_consumer_that_dies_goes_on_from_its_cursor(client: Client, channel: ScriptedChannel, follow: Follow) -> None:
    """Killed at every fifth event and started again after the last one it has: its pieces are the log."""
    client.submit("Hi", id="j")
    channel.start("j")

    def write() -> None:
        for i in range(40):
            channel.chunk("j", f"{i}")
        channel.complete("j")

    writer = threading.Thread(target=write)
    writer.start()
    seen: list[Event] = []
    while not (seen and seen[-1].terminal):
        consumer = follow("j", after=seen[-1].seq if seen else 0)
        wait_until(lambda: len(consumer.events["j"]) >= 5 or consumer.seen(42))  # noqa: B023 - it is called in this turn
        consumer.stop()
        seen += consumer.join()["j"]
    writer.join()
    check_consumers([seen], check_log(client, "j"))


def test_what_cannot_be_followed_is_said(client: Client, channel: ScriptedChannel, follow: Follow) -> None:
    """An unknown job, a bad id, a cursor beyond the log, a log that is gone, a job that vanishes."""
    with pytest.raises(JobNotFound):
        follow("nobody").join()
    with pytest.raises(SpecError):
        follow("../x").join()
    client.submit("Hi", id="j")
    channel.start("j")
    with pytest.raises(LogRewound, match="does not reach event 7: it ends at 1"):
        follow("j", after=7).join()
    channel.complete("j")
    client.redis.delete(client.keys.log("j"))
    with pytest.raises(JobExpired):
        follow("j").join()


def test_a_plain_subscriber_sees_the_log_as_json(client: Client, channel: ScriptedChannel) -> None:
    """What a client in another language gets with SUBSCRIBE alone: each event as one line of JSON, in order."""
    client.submit("Hi", id="j")
    with client.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe(client.keys.chunks("j"))
        pubsub.get_message(timeout=5.0)
        tell(channel, "j")
        lines: list[bytes] = []
        while len(lines) < 12:
            message = pubsub.get_message(timeout=5.0)
            assert message is not None, f"{len(lines)} of 12 messages came"
            lines.append(message["data"])
        assert pubsub.get_message(timeout=0.02) is None
    assert [decode(line) for line in lines] == check_log(client, "j")
    assert [json.loads(line)["seq"] for line in lines] == list(range(1, 13))
    assert all(json.loads(line)["v"] == 1 for line in lines)


class Restless:
    """Kills every subscription at random moments."""

    def __init__(self, client: Client, seed: int) -> None:
        self.kills = 0
        self._client, self._chance, self._done = client, random.Random(seed), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._done.wait(self._chance.uniform(0, 0.012)):
            try:
                self.kills += int(self._client.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub") > 0)
            except ResponseError:  # "No such client": nobody was subscribed just then
                continue

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._done.set()
        self._thread.join()


@only_valkey
def test_killed_subscriptions_cost_no_event(
    client: Client, channel: ScriptedChannel, follow: Follow, say: Callable[[str], None], seed: int
) -> None:
    """CLIENT KILL TYPE pubsub at random moments while three consumers follow: all lists equal the log."""
    chance = random.Random(seed)
    kills = rounds = events = 0
    while kills < 60:
        job_id = f"j{rounds}"
        client.submit("Hi", id=job_id)
        channel.start(job_id)
        with Restless(client, chance.randrange(2**32)) as restless:
            consumers = [follow(job_id) for _ in range(3)]
            while restless.kills < 15:
                channel.chunk(job_id, "some text ")
                time.sleep(chance.uniform(0, 0.004))
            channel.complete(job_id)
            seen = [each[job_id] for each in join_all(consumers)]
        log = check_log(client, job_id)
        check_consumers(seen, log)
        kills, rounds, events = kills + restless.kills, rounds + 1, events + len(log)
    say(f"killed subscriptions: {kills} random moments in {rounds} rounds, {events} events x 3, seed {seed}")


@pytest.fixture
def _small_buffers(client: Client) -> Iterator[None]:
    """Subscriptions with more than 32 KB unread are cut off."""
    usual = client.redis.config_get("client-output-buffer-limit")["client-output-buffer-limit"]
    client.redis.config_set("client-output-buffer-limit", "pubsub 32768 32768 0")
    yield
    client.redis.config_set("client-output-buffer-limit", usual)


@only_valkey
@pytest.mark.usefixtures("_small_buffers")
def test_a_slow_consumer_that_is_cut_off_sees_everything(
    client: Client, channel: ScriptedChannel, follow: Follow, say: Callable[[str], None]
) -> None:
    """The server drops a subscription whose buffer overflows, without a word to the consumer."""
    client.submit("Hi", id="j")
    channel.start("j")
    go_on = threading.Event()
    consumer = follow("j", on_event=lambda event: None if event.seq < 2 else (go_on.wait(30), None)[1])
    consumer.wait_for(1)
    channel.chunk("j", "begin")
    consumer.wait_for(2)
    before = client.redis.info("stats")["client_output_buffer_limit_disconnections"]

    def cut_off() -> int:
        return int(client.redis.info("stats")["client_output_buffer_limit_disconnections"] - before)

    while not cut_off():  # the kernel's own buffers fill first
        channel.write("j", *(compact_text("y" * 8192) for _ in range(8)))
    go_on.set()
    channel.complete("j")
    log = check_log(client, "j")
    check_consumers([consumer.join()["j"]], log)
    say(f"slow consumer: cut off {cut_off()} times, {len(log)} events")


def test_random_writers_and_consumers_agree(
    client: Client, channel: ScriptedChannel, hands: Hands, follow: Follow, say: Callable[[str], None], seed: int
) -> None:
    """Consumers that begin at random moments from random cursors, while packs of random sizes are written."""
    chance = random.Random(seed)
    trials = 0
    for number in range(4):
        job_id = f"j{number}"
        client.submit("Hi", id=job_id)
        channel.start(job_id)
        written = 1
        consumers: list[tuple[int, Consumer]] = []
        for _ in range(30):
            size = chance.randint(1, 5)
            channel.write(job_id, *(compact_text(f"{written + i} ") for i in range(size)))
            written += size
            if chance.random() < 0.25:
                after = chance.randint(0, written)
                consumers.append((after, follow(job_id, after=after)))
        channel.complete(job_id)
        log = check_log(client, job_id)
        for after, consumer in consumers:
            check_consumers([consumer.join()[job_id]], log[after:])
            trials += 1
    say(f"random consumers: {trials} trials, seed {seed}")
