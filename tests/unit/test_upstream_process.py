"""The upstream steered from another process: scripts in model names, commands on standard input, dead addresses."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.upstream import ScriptedUpstream, black_hole, expected_text, never_accepted, refused, seed_of
from tests.upstream.raw_client import RawClient, Response


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    """A server on the test's own loop."""
    async with ScriptedUpstream() as running:
        yield running


async def asked(port: int, model: str, prompt: str = "hi", **params: Any) -> Response:
    """The answer to one request for this model."""
    async with RawClient(port) as client:
        client.ask(prompt, model=model, **params)
        return await client.response()


async def test_a_model_name_says_what_to_stream(upstream: ScriptedUpstream) -> None:
    """Chunks, pace, seed, finish reason, framing, packets: all from the name."""
    told = await asked(upstream.port, "scripted:chunks=6,seed=7,first=0.01,pace=0.001,finish=length,split=9,gzip=1")
    assert told.text() == expected_text(6, 7)
    assert told.chunks[-1]["choices"][0]["finish_reason"] == "length"
    bare = await asked(upstream.port, "scripted:chunks=3,finish=none,done=0,framing=close", "p")
    assert bare.text() == expected_text(3, seed_of("p"))
    assert (bare.ending, len(bare.data)) == ("eof", 4)
    upstream.open_gate("enough")
    cut_short = await asked(upstream.port, "scripted:chunks=9,pace=0.001,seed=7,until=enough")
    assert (cut_short.text(), cut_short.chunks[-1]["choices"][0]["finish_reason"]) == ("", "stop")
    whole = await asked(upstream.port, "scripted:chunks=3", "p", stream=False)
    assert json.loads(whole.body)["choices"][0]["message"]["content"] == expected_text(3, seed_of("p"))


@pytest.mark.parametrize(
    ("fault", "ending"),
    [("reset_after", "reset"), ("close_after", "eof"), ("cut_after", "eof"), ("error_after", "complete")],
)
async def test_a_model_name_says_what_to_break_and_how_often(
    upstream: ScriptedUpstream, fault: str, ending: str
) -> None:
    """With times=1 each prompt meets the fault once, after so many chunks, and then a good stream."""
    model = f"scripted:chunks=9,seed=7,{fault}=4,times=1"
    for prompt in ("a", "b"):
        broken = await asked(upstream.port, model, prompt)
        assert (broken.ending, expected_text(4, 7)) == (ending, "".join(_contents(broken)))
        good = await asked(upstream.port, model, prompt)
        assert (good.ending, good.text()) == ("complete", expected_text(9, 7))


def _contents(response: Response) -> Iterator[str]:
    for event in response.body.decode().split("\n\n"):
        if event.endswith("}") and '"choices"' in event:
            yield json.loads(event[6:])["choices"][0]["delta"].get("content", "")


async def test_a_model_name_can_ask_for_a_status(upstream: ScriptedUpstream) -> None:
    """Refusals with their retry-after, for ever or so many times."""
    limited = await asked(upstream.port, "scripted:status=429,retry_after=0.5,times=2")
    assert (limited.status, limited.headers["retry-after"]) == (429, "0.5")
    assert (await asked(upstream.port, "scripted:status=429,retry_after=0.5,times=2")).status == 429
    assert (await asked(upstream.port, "scripted:status=429,retry_after=0.5,times=2")).status == 200
    assert [(await asked(upstream.port, "scripted:status=500")).status for _ in range(3)] == [500] * 3


async def test_a_stall_in_a_model_name_ends_with_the_client(upstream: ScriptedUpstream) -> None:
    """`stall_after=0` sends nothing at all, not even a head."""
    async with RawClient(upstream.port) as client:
        client.ask(model="scripted:stall_after=0")
        entry = await upstream.journal.wait_for_async(lambda journal: journal[0])
    await upstream.journal.wait_for_async(lambda journal: journal.open_streams == 0)
    assert (entry.bytes_sent, entry.outcome) == (0, "client_closed")


@pytest.mark.parametrize("wrong", ["chunks=x", "nonsense=1", "framing=paper", "reset_after=1,close_after=1"])
async def test_a_model_name_that_cannot_be_read_is_a_400(upstream: ScriptedUpstream, wrong: str) -> None:
    """A typing error in a name must not pass for a good stream."""
    assert (await asked(upstream.port, f"scripted:{wrong}")).status == 400


class Process:
    """`python -m tests.upstream` with these arguments."""

    def __init__(self, *arguments: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.upstream", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout is not None
        self.port = urlsplit(self.popen.stdout.readline().strip()).port or 0

    def command(self, line: str) -> str:
        """The answer to one command."""
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()
        return self.popen.stdout.readline().strip()


async def test_a_process_of_its_own_serves_and_tells_its_journal() -> None:
    """Commands are answered a line each; when standard input ends, so does the server, cleanly."""
    process = Process("--port", "0", "--commands")
    try:
        response = await asked(process.port, "scripted:chunks=5,seed=2", "far away")
        assert response.text() == expected_text(5, 2)
        (entry,) = json.loads(process.command("journal"))
        assert (entry["prompt"], entry["outcome"], entry["chunks_sent"]) == ("far away", "finished", 7)
        assert json.loads(process.command("count")) == {"total": 1, "open": 0, "max_open": 1}
        assert process.command("open door") == "opened door"
        assert process.command("sing").startswith("not a command")
    finally:
        _, errors = process.popen.communicate(timeout=10)
    assert (process.popen.returncode, errors) == (0, "")


async def test_sigterm_ends_the_process_cleanly() -> None:
    """Its clients see their connections closed, it exits with 0 and says nothing."""
    process = Process("--require-key")
    try:
        assert (await asked(process.port, "m")).status == 401
        async with RawClient(process.port) as client:
            client.ask(model="scripted:stall_after=1", headers="api-key: k\r\n")
            await client.until(b"data: ")
            process.popen.send_signal(signal.SIGTERM)
            assert (await client.response()).ending == "eof"
    finally:
        process.popen.terminate()  # had the test failed before it did; a second time does no harm
        _, errors = process.popen.communicate(timeout=10)
    assert (process.popen.returncode, errors) == (0, "")


async def test_dead_ends_refuse_hang_or_stay_silent() -> None:
    """Three ways of not answering: no listener, no handshake, no accept."""
    with refused() as url, pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
    with black_hole() as url, pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.open_connection("127.0.0.1", urlsplit(url).port), 0.3)
    with never_accepted() as url:
        async with RawClient(urlsplit(url).port or 0) as client:
            client.ask()
            await client.writer.drain()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.response(), 0.3)
