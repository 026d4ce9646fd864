"""A batch as a library, on both clients and both backends, with the worker's part played in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import fakeredis
import pytest
import redis

from millstream import Answer, AsyncClient, Client, Settings
from millstream.calls import accept, drop, withdraw
from millstream.job import build
from millstream.testing import ScriptedChannel, fake_async_client, fake_client
from tests.contract.conftest import Hands

Batch = Callable[..., list[Answer]]


def row(number: int, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"row {number}"}]
    return {"custom_id": f"r{number}", "body": {"model": "m", "messages": messages, **body}}


@pytest.fixture
def made(backend: str, settings: Settings, fake_server: fakeredis.FakeServer, client: Client) -> Callable[[], Client]:
    """Further clients on the same data."""

    def make() -> Client:
        return fake_client(settings, server=fake_server) if backend == "fake" else Client(settings=settings)

    return make


@contextmanager
def worker(make: Callable[[], Client], *, ends: str = "complete") -> Iterator[list[str]]:
    """Ends every open job, each with its id as the text; gives the ids in the order in which they were begun."""
    over, begun = threading.Event(), []

    def work() -> None:
        with make() as client:
            channel = ScriptedChannel(client)
            while not over.wait(0.005):
                for job_id in map(bytes.decode, client.redis.zrange(client.keys.open, 0, -1)):
                    begun.append(job_id)
                    channel.start(job_id)
                    channel.chunk(job_id, job_id)
                    getattr(channel, ends)(job_id)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield begun
    finally:
        over.set()
        thread.join()


@pytest.fixture
def batch(kind: str, backend: str, settings: Settings, fake_server: fakeredis.FakeServer, client: Client) -> Batch:
    """All answers of a batch on one client or the other."""

    async def gather(rows: Any, **options: Any) -> list[Answer]:
        fake = backend == "fake"
        async with fake_async_client(settings, server=fake_server) if fake else AsyncClient(settings=settings) as made:
            return [answer async for answer in made.batch(rows, **options)]

    def run(rows: Any, **options: Any) -> list[Answer]:
        return list(client.batch(rows, **options)) if kind == "sync" else asyncio.run(gather(rows, **options))

    return run


def test_every_row_is_answered_and_forgotten(batch: Batch, made: Callable[[], Client], client: Client) -> None:
    """With fewer jobs than rows at once; a row that cannot be asked is an answer too."""
    rows: list[Any] = [*(row(n) for n in range(23)), {"custom_id": "bad"}, b"no JSON", row(5)]
    with worker(made) as begun:
        answers = batch(rows, window=7)
    assert sorted(str(answer.custom_id) for answer in answers if answer.answered) == sorted(f"r{n}" for n in range(23))
    assert all(answer.text == answer.job_id for answer in answers if answer.answered)
    codes = [(answer.error or {})["code"] for answer in answers if not answer.answered]
    assert sorted(codes) == ["duplicate_custom_id", "invalid_json_line", "missing_required_parameter"]
    assert len(begun) == 23
    assert not list(client.redis.scan_iter("*:state")), "nobody follows: what was yielded is gone"


@pytest.mark.parametrize(("ends", "status"), [("stop_short", "incomplete"), ("fail", "failed")])
def test_an_answer_says_how_its_row_ended(batch: Batch, made: Callable[[], Client], ends: str, status: str) -> None:
    """`incomplete` is an answer, `failed` an error."""
    with worker(made, ends=ends):
        [answer] = batch([row(1)])
    assert (answer.status, answer.answered) == (status, status == "incomplete")
    line = answer.line()
    if answer.answered:
        assert line["response"]["body"]["choices"][0]["finish_reason"] == "length"
    else:
        assert line["error"] == {"code": "upstream_error", "message": "scripted"}


def test_the_same_batch_picks_up_its_jobs(batch: Batch, made: Callable[[], Client], client: Client) -> None:
    """A first caller leaves in the middle; the same id and rows are the same jobs, another id is another job."""
    running = client.batch([row(n) for n in range(4)], window=4, batch_id="b")
    with worker(made) as begun:
        first = next(running)
        running.close()
        answers = batch([row(n) for n in range(4)], batch_id="b")
        assert sorted(str(answer.custom_id) for answer in answers) == ["r0", "r1", "r2", "r3"]
        assert first in answers, "what was yielded last is not known to be kept"
        assert len(begun) == 4
        assert batch([row(0)], batch_id="other")[0].job_id != first.job_id


def test_what_is_followed_stays_a_minute(batch: Batch, made: Callable[[], Client], client: Client) -> None:
    """The subscriber's job has a TTL, the other is gone."""
    with client.redis.pubsub() as somebody:
        with worker(made):
            client.redis.ping()
            first = client.batch([row(0), row(1)], batch_id="b")
            ids = [answer.job_id for answer in first]
            followed = client.keys.chunks(ids[0])
            somebody.subscribe(followed)
            assert somebody.get_message(timeout=5) is not None
            batch([row(0), row(1)], batch_id="b")
        assert 50_000 < client.redis.pttl(client.keys.state(ids[0])) <= 60_000
        assert not client.redis.exists(client.keys.state(ids[1]), client.keys.log(ids[1]), client.keys.spec(ids[1]))


