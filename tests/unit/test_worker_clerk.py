"""The clerk gathers what began and what ended into few transactions, and keeps it while Redis is away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final, cast

import pytest
import redis.exceptions
import structlog

from worker.clerk import MAX_BATCH, Clerk
from worker.rq_worker import Entry, StreamWorker

AWAY: Final = redis.exceptions.ConnectionError("away")
CHANGED: Final = redis.exceptions.WatchError("a dependent came")


class Books:
    """A worker's books, that can be written or not."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.batches: list[tuple[list[str], list[tuple[str, str]]]] = []
        self.threads: set[int] = set()
        self.signed_off = False
        self.maintained = threading.Event()

    def book(self, started: Sequence[Entry], ended: Sequence[tuple[Entry, str]]) -> None:
        self.threads.add(threading.get_ident())
        if self.failures:
            raise self.failures.pop(0)
        self.batches.append(([each.job_id for each in started], [(each.job_id, status) for each, status in ended]))

    def beat(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    def maintain(self) -> None:
        self.maintained.set()
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "what stands in RQ's keys")

    def teardown(self) -> None:
        self.signed_off = True


def entry(name: str) -> Entry:
    return Entry(name, cast("Any", None))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(_: float) -> None: ...

    monkeypatch.setattr("worker.clerk.asyncio.sleep", at_once)


def at_work(books: Books, test: Callable[[Clerk], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        clerk = Clerk(cast("StreamWorker", books))
        try:
            await test(clerk)
        finally:
            await clerk.close()
            clerk._thread.shutdown(wait=True)

    asyncio.run(main())


def test_who_is_stopped_while_writing_writes_nothing_twice() -> None:
    """A process that ends cancels the clerk: what its thread has in hand is written, and not once more at the close."""
    writing, may_end = threading.Event(), threading.Event()

    class Slow(Books):
        def book(self, started: Sequence[Entry], ended: Sequence[tuple[Entry, str]]) -> None:
            writing.set()
            assert may_end.wait(10)
            super().book(started, ended)

    books = Slow()

    async def test(clerk: Clerk) -> None:
        clerk.started(entry("job"))
        flushing = asyncio.create_task(clerk.flush())
        await asyncio.to_thread(writing.wait, 10)
        flushing.cancel()
        with suppress(asyncio.CancelledError):
            await flushing
        clerk.ended(entry("job"), "completed")
        may_end.set()

    at_work(books, test)
    assert books.batches == [(["job"], []), ([], [("job", "completed")])]


def test_a_crowd_is_written_at_once_and_beside_the_loop() -> None:
    """One call for all that was collected, in a thread that is not the loop's."""
    books = Books()

    async def test(clerk: Clerk) -> None:
        for number in range(50):
            clerk.started(entry(f"job-{number}"))
            clerk.ended(entry(f"job-{number}"), "completed")
        await clerk.flush()

    at_work(books, test)
    names = [f"job-{number}" for number in range(50)]
    assert books.batches == [(names, [(name, "completed") for name in names])]
    assert threading.get_ident() not in books.threads
    assert books.signed_off


def test_a_batch_has_a_bound() -> None:
    """MAX_BATCH beginnings and ends in one transaction; the rest follows, in order, none twice."""
    books = Books()

    async def test(clerk: Clerk) -> None:
        for number in range(2 * MAX_BATCH + 1):
            clerk.ended(entry(f"job-{number}"), "failed")
        await clerk.flush()

    at_work(books, test)
    assert [len(ended) for _, ended in books.batches] == [MAX_BATCH, MAX_BATCH, 1]
    assert [name for _, ended in books.batches for name, _ in ended] == [f"job-{n}" for n in range(2 * MAX_BATCH + 1)]


def test_nothing_is_lost_while_redis_is_away() -> None:
    """What could not be written is written with the next, before it."""
    books = Books(AWAY, AWAY)

    async def test(clerk: Clerk) -> None:
        clerk.started(entry("a"))
        await clerk.flush()
        clerk.ended(entry("a"), "completed")
        await clerk.flush()
        assert books.batches == []
        await clerk.flush()

    with structlog.testing.capture_logs() as said:
        at_work(books, test)
    assert books.batches == [(["a"], [("a", "completed")])]
    assert [(line["event"], line["waiting"]) for line in said] == [("rq.books_wait", 1), ("rq.books_wait", 2)]


def test_a_worker_that_ends_without_redis_tries_once() -> None:
    """What is left cannot be written: then the signing off, which would wait as long again, is not tried either."""
    books = Books(AWAY)

    async def test(clerk: Clerk) -> None:
        clerk.ended(entry("a"), "completed")

    with structlog.testing.capture_logs() as said:
        at_work(books, test)
    assert [line["event"] for line in said] == ["rq.books_wait"]
    assert not books.signed_off


def test_a_change_in_between_is_looked_at_again() -> None:
    """A dependent that came between the look and the transaction: at once once more, without a word."""
    books = Books(CHANGED, CHANGED)

    async def test(clerk: Clerk) -> None:
        clerk.ended(entry("a"), "completed")
        await clerk.flush()

    with structlog.testing.capture_logs() as said:
        at_work(books, test)
    assert books.batches == [([], [("a", "completed")])]
    assert said == []


def test_closing_writes_what_is_left() -> None:
    """Nobody needs to have flushed."""
    books = Books()

    async def test(clerk: Clerk) -> None:
        clerk.ended(entry("a"), "cancelled")

    at_work(books, test)
    assert books.batches == [([], [("a", "cancelled")])]


def test_heartbeats_outlast_everything() -> None:
    """Neither a Redis that is away nor garbage in RQ's registries ends them."""
    books = Books(AWAY)

    async def test(clerk: Clerk) -> None:
        beating = asyncio.create_task(clerk.beat())
        while not books.maintained.is_set() or books.failures:
            await asyncio.wait([beating], timeout=0.001)
        books.maintained.clear()
        while not books.maintained.is_set():
            await asyncio.wait([beating], timeout=0.001)
        assert not beating.done()
        beating.cancel()

    with structlog.testing.capture_logs() as said:
        at_work(books, test)
    assert {line["event"] for line in said} == {"rq.heartbeat_missed", "rq.maintenance_failed"}
