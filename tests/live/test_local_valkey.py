"""The server that `local` starts, with the real program."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from local.errors import LocalError, PartFailed, PortTaken
from local.valkey import Valkey


@contextlib.contextmanager
def connect(server: Valkey) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        yield client


@pytest.mark.parametrize("unix", [False, True])
def test_a_started_server_answers_at_its_url(unix: bool) -> None:
    """When `start` has returned, the first command works, over TCP and over a unix socket."""
    with Valkey.start(unix=unix) as server, connect(server) as client:
        assert client.ping()
        assert client.info("server")["process_id"] == server.pid


def test_the_server_keeps_what_the_guarantees_need() -> None:
    """AOF is on, nothing is evicted, and the fsync policy is the one that was asked for."""
    with Valkey.start(appendfsync="always") as server, connect(server) as client:
        assert client.config_get("append*")["appendonly"] == "yes"
        assert client.config_get("append*")["appendfsync"] == "always"
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def test_options_reach_the_server() -> None:
    """A test that needs a small or odd server can have one."""
    with Valkey.start(options=("--maxmemory", "64mb")) as server, connect(server) as client:
        assert client.config_get("maxmemory") == {"maxmemory": str(64 * 1024 * 1024)}


@pytest.mark.parametrize("unix", [False, True])
def test_a_killed_server_comes_back_with_its_data_at_its_address(unix: bool) -> None:
    """kill -9 loses nothing that `appendfsync always` acknowledged, and clients find the server where it was."""
    with Valkey.start(appendfsync="always", unix=unix) as server:
        url, pid = server.url, server.pid
        with connect(server) as client:
            client.set("kept", "yes")
        server.kill()
        assert not server.alive
        server.restart()
        assert (server.url, server.alive) == (url, True)
        assert server.pid != pid
        with connect(server) as client:
            assert client.get("kept") == "yes"


def test_a_stopped_server_has_written_everything(tmp_path: Path) -> None:
    """A clean stop keeps the last write under `everysec` too, for another server on the same folder."""
    with Valkey.start(tmp_path) as server, connect(server) as client:
        client.set("kept", "yes")
    with Valkey.start(tmp_path) as server, connect(server) as client:
        assert client.get("kept") == "yes"


def test_servers_started_at_once_are_all_their_own() -> None:
    """Eight parallel starts: eight working servers, none of them mistaken for another; all live on when the threads
    that started them have ended."""
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(8) as pool:
            servers = [stack.enter_context(server) for server in pool.map(lambda _: Valkey.start(), range(8))]
        assert len({server.url for server in servers}) == 8
        for server in servers:
            with connect(server) as client:
                client.set("mine", server.pid)
        for server in servers:
            with connect(server) as client:
                assert (client.get("mine"), client.dbsize()) == (str(server.pid), 1)


def test_a_port_taken_by_redis_is_an_error_that_says_so() -> None:
    """One line that names the port, what answers there and what to do."""
    with Valkey.start() as first:
        port = first.port
        with pytest.raises(PortTaken) as caught:
            Valkey.start(port=port)
        with connect(first) as client:
            assert client.ping()
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1:{port} (Address already in use): a Redis or Valkey server answers there; "
        f"use it (REDIS_URL=redis://127.0.0.1:{port}/0) or choose another port"
    )


def test_a_port_taken_by_something_else_is_an_error_that_says_so() -> None:
    """A listener that does not speak Redis is not recommended as one."""
    says = pytest.raises(PortTaken, match="something else listens there; end it or choose another port")
    with socket.create_server(("127.0.0.1", 0)) as listener, says:
        Valkey.start(port=listener.getsockname()[1])


def test_a_server_that_cannot_run_shows_its_last_words() -> None:
    """The error ends with what the server itself logged."""
    with pytest.raises(PartFailed, match=r"(?s)ended at its start, exit status 1.*no-such-option"):
        Valkey.start(options=("--no-such-option", "1"))


def test_a_folder_too_deep_for_a_socket_is_refused(tmp_path: Path) -> None:
    """A unix socket's path has a limit; the error says which way to go."""
    with pytest.raises(LocalError, match="too long for a socket's path"):
        Valkey.start(tmp_path / ("deep" * 30), unix=True)


def test_closing_leaves_no_process_and_no_folder() -> None:
    """A temporary server is gone without a trace, also when it is closed twice."""
    server = Valkey.start()
    server.close()
    server.close()
    assert not server.folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)
