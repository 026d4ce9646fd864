"""What a worker says of its Redis when it starts: it refuses what is unsafe and warns of what breaks a promise."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tally import TALLY
from tests.upstream import ScriptedUpstream
from tests.valkey import Valkey, free_port
from tests.worker_process import WorkerProcess
from tests.world import SHORT

pytestmark = pytest.mark.experiment(39)

Start = Callable[..., WorkerProcess]


@pytest.fixture
def start(tmp_path: Path) -> object:
    """Starts a worker on a Redis at any address: `start(url, MILLSTREAM_...="...")`."""
    started: list[WorkerProcess] = []
    with ScriptedUpstream() as upstream:

        def begin(url: str, **environ: str) -> WorkerProcess:
            TALLY.trials += 1
            settings = {**SHORT, "REDIS_URL": url, "OPENAI_BASE_URL": upstream.base_url, **environ}
            started.append(WorkerProcess(tmp_path / f"{len(started)}.log", settings, []))
            return started[-1]

        yield begin
        for each in started:
            each.end()


def own_address() -> str:
    """An address of this machine that is not loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = str(probe.getsockname()[0])
    if address.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    return address


def says(worker: WorkerProcess, status: int, *words: str) -> None:
    """It ends with this status and one line that has these words."""
    assert worker.wait() == status
    [line] = worker.log.read_text().splitlines()
    assert line.startswith("millstream-worker: ")
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in {line!r}"


def starts(worker: WorkerProcess) -> WorkerProcess:
    worker.ready()
    worker.terminate()
    assert worker.wait() == 0
    return worker


def test_elsewhere_without_a_password_is_refused(make_valkey: Callable[..., Valkey], start: Start) -> None:
    """Unless told that the network protects it. The same server on loopback is this machine's own affair."""
    address = own_address()
    server = make_valkey(options=["--bind", "127.0.0.1", address, "--protected-mode", "no"])
    elsewhere = f"redis://{address}:{server.port}/0"
    says(start(elsewhere), 2, f"{address}:{server.port}", "asks for no password", "MILLSTREAM_ALLOW_INSECURE_REDIS=1")
    starts(start(elsewhere, MILLSTREAM_ALLOW_INSECURE_REDIS="1"))
    starts(start(server.url))


def test_elsewhere_with_a_password_is_accepted(make_valkey: Callable[..., Valkey], start: Start) -> None:
    """The right one starts; a wrong one or none is named as what it is, and never shown."""
    address = own_address()
    server = make_valkey(options=["--bind", "127.0.0.1", address, "--protected-mode", "no"])
    with server.connect() as connection:
        connection.config_set("requirepass", "open-sesame")
    starts(start(f"redis://:open-sesame@{address}:{server.port}/0"))
    refusals = [start(f"redis://{login}{address}:{server.port}/0") for login in (":wrong-canary@", "")]
    for refused, words in zip(refusals, ("refused the password", "asks for a password and got none"), strict=True):
        says(refused, 5, f"{address}:{server.port}", words, "REDIS_URL")
        assert "canary" not in refused.log.read_text()


def test_what_breaks_a_promise_is_warned_of(make_valkey: Callable[..., Valkey], start: Start) -> None:
    """Eviction and a missing append-only file: said loudly, with the command that mends it."""
    server = make_valkey(options=["--maxmemory-policy", "allkeys-lru", "--appendonly", "no"])
    worker = starts(start(server.url))
    [evicts], [volatile] = worker.said("redis.evicts"), worker.said("redis.not_durable")
    assert (evicts["level"], evicts["policy"]) == ("warning", "allkeys-lru")
    assert "CONFIG SET maxmemory-policy noeviction" in evicts["promise"]
    assert volatile["level"] == "warning"
    assert "CONFIG SET appendonly yes" in volatile["promise"]
    with server.connect() as connection:
        connection.config_set("maxmemory-policy", "noeviction")
        connection.config_set("appendonly", "yes")
    worker = starts(start(server.url))
    assert not worker.said("redis.evicts")
    assert not worker.said("redis.not_durable")


def test_a_replica_is_refused(make_valkey: Callable[..., Valkey], start: Start) -> None:
    """It takes no writes; the line names its primary."""
    primary, replica = make_valkey(), make_valkey()
    with replica.connect() as connection:
        connection.replicaof("127.0.0.1", primary.port)
    says(start(replica.url), 5, f"127.0.0.1:{replica.port}", "replica", f"127.0.0.1:{primary.port}")


def test_a_cluster_is_refused(make_valkey: Callable[..., Valkey], start: Start) -> None:
    """A job and its queue live in different slots, so no script could hold them together."""
    server = make_valkey(options=["--cluster-enabled", "yes", "--cluster-port", str(free_port())])
    says(start(server.url), 2, f"127.0.0.1:{server.port}", "cluster mode")


def test_nobody_there_is_said_in_a_line(start: Start) -> None:
    """Where it looked, and how to have one."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        says(start(f"redis://127.0.0.1:{port}/0"), 5, f"127.0.0.1:{port}", "cannot be reached", "REDIS_URL")
