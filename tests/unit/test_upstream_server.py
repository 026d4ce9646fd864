"""The server as an API: what it accepts, how a request finds its script, how it starts, carries a load and stops."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.upstream import (
    DEFAULT_CHUNKS,
    Script,
    ScriptedUpstream,
    Stall,
    Text,
    WaitFor,
    answer,
    error,
    expected_text,
    good_answer,
    seed_of,
)
from tests.upstream.raw_client import RawClient, Response

MESSAGES = [{"role": "user", "content": "hi"}]
OPEN_FILES = Path("/proc/self/fd")


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    """A server on the test's own loop."""
    async with ScriptedUpstream() as running:
        yield running


async def asked(upstream: ScriptedUpstream, prompt: str = "hi", **params: Any) -> Response:
    """The answer to one request on a connection of its own."""
    async with RawClient(upstream.port) as client:
        client.ask(prompt, **params)
        return await client.response()


async def test_the_default_is_a_complete_stream_of_the_prompts_text(upstream: ScriptedUpstream) -> None:
    """Role, text, finish reason, [DONE]; usage only for those who ask for it."""
    response = await asked(upstream, "a question")
    assert response.text() == expected_text(DEFAULT_CHUNKS, seed_of("a question"))
    assert response.chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert response.chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert response.data[-1] == "[DONE]"
    with_usage = await asked(upstream, "a question", stream_options={"include_usage": True})
    assert with_usage.chunks[-1]["choices"] == []
    assert with_usage.chunks[-1]["usage"]["completion_tokens"] == DEFAULT_CHUNKS


async def test_unstreamed_requests_get_the_same_text_whole(upstream: ScriptedUpstream) -> None:
    """`stream` false is a chat.completion, with every choice of n."""
    response = await asked(upstream, "q", stream=False, n=2)
    said = [choice["message"]["content"] for choice in json.loads(response.body)["choices"]]
    assert said == [expected_text(DEFAULT_CHUNKS, seed_of("q") + i) for i in range(2)]


async def test_a_connection_serves_request_after_request(upstream: ScriptedUpstream) -> None:
    """HTTP/1.1 keep-alive after streams, refusals and pipelined requests; `connection: close` is honoured."""
    async with RawClient(upstream.port) as client:
        for prompt in ("a", "b"):
            client.ask(prompt)
            assert (await client.response()).ending == "complete"
        client.ask(model="unknown")
        assert (await client.response()).status == 404
        client.ask("c", headers="Connection: Close\r\n")
        closing = await client.response()
        assert (closing.whole, closing.headers["connection"]) == (True, "close")
        assert await client.reader.read() == b""
    assert {entry.connection for entry in upstream.journal} == {1}


async def test_pipelined_requests_are_answered_in_order(upstream: ScriptedUpstream) -> None:
    """Two requests in one packet: both journaled at once, answered one after the other."""
    upstream.script(error(500), error(503))
    async with RawClient(upstream.port) as client:
        client.ask("a")
        client.ask("b", headers="Connection: close\r\n")
        raw = await client.reader.read()
    assert raw.index(b"HTTP/1.1 500") < raw.index(b"HTTP/1.1 503")
    assert [entry.request.prompt for entry in upstream.journal] == ["a", "b"]


