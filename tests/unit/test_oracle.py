"""The oracle itself: it accepts a good log, and sees every kind of fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from millstream import Client, Settings
from millstream.testing import ScriptedChannel, fake_client
from tests.oracle import check_consumers, check_keys, check_log, read_log

END = b'[{"type":"completed","finish_reasons":{}}]'


@pytest.fixture
def client() -> Client:
    """An ended job `j` of four events in four packs, on a fake."""
    made = fake_client(Settings(retention=100))
    made.submit("Hi", id="j")
    channel = ScriptedChannel(made)
    channel.start("j")
    channel.chunk("j", "a")
    channel.chunk("j", "b")
    channel.complete("j")
    return made


def rewrite(client: Any, change: Callable[[list[tuple[bytes, dict[bytes, bytes]]]], object]) -> None:
    key = client.keys.log("j")
    entries, ttl = client.redis.xrange(key), client.redis.pttl(key)
    change(entries)
    client.redis.delete(key)
    for entry_id, fields in entries:
        client.redis.xadd(key, fields, id=entry_id)
    client.redis.pexpire(key, ttl)


def swap(entries: list[Any], at: int, **fields: bytes) -> None:
    entries[at] = (entries[at][0], {**entries[at][1], **{name.encode(): value for name, value in fields.items()}})


FAULTS: dict[str, Callable[[Any], object]] = {
    "a missing event": lambda c: rewrite(c, lambda e: e.pop(1)),
    "a doubled event": lambda c: rewrite(c, lambda e: swap(e, 1, e=b'["a","a"]')),
    "no end": lambda c: rewrite(c, lambda e: e.pop()),
    "two ends": lambda c: rewrite(c, lambda e: swap(e, 2, e=END)),
    "text after the end": lambda c: rewrite(c, lambda e: e.append((b"5-0", {b"a": b"1", b"t": b"1", b"e": b'["x"]'}))),
    "an older attempt": lambda c: rewrite(c, lambda e: swap(e, 0, a=b"2")),
    "an empty pack": lambda c: rewrite(c, lambda e: swap(e, 1, e=b"[]")),
    "a foreign field": lambda c: rewrite(c, lambda e: swap(e, 1, z=b"1")),
    "a foreign id": lambda c: rewrite(c, lambda e: e.insert(2, (b"2-1", e[1][1]))),
    "another status": lambda c: c.redis.hset(c.keys.state("j"), "status", "failed"),
    "another seq": lambda c: c.redis.hset(c.keys.state("j"), "seq", 3),
    "another attempt": lambda c: c.redis.hset(c.keys.state("j"), "attempt", 2),
    "another end": lambda c: c.redis.hset(c.keys.state("j"), "ended", 1),
    "a lease": lambda c: c.redis.hset(c.keys.state("j"), "lease", 1),
    "an open entry": lambda c: c.redis.zadd(c.keys.open, {"j": 1}),
    "no expiry": lambda c: c.redis.persist(c.keys.spec("j")),
    "a missing spec": lambda c: c.redis.delete(c.keys.spec("j")),
    "another expiry": lambda c: c.redis.pexpire(c.keys.log("j"), 50_000),
    "a longer expiry": lambda c: [
        c.redis.pexpire(name("j"), 500_000) for name in (c.keys.spec, c.keys.state, c.keys.log)
    ],
}


def test_a_good_log_passes(client: Client) -> None:
    """And is returned."""
    log = check_log(client, "j")
    assert [event.seq for event in log] == [1, 2, 3, 4]
    check_consumers([log, list(log)], log)
    check_keys(client.redis, client.keys)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_seen(client: Client, fault: str) -> None:
    """One thing is wrong, and the oracle says so."""
    FAULTS[fault](client)
    with pytest.raises(AssertionError):
        check_log(client, "j")


@pytest.mark.parametrize(
    "change", [lambda log: log[:-1], lambda log: [*log, log[-1]], lambda log: log[::-1], lambda log: []]
)
def test_a_consumer_that_saw_something_else_is_seen(client: Client, change: Callable[[list[Any]], list[Any]]) -> None:
    """Too little, too much, another order."""
    log = read_log(client.redis, client.keys, "j")
    with pytest.raises(AssertionError, match="consumer 1"):
        check_consumers([log, change(log)], log)


@pytest.mark.parametrize(
    "stray",
    [
        "other",
        "millstream:limit:x",
        "millstream:{j}:spec",
        "millstream:{gone}:log",
        "rq:job:j-00000000",
        "rq:results:j",
    ],
)
def test_a_key_that_stays_for_ever_is_seen(client: Client, stray: str) -> None:
    """Unless it is an open job's, the feed, a queue or what waits in one."""
    client.submit("Hi", id="still-open")
    check_keys(client.redis, client.keys)
    client.redis.delete(stray)
    client.redis.set(stray, "x")
    with pytest.raises(AssertionError, match="without a TTL"):
        check_keys(client.redis, client.keys)
    client.redis.expire(stray, 60)
    check_keys(client.redis, client.keys)
