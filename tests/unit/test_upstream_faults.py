"""Each thing a script can do to a client, as a raw socket sees it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import pytest

from tests.upstream import (
    BOM,
    Chunk,
    Close,
    Comment,
    CutChunked,
    Done,
    Event,
    Filler,
    Finish,
    Headers,
    Ping,
    Raw,
    Reset,
    Script,
    ScriptedUpstream,
    Split,
    Stall,
    Text,
    Usage,
    WaitFor,
    answer,
    azure,
    error,
    error_event,
    expected_text,
    html,
    rate_limited,
    redirect,
    tool_call,
)
from tests.upstream.raw_client import RawClient, Response
from tests.upstream.script import Framing


@pytest.fixture(params=["own loop", "thread"])
async def upstream(request: pytest.FixtureRequest) -> AsyncIterator[ScriptedUpstream]:
    """A server on the test's own loop, asyncio's, and one in a thread, on uvloop."""
    if request.param == "thread":
        with ScriptedUpstream() as running:
            yield running
    else:
        async with ScriptedUpstream() as running:
            yield running


async def played(upstream: ScriptedUpstream, script: Script) -> Response:
    """What a client gets that asks for this script and reads to the end."""
    upstream.script(script)
    async with RawClient(upstream.port) as client:
        client.ask()
        response = await client.response()
    await upstream.journal.wait_for_async(lambda journal: journal.open_streams == 0)
    return response


@pytest.mark.parametrize("after", [0, 1, 7])
async def test_a_reset_comes_after_exactly_the_chunks_before_it(upstream: ScriptedUpstream, after: int) -> None:
    """`Reset` is a RST, and what was sent before it reaches the client."""
    response = await played(upstream, Script(*([Text(after)] if after else []), Reset()))
    assert response.ending == "reset"
    assert len(response.chunks) == after
    assert upstream.journal[-1].outcome == "reset_by_script"
    assert upstream.journal[-1].chunks_sent == after


async def test_a_reset_waits_until_a_slow_client_was_sent_what_came_before(upstream: ScriptedUpstream) -> None:
    """A RST drops the kernel's send queue, so the server must not send it while the client's window is shut."""
    upstream.script(Script(Filler(8_000_000), Reset(), framing="close"))
    async with RawClient(upstream.port) as client:
        client.ask()
        await client.until(b"aaa")  # then nothing is read: the stream's limit is reached and the window shuts
        response = await client.response()
    assert response.ending == "reset"
    assert len(response.body) == 8_000_000


async def test_close_ends_a_chunked_body_without_its_last_chunk(upstream: ScriptedUpstream) -> None:
    """`Close` under chunked framing is a FIN the client can tell is early."""
    response = await played(upstream, Script(Text(3), Close(), Text(3)))
    assert (response.ending, response.whole, len(response.chunks)) == ("eof", False, 3)
    assert upstream.journal[-1].outcome == "closed_by_script"


async def test_cut_chunked_ends_inside_a_chunk(upstream: ScriptedUpstream) -> None:
    """`CutChunked` promises more bytes than come."""
    response = await played(upstream, Script(Text(3), CutChunked(b"data: {")))
    assert (response.ending, response.whole) == ("eof", False)
    assert b"".join(response.reads).endswith(b"\r\n6b\r\ndata: {")


def test_cut_chunked_is_refused_where_there_are_no_chunks() -> None:
    """A script that cannot do what it says is an error where it is written."""
    with pytest.raises(ValueError, match="chunked"):
        Script(CutChunked(), framing="close")


@pytest.mark.parametrize("framing", ["chunked", "close", "content-length"])
async def test_a_script_that_runs_out_ends_its_body_properly(upstream: ScriptedUpstream, framing: Framing) -> None:
    """Every framing carries the same body, and ends it as HTTP wants."""
    response = await played(upstream, Script(Text(5, seed=3), framing=framing))
    assert response.text() == expected_text(5, seed=3)
    assert response.ending == ("eof" if framing == "close" else "complete")
    assert "[DONE]" not in response.data
    assert upstream.journal[-1].outcome == "finished"


async def test_a_content_length_counts_what_a_close_withholds(upstream: ScriptedUpstream) -> None:
    """Steps behind a `Close` are announced and never come."""
    response = await played(upstream, Script(Text(3), Close(), Text(5), framing="content-length"))
    assert (response.ending, response.whole, len(response.chunks)) == ("eof", False, 3)
    assert int(response.headers["content-length"]) > len(response.body) * 2


async def test_an_endless_body_has_no_content_length() -> None:
    """What the script got wrong is raised to the test, not answered to the client."""
    server = ScriptedUpstream()
    await server.start()
    response = await played(server, Script(Text(None), framing="content-length"))
    assert response.status == 0
    with pytest.raises(ValueError, match="endless"):
        await server.stop()


@pytest.mark.parametrize("framing", ["chunked", "close", "content-length"])
async def test_gzip_can_be_read_event_by_event(upstream: ScriptedUpstream, framing: Framing) -> None:
    """A compressed body is flushed at every event and says so in its head."""
    upstream.script(
        Script(Text(2), *([] if framing == "content-length" else [WaitFor("go")]), framing=framing, gzip=True)
    )
    async with RawClient(upstream.port) as client:
        client.ask()
        if framing != "content-length":
            await upstream.journal.wait_for_async(lambda journal: journal.waiting_for("go"))
            upstream.open_gate("go")
        response = await client.response()
    assert response.headers["content-encoding"] == "gzip"
    assert response.text() == expected_text(2)


async def test_split_makes_every_byte_a_chunk(upstream: ScriptedUpstream) -> None:
    """The body is cut at every byte, those inside UTF-8 characters too."""
    response = await played(upstream, Script(Split(1), Raw("漢字🌾".encode()), Text(2)))
    pieces = b"".join(response.reads).partition(b"\r\n\r\n")[2].split(b"\r\n")[:-3]
    assert set(pieces[::2]) == {b"1"}
    assert len(pieces) // 2 == len(response.body)
    assert response.body.startswith("漢字🌾".encode())


async def test_split_lets_a_client_on_the_same_loop_read_byte_by_byte() -> None:
    """Without framing around them, single bytes are what the client's reads return."""
    async with ScriptedUpstream() as upstream:
        response = await played(
            upstream, Script(Split(1, pause_seconds=0.001), Raw("漢字🌾".encode()), framing="close")
        )
    assert response.reads[1:] == [bytes([byte]) for byte in "漢字🌾".encode()]