async def test_an_async_source_may_take_its_time(async_client: AsyncClient, made: Callable[[], Client]) -> None:
    """Rows that come one by one are answered one by one: the next comes only after the answer of the last."""
    answered = asyncio.Event()

    async def slowly() -> AsyncIterator[dict[str, Any]]:
        for number in range(3):
            yield row(number)
            await answered.wait()
            answered.clear()

    with worker(made):
        found = []
        async for answer in async_client.batch(slowly()):
            found.append(answer.custom_id)
            answered.set()
    assert found == ["r0", "r1", "r2"]


async def test_leaving_an_async_batch_leaves_no_task(async_client: AsyncClient, made: Callable[[], Client]) -> None:
    """Also while a row is awaited."""

    async def one_and_then_none() -> AsyncIterator[dict[str, Any]]:
        yield row(0)
        await asyncio.Event().wait()

    with worker(made):
        batch = async_client.batch(one_and_then_none())
        assert (await anext(batch)).custom_id == "r0"
        await batch.aclose()


def test_a_full_server_makes_a_batch_wait(
    backend: str, batch: Batch, made: Callable[[], Client], client: Client
) -> None:
    """It goes on when there is room; nothing fails, and no row is asked twice."""
    if backend == "fake":
        pytest.skip("the fake has no maxmemory")
    answers: list[Answer] = []
    client.redis.config_set("maxmemory", int(client.redis.info("memory")["used_memory"]) - 1000)
    try:
        thread = threading.Thread(target=lambda: answers.extend(batch([row(n) for n in range(5)])))
        thread.start()
        while "errorstat_OOM" not in client.redis.info("errorstats"):
            pass
        assert not answers
        client.redis.config_set("maxmemory", 0)
        with worker(made) as begun:
            thread.join()
    finally:
        client.redis.config_set("maxmemory", 0)
        client.redis.config_resetstat()
    assert len(answers) == len(begun) == 5


def test_scripts_forgotten_by_the_server_are_loaded_again(
    batch: Batch, made: Callable[[], Client], client: Client
) -> None:
    """SCRIPT FLUSH in the middle costs one more round trip."""

    def rows() -> Iterable[dict[str, Any]]:
        for number in range(6):
            client.redis.script_flush()
            yield row(number)

    with worker(made):
        assert len(batch(rows(), window=2)) == 6


def test_the_calls_of_a_batch_may_be_sent_twice(sent: Hands, client: Client) -> None:
    """accept, withdraw and drop: the second is told what the first has done."""
    spec = build("Hi", model="m")
    once = not sent.twice
    keys, settings = client.keys, client.settings
    assert sent.send(accept(keys, settings, "j", spec, spec.encode())) == ("created" if once else "exists", "queued")
    other = build("Ho", model="m")
    assert sent.send(accept(keys, settings, "j", other, other.encode())) == ("conflict", "")
    assert sent.send(drop(keys, "j")) == ("open", "queued")
    assert sent.send(withdraw(keys, "j")) == (("cancelled", "") if once else ("closed", "cancelled"))
    assert sent.send(accept(keys, settings, "j", spec, spec.encode())) == ("exists", "cancelled")
    assert sent.send(drop(keys, "j"))[0] == ("forgotten" if once else "unknown")
    assert sent.send(withdraw(keys, "j")) == ("unknown", "")
    assert [key for key in client.redis.keys("*") if b"{j}" in key] == []


def test_a_user_who_may_not_ask_for_followers_keeps_jobs_a_minute(
    backend: str, hands: Hands, client: Client, settings: Settings
) -> None:
    """Older ACL rules lack PUBSUB NUMSUB: then somebody may follow, and the minute is given."""
    if backend == "fake":
        pytest.skip("the fake has no ACL")
    client.submit("Hi", id="j")
    client.cancel("j")
    rights: dict[str, Any] = {"keys": ["*"], "channels": ["*"], "commands": ["+@all", "-pubsub"]}
    client.redis.acl_setuser("limited", enabled=True, nopass=True, **rights)
    try:
        with Client(redis_url=settings.redis_url.replace("redis://", "redis://limited:x@")) as limited:
            assert limited.run(drop(client.keys, "j")) == ("forgotten", "")
    finally:
        client.redis.acl_deluser("limited")
    assert 0 < client.redis.pttl(client.keys.state("j")) <= 60_000
    assert isinstance(client.redis, redis.Redis)