async def test_request_bodies_may_be_chunked(upstream: ScriptedUpstream) -> None:
    """A client may stream its body, in whatever packets."""
    body = json.dumps({"model": "m", "messages": MESSAGES, "stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    framed = b"5\r\n" + body[:5] + b"\r\n%x;x=y\r\n" % len(body[5:]) + body[5:] + b"\r\n0\r\n\r\n"
    async with RawClient(upstream.port) as client:
        for i in range(len(head + framed)):
            client.writer.write((head + framed)[i : i + 1])
            await client.writer.drain()
        assert (await client.response()).text() == expected_text(DEFAULT_CHUNKS, seed_of("hi"))


@pytest.mark.parametrize("said", [b"GET /\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"A / HTTP/1.1\r\nnone\r\n\r\n"])
async def test_what_is_not_http_is_refused(upstream: ScriptedUpstream, said: bytes) -> None:
    """A TLS hello or any other gibberish gets 400 and the door."""
    async with RawClient(upstream.port) as client:
        client.writer.write(said)
        assert (await client.reader.read()).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("params", "status", "code", "param"),
    [
        ({"model": "unknown"}, 404, "model_not_found", "model"),
        ({"model": ""}, 400, None, "model"),
        ({"messages": []}, 400, None, "messages"),
        ({"messages": ["hi"]}, 400, None, "messages"),
        ({"temperature": 3}, 400, None, "temperature"),
        ({"temperature": "hot"}, 400, None, "temperature"),
        ({"n": 0}, 400, None, "n"),
        ({"max_tokens": 0}, 400, None, "max_tokens"),
        ({"stream": False, "stream_options": {}}, 400, None, "stream_options"),
    ],
)
async def test_bad_parameters_are_named(
    upstream: ScriptedUpstream, params: dict[str, Any], status: int, code: str | None, param: str
) -> None:
    """An implausible request gets OpenAI's error JSON and uses up no script."""
    upstream.script(error(599))
    response = await asked(upstream, **params)
    assert response.status == status
    told = json.loads(response.body)["error"]
    assert (told["code"], told["param"]) == (code, param)
    assert (await asked(upstream)).status == 599


async def test_other_paths_methods_and_bodies_are_refused(upstream: ScriptedUpstream) -> None:
    """404, 405 and 400; /v1/models lists some."""
    async with RawClient(upstream.port) as client:
        for method, path, status in (("POST", "/v1/none", 404), ("GET", "/v1/chat/completions", 405)):
            client.send(method=method, path=path)
            assert (await client.response()).status == status
        client.send(b"{")
        assert (await client.response()).status == 400
        client.send(method="GET", path="/v1/models")
        assert json.loads((await client.response()).body)["object"] == "list"


@pytest.mark.parametrize(
    ("headers", "status"), [("", 401), ("Authorization: Bearer bad\r\n", 401), ("api-key: k\r\n", 200)]
)
async def test_a_key_is_required_if_told_so(headers: str, status: int) -> None:
    """No key and the key `bad` are 401; any other will do, as bearer token or `api-key`."""
    async with ScriptedUpstream(require_key=True) as upstream:
        assert (await asked(upstream, headers=headers)).status == status


async def test_queued_scripts_answer_the_next_requests(upstream: ScriptedUpstream) -> None:
    """One script each, then the default again."""
    upstream.script(error(503), error(500), answer(Text(2, seed=1)))
    assert [(await asked(upstream)).status for _ in range(3)] == [503, 500, 200]
    assert (await asked(upstream)).text() == expected_text(DEFAULT_CHUNKS, seed_of("hi"))


async def test_a_rules_scripts_follow_each_other_for_each_prompt(upstream: ScriptedUpstream) -> None:
    """Every prompt meets the first script first, and the last one stays; other models are not concerned."""
    upstream.on(error(503), error(500), answer(Text(2)), model="x")
    for prompt in ("a", "b"):
        assert [(await asked(upstream, prompt, model="x")).status for _ in range(4)] == [503, 500, 200, 200]
    assert (await asked(upstream, model="y")).status == 200


async def test_the_newest_fitting_rule_wins_and_may_be_a_callable(upstream: ScriptedUpstream) -> None:
    """Rules go by model and prompt; a callable sees the request."""
    upstream.on(error(500))
    upstream.on(lambda request: good_answer(request, n_chunks=len(request.prompt)), prompt="four")
    assert len((await asked(upstream, "four")).chunks) == 6
    assert (await asked(upstream, "other")).status == 500


async def test_200_streams_at_once_each_get_their_own_text(upstream: ScriptedUpstream) -> None:
    """All are open together, and none gets another's bytes."""
    prompts = [f"prompt {i}" for i in range(200)]
    upstream.on(lambda request: answer(WaitFor("all here"), Text(30, 0.005, seed_of(request.prompt))))
    streams = [asyncio.create_task(asked(upstream, prompt)) for prompt in prompts]
    await upstream.journal.wait_for_async(lambda journal: len(journal.waiting_for("all here")) == 200)
    upstream.open_gate("all here")
    for prompt, stream in zip(prompts, streams, strict=True):
        assert (await stream).text() == expected_text(30, seed_of(prompt))
    assert upstream.journal.max_open_streams == 200
    assert {entry.outcome for entry in upstream.journal} == {"finished"}


async def test_stopping_closes_every_connection_and_leaves_no_task() -> None:
    """Stalled, pacing and idle connections all end; what ran is journaled as stopped."""
    before = asyncio.all_tasks()
    async with ScriptedUpstream() as upstream:
        upstream.script(answer(Stall()), answer(Text(None, 30)))
        clients = [RawClient(upstream.port) for _ in range(3)]
        for client in clients:
            await client.__aenter__()
        clients[0].ask()
        clients[1].ask()
        await upstream.journal.wait_for_async(lambda journal: sum(entry.bytes_sent > 0 for entry in journal) == 2)
    assert [entry.outcome for entry in upstream.journal] == ["server_stopped"] * 2
    assert asyncio.all_tasks() == before
    for client in clients:
        await client.reader.read()
        assert client.reader.at_eof()
        client.writer.close()


async def test_a_stopped_server_comes_back_on_its_port() -> None:
    """An upstream may go away and return where clients look for it; while it is away they are refused."""
    upstream = ScriptedUpstream()
    await upstream.start()
    port = upstream.port
    assert (await asked(upstream)).status == 200
    await upstream.stop()
    with pytest.raises(ConnectionRefusedError):
        await asked(upstream)
    await upstream.start()
    assert upstream.port == port
    assert (await asked(upstream)).status == 200
    await upstream.stop()


def test_a_synchronous_test_runs_it_in_a_thread_that_leaves_nothing_behind() -> None:
    """Plain `with` needs no loop; afterwards threads and open files are what they were."""
    with ScriptedUpstream():
        pass  # the first libuv loop of a process opens a pipe for signals that it keeps for good
    threads, files = threading.enumerate(), len(list(OPEN_FILES.iterdir()))
    with ScriptedUpstream() as upstream:
        upstream.script(answer(Text(2), WaitFor("go"), Text(2)))
        body = json.dumps({"model": "m", "messages": MESSAGES, "stream": True}).encode()
        with urllib.request.urlopen(f"{upstream.base_url}/chat/completions", body, timeout=5) as response:
            upstream.journal.wait_for(lambda journal: journal.waiting_for("go"))
            upstream.open_gate("go")
            assert response.read().count(b"chat.completion.chunk") == 6
        with urllib.request.urlopen(f"{upstream.base_url}/models", timeout=5) as response:
            assert response.status == 200
    assert threading.enumerate() == threads
    assert len(list(OPEN_FILES.iterdir())) == files


def test_a_threads_broken_script_is_raised_where_the_test_is() -> None:
    """Leaving the `with` raises what a script did wrong on the server's thread."""
    upstream = ScriptedUpstream(default=lambda _: Script(Text(1 // 0)))
    with pytest.raises(ZeroDivisionError), upstream:
        asyncio.run(asked(upstream))


def test_a_port_that_is_taken_is_said_at_once() -> None:
    """Starting in a thread raises what went wrong there, and the thread is gone."""
    threads = threading.enumerate()
    with ScriptedUpstream() as upstream, pytest.raises(OSError, match="ddress already in use"):
        ScriptedUpstream(port=upstream.port).__enter__()
    assert threading.enumerate() == threads
