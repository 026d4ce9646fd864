"""What the journal knows of a client, and how soon."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.upstream import Request, Script, ScriptedUpstream, Stall, Text, WaitFor, answer
from tests.upstream.raw_client import RawClient


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    """A server on the test's own loop."""
    async with ScriptedUpstream() as running:
        yield running


@asynccontextmanager
async def beside() -> AsyncIterator[tuple[asyncio.StreamWriter, asyncio.Future[float]]]:
    """A connection to a server on the same loop that does nothing, and the moment when its client was seen leaving."""
    gone: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def see(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        gone.set_result(time.monotonic())
        writer.close()

    async with await asyncio.start_server(see, "127.0.0.1", 0) as server:
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        yield writer, gone


@pytest.mark.parametrize("how", ["fin", "rst", "half"])
@pytest.mark.parametrize("script", [answer(Text(None, pace_seconds=3600)), answer(Stall()), answer(Text(None))])
async def test_a_client_that_leaves_is_seen_at_once(upstream: ScriptedUpstream, script: Script, how: str) -> None:
    """Whether the script is pacing, stalled or sending as fast as it can, its client is seen leaving as soon as one
    that has asked nothing, within 100 ms.
    """
    upstream.script(script)
    async with RawClient(upstream.port) as client, beside() as (another, gone):
        client.ask()
        entry = await upstream.journal.wait_for_async(lambda journal: journal[0].bytes_sent > 0 and journal[0])
        left = time.monotonic()
        if how == "rst":
            client.reset()
        elif how == "half":
            client.writer.write_eof()
        else:
            client.writer.close()
        another.close()
        await upstream.journal.wait_for_async(lambda _: entry.closed_at)
        control = await gone
    assert entry.outcome == "client_closed"
    assert entry.ended_at is not None
    assert entry.closed_at is not None
    assert left <= entry.ended_at <= entry.closed_at < control + 0.1


async def test_a_client_that_reads_nothing_is_still_seen_leaving(upstream: ScriptedUpstream) -> None:
    """With its window shut and the server waiting to write, a client's RST ends the answer."""
    upstream.script(Script(Text(None)))
    async with RawClient(upstream.port) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # StreamWriter types it too narrowly
        client.ask()
        entry = await upstream.journal.wait_for_async(lambda journal: journal[0].bytes_sent > 100_000 and journal[0])
        client.reset()
        await upstream.journal.wait_for_async(lambda journal: journal.open_streams == 0)
    assert entry.outcome == "client_closed"


async def test_a_client_that_asks_and_leaves_at_once_has_asked(upstream: ScriptedUpstream) -> None:
    """A request is journaled when its last byte is here, however short its sender stays."""
    async with RawClient(upstream.port) as client:
        client.ask("gone")
        await client.writer.drain()
    entry = await upstream.journal.wait_for_async(lambda journal: journal[0].closed_at is not None and journal[0])
    assert upstream.requests_for("gone") == [entry]
    assert entry.outcome in ("client_closed", "finished")


async def test_a_client_that_leaves_at_done_has_had_everything(upstream: ScriptedUpstream) -> None:
    """Nothing can come between [DONE] and the end of the body: such an answer always counts as finished."""
    for _ in range(50):
        async with RawClient(upstream.port) as client:
            client.ask()
            await client.until(b"data: [DONE]")  # the text itself may say [DONE]
            client.reset()
    await upstream.journal.wait_for_async(lambda journal: all(entry.closed_at for entry in journal))
    assert {entry.outcome for entry in upstream.journal} == {"finished"}


async def test_requests_are_kept_as_sent(upstream: ScriptedUpstream) -> None:
    """Headers, JSON and prompt are there to assert on; the summary shows no header, so no key."""
    async with RawClient(upstream.port) as client:
        client.ask("one", headers="Authorization: Bearer canary\r\n", stream_options={"include_usage": True})
        await client.response()
    (entry,) = upstream.requests_for("one")
    assert entry.request.headers["authorization"] == "Bearer canary"
    assert entry.request.key == "canary"
    assert entry.request.json["stream_options"] == {"include_usage": True}
    assert entry.outcome == "finished"
    assert "canary" not in str(entry.summary())
    assert upstream.requests_for("two") == []


async def test_bytes_sent_are_the_bytes_received(upstream: ScriptedUpstream) -> None:
    """The count covers head, framing and body."""
    async with RawClient(upstream.port) as client:
        client.ask()
        response = await client.response()
    assert upstream.journal[0].bytes_sent == len(b"".join(response.reads))


async def test_open_streams_are_counted_and_their_peak_kept(upstream: ScriptedUpstream) -> None:
    """`open_streams` falls again, `max_open_streams` does not."""
    upstream.on(answer(WaitFor("all"), Text(1)))
    clients = [RawClient(upstream.port) for _ in range(5)]
    for client in clients:
        await client.__aenter__()
        client.ask()
    await upstream.journal.wait_for_async(lambda journal: len(journal.waiting_for("all")) == 5)
    assert upstream.open_streams == 5
    upstream.open_gate("all")
    await asyncio.gather(*(client.response() for client in clients))
    assert (upstream.open_streams, upstream.journal.max_open_streams) == (0, 5)
    for client in clients:
        client.writer.close()


async def test_a_wait_in_vain_shows_the_journal(upstream: ScriptedUpstream) -> None:
    """The error of a wait names what was there instead."""
    async with RawClient(upstream.port) as client:
        client.ask("what there was")
        await client.response()
    with pytest.raises(TimeoutError, match="what there was"):
        await upstream.journal.wait_for_async(lambda journal: len(journal) == 2, timeout=0.05)


async def test_a_predicates_own_error_reaches_the_waiter(upstream: ScriptedUpstream) -> None:
    """A mistake in a test's predicate is not a wait in vain."""
    with pytest.raises(ZeroDivisionError):
        await upstream.journal.wait_for_async(lambda _: 1 // 0)


async def test_a_wait_that_would_stop_its_own_loop_is_refused(upstream: ScriptedUpstream) -> None:
    """`wait_for` on the server's thread could never be answered."""
    with pytest.raises(RuntimeError, match="wait_for_async"):
        upstream.journal.wait_for(lambda _: False)


async def test_any_thread_may_wait(upstream: ScriptedUpstream) -> None:
    """The synchronous wait works beside a server on an asyncio test's loop, from another thread."""
    waiting = asyncio.to_thread(upstream.journal.wait_for, lambda journal: journal[0].outcome == "finished")
    task = asyncio.create_task(waiting)
    async with RawClient(upstream.port) as client:
        client.ask()
        await client.response()
    assert await task


async def test_a_short_journal_forgets_the_oldest() -> None:
    """`keep` bounds memory; the counts go on."""
    async with ScriptedUpstream(keep=2) as upstream, RawClient(upstream.port) as client:
        for prompt in ("a", "b", "c"):
            client.ask(prompt)
            await client.response()
        assert [entry.request.prompt for entry in upstream.journal] == ["b", "c"]
        assert upstream.journal.total == 3


async def test_a_broken_script_fails_the_test_that_wrote_it() -> None:
    """An error of a script's callable is no fault to be retried: the server's end raises it."""

    def broken(request: Request) -> Script:
        raise KeyError(request.prompt)

    upstream = ScriptedUpstream(default=broken)
    await upstream.start()
    async with RawClient(upstream.port) as client:
        client.ask("mistake")
        assert (await client.response()).status == 0
    assert upstream.journal[0].outcome == "failed"
    with pytest.raises(KeyError, match="mistake"):
        await upstream.stop()


async def test_a_failing_tests_own_error_is_not_hidden_by_a_broken_script() -> None:
    """What the `async with` body raises comes out, whatever the scripts did."""

    async def failing_test() -> None:
        async with ScriptedUpstream(default=lambda _: Script(Text(1 // 0))) as upstream:
            async with RawClient(upstream.port) as client:
                client.ask()
                await client.response()
            raise LookupError("the test")

    with pytest.raises(LookupError, match="the test"):
        await failing_test()