async def test_line_ends_and_bom_are_as_ordered(upstream: ScriptedUpstream) -> None:
    """The SSE dialect is the script's: line end, space after the colon, BOM, event fields, comments, pings."""
    steps = (BOM, Event("a\nb", event="x", id="7", retry=3000), Event(), Comment("hm"), Ping(), Done())
    response = await played(upstream, Script(*steps, line_end="\r\n", colon=":"))
    assert response.body == (
        b"\xef\xbb\xbfevent:x\r\nid:7\r\nretry:3000\r\ndata:a\r\ndata:b\r\n\r\n\r\n"
        b":hm\r\n\r\nevent:ping\r\ndata:{}\r\n\r\ndata:[DONE]\r\n\r\n"
    )
    assert (
        await played(upstream, Script(Done(), Comment(), line_end="\r"))
    ).body == b"data: [DONE]\r\r: keep-alive\r\r"


async def test_headers_can_come_late_or_before_everything(upstream: ScriptedUpstream) -> None:
    """The head goes out with the first step that needs it: `Headers` sends it ahead of a wait, its absence behind."""
    upstream.script(Script(WaitFor("head"), Headers({"x-a": "b"}), WaitFor("event"), Text(1)))
    async with RawClient(upstream.port) as client:
        client.ask()
        await upstream.journal.wait_for_async(lambda journal: journal.waiting_for("head"))
        assert upstream.journal[-1].bytes_sent == 0
        upstream.open_gate("head")
        await client.until(b"x-a: b\r\n")
        await upstream.journal.wait_for_async(lambda journal: journal.waiting_for("event"))
        assert upstream.journal[-1].chunks_sent == 0
        upstream.open_gate("event")
        assert (await client.response()).text() == expected_text(1)


