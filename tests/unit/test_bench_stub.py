"""The upstream stub, over real sockets, read with the standard library alone."""

import http.client
import json
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bench import stamps, toolchain
from bench.processes import Processes, wait_until
from bench.servers import Stub
from bench.toolchain import BenchError

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="the stub is a C program and there is no compiler")


@pytest.fixture(params=["plain", "tls"], scope="module")
def stub(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stub]:
    with Processes(tmp_path_factory.mktemp("stub")) as processes:
        try:
            with closing(Stub(processes, 0, tls=request.param == "tls")) as running:
                yield running
        except BenchError as error:
            if request.param == "tls" and "OpenSSL" in str(error):
                pytest.skip("no OpenSSL headers to build the TLS stub with")
            raise


_opened: list[http.client.HTTPConnection] = []


@pytest.fixture(autouse=True)
def _connections_end_with_the_test() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()


def ask(stub: Stub, model: str) -> http.client.HTTPResponse:
    """Opens a stream of this shape."""
    connection = stub.connect()
    _opened.append(connection)
    connection.request("POST", "/v1/chat/completions", json.dumps({"model": model, "messages": [], "stream": True}))
    return connection.getresponse()


def events(response: http.client.HTTPResponse) -> list[Any]:
    """All events to the end of the answer; the last is the text [DONE]."""
    lines = response.read().decode().split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def test_an_answer_is_an_openai_stream_from_role_to_done(stub: Stub) -> None:
    """Role, content, finish_reason, usage, [DONE], as the API sends them."""
    role, *chunks, finish, usage, done = events(ask(stub, "stub:rate=0,chunks=5"))

    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5
    assert finish["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 5
    assert done == "[DONE]"


def test_an_answer_can_come_whole(stub: Stub) -> None:
    """For clients that do not stream: one chat.completion, and the connection stays."""
    for length in (1, 5, 2000):
        response = ask(stub, f"stub:chunks={length},whole=1")
        found = json.loads(response.read())
        assert found["object"] == "chat.completion"
        assert len(found["choices"][0]["message"]["content"]) == 4 * length
        assert found["usage"]["completion_tokens"] == length


def test_a_chunk_has_the_size_of_a_real_one(stub: Stub) -> None:
    """250 to 350 bytes around 4 characters, or CPU figures mean nothing."""
    raw = ask(stub, "stub:rate=0,chunks=20").read().decode()
    sizes = [len(event) + 2 for event in raw.split("\n\n")[1:21]]

    assert 250 <= min(sizes) <= max(sizes) <= 350


def test_content_tells_its_age_on_pythons_clock(stub: Stub) -> None:
    """The stamp is the moment of sending, by the clock that time.monotonic_ns reads."""
    before = stamps.now()
    chunk = events(ask(stub, "stub:rate=0,chunks=1"))[1]
    after = stamps.now()

    [age] = stamps.ages(chunk["choices"][0]["delta"]["content"], after)
    assert 0 <= age <= (after - before) % stamps.WRAP


def test_a_paced_stream_keeps_its_rate(stub: Stub) -> None:
    """By the stamps themselves: a period of 10 ms, nothing early, nothing in bunches. What is late, the machine was."""
    chunks = events(ask(stub, "stub:rate=100,chunks=60"))[1:-3]
    [*ages] = stamps.ages("".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks), stamps.now())
    behind = [(ages[0] - age) * stamps.UNIT_US - 10_000 * number for number, age in enumerate(ages)]

    assert len(chunks) == 60
    # The schedule is that of the chunk that was the least late. Of another period, or of a bunch, one or two are on it.
    assert sum(late - min(behind) < 1000 for late in behind) > len(chunks) / 4


def test_held_streams_begin_together_at_the_word(stub: Stub) -> None:
    """Nothing flows before /go, though the answer has begun; /finish ends what runs, properly."""
    responses = [ask(stub, "stub:rate=200,chunks=100000,hold=1") for _ in range(3)]
    assert stub.stats()["held"] == 3
    sent = stub.stats()["sent"]

    stub.go()
    wait_until("chunks", lambda: stub.stats()["sent"] >= sent + 30, seconds=10)
    stub.finish()

    for response in responses:
        received = events(response)
        assert received[-1] == "[DONE]"
        assert received[-2]["usage"]["completion_tokens"] == len(received) - 4
    assert stub.stats()["running"] == stub.stats()["held"] == 0


def test_a_lingering_stream_stays_open_until_the_end_is_asked_for(stub: Stub) -> None:
    """So that a log can be weighed while its job is live."""
    before = stub.stats()
    response = ask(stub, "stub:rate=1000,chunks=3,linger=1,phase=0")
    wait_until("the third chunk", lambda: stub.stats()["sent"] == before["sent"] + 3, seconds=5)
    assert stub.stats()["running"] == 1
    assert stub.stats()["finished"] == before["finished"]
    stub.finish()

    assert len(events(response)) == 1 + 3 + 3
    assert stub.stats()["finished"] == before["finished"] + 1


def test_a_connection_serves_one_stream_after_another(stub: Stub) -> None:
    """Keep-alive: what the answer's end leaves is ready for the next request."""
    connection = stub.connect()
    _opened.append(connection)
    for chunks in (1, 700, 0):
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": f"stub:rate=0,chunks={chunks}"}))
        assert len(events(connection.getresponse())) == chunks + 4


def test_an_unpaced_answer_waits_for_its_reader_and_loses_nothing(stub: Stub) -> None:
    """Back-pressure: a reader that pauses stops the stub, and then gets every byte."""
    count = 20_000
    response = ask(stub, f"stub:rate=0,chunks={count},content=256")

    def blocked() -> bool:
        before = stub.stats()["sent"]
        time.sleep(0.1)  # a rate is measured, not waited for
        return stub.stats()["sent"] == before

    wait_until("the stub to be stopped by its reader", blocked, seconds=10)
    assert stub.stats()["running"] == 1
    received = events(response)

    assert len(received) == count + 4
    assert sum(len(event["choices"][0]["delta"]["content"]) for event in received[1:-3]) == 256 * count


def test_a_reader_that_leaves_is_forgotten(stub: Stub) -> None:
    """A stream without a reader costs nothing and is counted as aborted."""
    before = stub.stats()
    connection = stub.connect()
    _opened.append(connection)
    connection.request("POST", "/v1/chat/completions", json.dumps({"model": "stub:rate=1000,chunks=100000"}))
    response = connection.getresponse()
    response.close()
    connection.close()

    wait_until("the stream to be dropped", lambda: stub.stats()["aborted"] == before["aborted"] + 1, seconds=5)
    assert stub.stats()["running"] == 0


@pytest.mark.parametrize("model", ["gpt-4o", "stub:rate=-1", "stub:content=5", "stub:content=99999999"])
def test_what_is_no_stream_of_the_stub_is_refused(stub: Stub, model: str) -> None:
    """A shape out of bounds is an error, not a guess."""
    assert ask(stub, model).status == 404


def test_a_request_in_pieces_is_one_request(tmp_path: Path) -> None:
    """TCP promises bytes, not messages."""
    body = json.dumps({"model": "stub:rate=0,chunks=2"}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    with Processes(tmp_path) as processes:
        stub = Stub(processes, 0)
        with socket.create_connection(("127.0.0.1", stub.port), timeout=10) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(len(request)):
                sock.sendall(request[at : at + 1])
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                received += sock.recv(65536)

    assert received.count(b'"delta":{"content":') == 2


def test_without_a_compiler_the_bench_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message names the remedy."""
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(BenchError, match="no C compiler"):
        toolchain.build_stub(cache=tmp_path)
