"""The real model, over raw HTTP. One server for the module: loading it takes two seconds."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from local import guard, model
from local.parts import Model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    part = Model(tmp_path_factory.mktemp("model") / "model.log")
    part.start()
    yield part
    part.stop()


def stream(server: Model, prompt: str, max_tokens: int) -> Generator[str, None, None]:
    """The data lines of one streamed chat completion."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    body = {
        "model": model.NAME,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": True,
    }
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    try:
        response = connection.getresponse()
        assert response.status == 200
        for line in response:
            if line.startswith(b"data: "):
                yield line.removeprefix(b"data: ").decode().strip()
    finally:
        connection.close()


def test_the_model_streams_a_chat_completion(server: Model) -> None:
    """Ready means ready: the first request is answered token by token, with a finish reason and [DONE]."""
    *events, done = stream(server, "Say hello.", max_tokens=12)
    choices = [json.loads(event)["choices"][0] for event in events]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert done == "[DONE]"
    assert text.strip()
    assert len(choices) > 3
    assert choices[-1]["finish_reason"] in ("stop", "length")


def test_four_answers_are_written_at_once(server: Model) -> None:
    """Every slot streams: all four have begun before any has ended."""
    streams = [stream(server, f"Tell a story about the number {number}.", max_tokens=40) for number in range(4)]
    begun = [next(each) for each in streams]
    assert len(begun) == 4
    for each in streams:
        assert list(each)[-1] == "[DONE]"


def test_the_model_comes_back_at_its_address(tmp_path: Path) -> None:
    """A killed model that is started again is found where it was."""
    part = Model(tmp_path / "model.log")
    part.start()
    try:
        url = part.url
        assert part._child is not None
        part._child.kill()
        part._child.wait()
        assert not part.alive
        part.start()
        assert (part.url, part.alive) == (url, True)
    finally:
        part.stop()


def test_sigterm_in_mid_stream_ends_it_in_order(tmp_path: Path) -> None:
    """SIGTERM while an answer is being written: exit status 0, soon."""
    part = Model(tmp_path / "model.log")
    part.start()
    try:
        answer = stream(part, "Count to one thousand.", max_tokens=1500)
        next(answer)
        assert part._child is not None
        part._child.send_signal(signal.SIGTERM)
        assert part._child.wait(15) == 0
        answer.close()
    finally:
        part.stop()


def test_a_taken_port_is_one_line() -> None:
    """What was found and what to do, and exit status 1."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "local.model", "--port", str(port)],
            capture_output=True,
            text=True,
            check=False,
            cwd=guard.ROOT,
            timeout=60,
        )
    assert ended.returncode == 1
    assert ended.stdout == ""
    last = ended.stderr.splitlines()[-1]
    assert last == f"local.model: 127.0.0.1:{port} is taken by another program: end it or choose another --port"