async def test_a_stall_says_nothing_until_the_client_leaves(upstream: ScriptedUpstream) -> None:
    """`Stall` holds the stream open, after what came before it."""
    upstream.script(answer(Text(2), Stall()))
    async with RawClient(upstream.port) as client:
        client.ask()
        entry = await upstream.journal.wait_for_async(lambda journal: journal[0].chunks_sent == 3 and journal[0])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.response(), 0.2)
        assert entry.ended_at is None
    await upstream.journal.wait_for_async(lambda journal: journal.open_streams == 0)
    assert entry.outcome == "client_closed"


async def test_a_stall_can_keep_sending_comments(upstream: ScriptedUpstream) -> None:
    """Keep-alive comments are bytes but no chunks."""
    upstream.script(Script(Stall(comment_every=0.01)))
    async with RawClient(upstream.port) as client:
        client.ask()
        await client.until(b": keep-alive\n\n\r\ne\r\n: keep-alive\n\n")
        assert upstream.journal[-1].chunks_sent == 0


async def test_a_paced_text_keeps_its_pace(upstream: ScriptedUpstream) -> None:
    """n chunks take (n - 1) paces, and come one by one."""
    started = time.monotonic()
    response = await played(upstream, Script(Text(51, pace_seconds=0.01, seed=5)))
    assert time.monotonic() - started >= 0.5
    assert response.text() == expected_text(51, seed=5)
    assert len(response.reads) > 10


async def test_a_late_server_catches_up_in_one_write() -> None:
    """The schedule is absolute: after its loop was blocked for 30 paces, what is overdue comes at once."""
    async with ScriptedUpstream() as upstream, RawClient(upstream.port) as client:
        upstream.script(Script(Text(51, pace_seconds=0.01, seed=5)))
        client.ask()
        await client.until(b"chat.completion.chunk")
        time.sleep(0.3)  # noqa: ASYNC251 - to block the loop is the point
        response = await client.response()
    assert response.text() == expected_text(51, seed=5)
    assert max(read.count(b"chat.completion.chunk") for read in response.reads) >= 25


async def test_a_gzip_bomb_is_small_on_the_wire(upstream: ScriptedUpstream) -> None:
    """`Filler` under gzip inflates a thousandfold or nearly so."""
    response = await played(upstream, Script(Filler(20_000_001), gzip=True))
    assert len(response.body) == 20_000_001
    assert upstream.journal[-1].bytes_sent < 60_000


async def test_an_endless_stream_goes_on_until_the_client_leaves(upstream: ScriptedUpstream) -> None:
    """`Text(None)` and `Filler(None)` need no memory and do not starve the loop."""
    for step in (Text(None), Filler(None)):
        upstream.script(Script(step))
        async with RawClient(upstream.port) as client:
            client.ask()
            for _ in range(50):
                assert await client.reader.read(65536)
        await upstream.journal.wait_for_async(lambda journal: journal.open_streams == 0)
        assert upstream.journal[-1].outcome == "client_closed"


async def test_refusals_and_pages_are_whole_responses(upstream: ScriptedUpstream) -> None:
    """Statuses, also unregistered ones, headers, OpenAI's error JSON, HTML with 200 and redirects."""
    overloaded = await played(upstream, error(529, "later", type="overloaded"))
    assert (overloaded.status, overloaded.ending) == (529, "complete")
    assert json.loads(overloaded.body) == {
        "error": {"message": "later", "type": "overloaded", "param": None, "code": None}
    }
    limited = await played(upstream, rate_limited({"retry-after-ms": "1500"}, "insufficient_quota"))
    assert (limited.status, limited.headers["retry-after-ms"]) == (429, "1500")
    assert json.loads(limited.body)["error"]["code"] == "insufficient_quota"
    page = await played(upstream, html())
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    moved = await played(upstream, redirect("http://127.0.0.1:1/v1", 308))
    assert (moved.status, moved.headers["location"]) == (308, "http://127.0.0.1:1/v1")


async def test_errors_can_come_inside_the_stream(upstream: ScriptedUpstream) -> None:
    """A 200 may carry an error object, or `event: error` with the bare object."""
    response = await played(upstream, Script(Text(1), error_event("full", 503), error_event("bad", "x", named=True)))
    assert json.loads(response.data[1])["error"]["code"] == 503
    assert b'event: error\ndata: {"message":"bad","type":"server_error","code":"x"}\n\n' in response.body


async def test_broken_chunks_break_exactly_what_was_ordered(upstream: ScriptedUpstream) -> None:
    """`raw` is laid over the chunk, content may have any type, a lone surrogate travels as an escape."""
    broken = (Chunk(raw={"choices": None}), Chunk(content=5), Chunk(content="\ud83d"), Finish(""))
    response = await played(upstream, Script(*broken))
    nothing, number, surrogate, end = response.chunks
    assert nothing["choices"] is None
    assert nothing["object"] == "chat.completion.chunk"
    assert number["choices"][0]["delta"] == {"content": 5}
    assert surrogate["choices"][0]["delta"]["content"] == "\ud83d"
    assert end["choices"][0]["finish_reason"] == ""


async def test_n_choices_take_turns(upstream: ScriptedUpstream) -> None:
    """With n=3 the indices alternate chunk by chunk, each with its own text."""
    response = await played(upstream, answer(Text(4, seed=8, choices=3), choices=3))
    assert [choice["index"] for chunk in response.chunks for choice in chunk["choices"]] == [0, 1, 2] * 6
    assert [response.text(i) for i in range(3)] == [expected_text(4, seed=8 + i) for i in range(3)]


async def test_the_dialects_carry_their_fields(upstream: ScriptedUpstream) -> None:
    """Azure's empty and delta-less choices, tool calls, reasoning under both names, refusals, usage without choices."""
    cloud = await played(upstream, azure(Text(2)))
    assert cloud.chunks[0]["choices"] == []
    assert "prompt_filter_results" in cloud.chunks[0]
    assert "delta" not in cloud.chunks[-1]["choices"][0]
    thoughts = (Chunk(reasoning="a"), Chunk(reasoning="b", reasoning_field="reasoning"), Chunk(refusal="no"))
    other = await played(upstream, answer(*thoughts, *tool_call("f", ["{", "}"]), Usage(), finish="tool_calls"))
    deltas = [chunk["choices"][0]["delta"] for chunk in other.chunks if chunk["choices"]]
    assert deltas[1:4] == [{"reasoning_content": "a"}, {"reasoning": "b"}, {"refusal": "no"}]
    assert "".join(delta["tool_calls"][0]["function"]["arguments"] for delta in deltas[4:7]) == "{}"
    assert other.chunks[-2]["usage"] == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}


async def test_text_chunks_are_as_large_as_openais(upstream: ScriptedUpstream) -> None:
    """250 to 350 bytes an event with about four characters of content: what the budgets were measured with."""
    response = await played(upstream, Script(Text(200)))
    sizes = [len(event) + 2 for event in response.body.split(b"\n\n") if event]
    assert len(sizes) == 200
    assert min(sizes) >= 250
    assert max(sizes) <= 350
    assert 3 <= len(expected_text(200)) / 200 <= 5
