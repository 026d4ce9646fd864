"""What a server says when it cannot serve right now: asked again, by worker and library; else clear words."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
import redis.exceptions

from millstream import AsyncClient, Client, RedisUnavailable
from tests.contract.consumers import Consumer
from tests.faults.crowd import Crowd, Submitter
from tests.faults.report import Experiment
from tests.tally import TALLY
from tests.valkey import Valkey, free_port
from tests.worker_process import wait_until
from tests.world import World

ENDLESS_SCRIPT = "while true do redis.call('TIME') end"

NOWHERE = ("127.0.0.1", 1)
"""The address of a primary that is not there."""


def bare(server: Valkey) -> redis.Redis:
    """A connection that tries once."""
    return redis.Redis.from_url(server.url, retry=None, socket_timeout=30)


def heard(server: Valkey, words: str) -> bool:
    """Whether a read or a write is refused in these words now."""
    with bare(server) as connection:
        try:
            connection.get("probe")
            connection.set("probe", 1, px=10)
        except redis.exceptions.RedisError as error:
            return words in f"{error.status_code} {error}"
    return False


def forgetful(server: Valkey) -> None:
    """SCRIPT FLUSH, again and again."""
    with bare(server) as connection:
        for _ in range(50):
            connection.script_flush()
            time.sleep(0.02)


def busy(server: Valkey) -> None:
    """Somebody's script runs for a second."""
    with bare(server) as connection:
        connection.config_set("busy-reply-threshold", 50)

        def run() -> None:
            with pytest.raises(redis.exceptions.ResponseError, match="killed"):
                connection.eval(ENDLESS_SCRIPT, 0)

        other = threading.Thread(target=run)
        other.start()
        wait_until(lambda: heard(server, "BUSY"), "the server says BUSY")
        time.sleep(1)
        connection.script_kill()
        other.join()


def demoted(server: Valkey) -> None:
    """A failover in which the address leads to a replica for a second: READONLY."""
    with bare(server) as connection:
        connection.replicaof(*NOWHERE)
        assert heard(server, "READONLY")
        time.sleep(1)
        connection.replicaof("NO", "ONE")


def orphaned(server: Valkey) -> None:
    """The same with a replica that serves nothing without its primary: MASTERDOWN."""
    with bare(server) as connection:
        connection.config_set("replica-serve-stale-data", "no")
        connection.replicaof(*NOWHERE)
        wait_until(lambda: heard(server, "MASTERDOWN"), "the server says MASTERDOWN")
        time.sleep(1)
        connection.replicaof("NO", "ONE")
        connection.config_set("replica-serve-stale-data", "yes")  # as it was: `demoted` wants to hear READONLY


def alone(server: Valkey) -> None:
    """The server wants a replica and has none for a second: NOREPLICAS."""
    with bare(server) as connection:
        connection.config_set("min-replicas-to-write", 1)
        assert heard(server, "NOREPLICAS")
        time.sleep(1)
        connection.config_set("min-replicas-to-write", 0)


def loading(server: Valkey) -> None:
    """It was killed and reads its data for a while: LOADING."""
    server.kill()
    said = threading.Event()

    def listen() -> None:
        wait_until(lambda: heard(server, "LOADING"), "the server says LOADING")
        said.set()

    listener = threading.Thread(target=listen)
    listener.start()
    server.restart()  # in this thread: the server would die with another
    listener.join()
    assert said.is_set()


@pytest.mark.experiment(29)
def test_what_passes_by_itself_is_asked_again(
    make_world: Callable[..., World], make_valkey: Callable[..., Valkey], soak: bool, experiment: Experiment
) -> None:
    """Under each of six troubles of a second: every submit returns its id, every job runs in its first attempt, and
    consumers of both kinds see everything. Only a server that loads for longer than a client tries may refuse.
    """
    server = make_valkey(appendfsync="always", options=["--key-load-delay", "50"])
    world = make_world(server.url)
    workers = [world.worker(), world.worker()]
    troubles = [forgetful, busy, loading, demoted, orphaned, alone]
    troubles += [busy, demoted, orphaned, alone, forgetful] * (2 if soak else 0)
    for number, trouble in enumerate(troubles):
        TALLY.trials += 1
        crowd = Crowd(world, f"{trouble.__name__} {number}", 20, chunks=60, pace=0.01)
        makers: list[Callable[[], Client | AsyncClient]] = [
            world.make_client, lambda: AsyncClient(settings=world.settings),
        ]  # fmt: skip
        consumers = [Consumer(make, crowd.jobs) for make in makers]
        submitter = Submitter(world, world.make_client, "submitted meanwhile", pause=0.05)
        crowd.streams()
        trouble(server)
        submitter.wait_for_more(3)
        submitter.stop()
        assert trouble is loading or submitter.refused == []
        submitter.check_refused()
        seen = [consumer.join() for consumer in consumers]
        crowd.check({job_id: [each[job_id] for each in seen] for job_id in crowd.jobs})
        for job_id in submitter.accepted:
            submitter.check_one(job_id)
        for job_id in [*crowd.jobs, *submitter.accepted]:
            assert world.client.status(job_id).broken == 0, trouble.__name__
            assert world.client.status(job_id).attempt == 1, trouble.__name__
    assert all(worker.alive for worker in workers)
    world.check_left()
    names = ", ".join(dict.fromkeys(trouble.__name__ for trouble in troubles))
    experiment.note(f"{len(troubles)} troubles of a second ({names}): one attempt each")


@contextmanager
def a_server(*options: str, folder: Path | None = None) -> Iterator[Valkey]:
    server = Valkey.start(options=[*options, *(["--dir", str(folder)] if folder else [])])
    try:
        yield server
    finally:
        server.close()


@pytest.mark.experiment(29)
def test_a_server_that_cannot_save_is_named(make_world: Callable[..., World], tmp_path: Path) -> None:
    """MISCONF: the disk refuses the snapshot. Submit says so at once; the worker waits, and goes on afterwards."""
    (tmp_path / "dump.rdb").mkdir()
    with a_server("--save", "3600 1", folder=tmp_path) as server:
        world = make_world(server.url)
        worker = world.worker()
        with bare(server) as connection:
            connection.bgsave()
            wait_until(lambda: connection.info("persistence")["rdb_last_bgsave_status"] == "err", "the snapshot fails")
            with pytest.raises(RedisUnavailable, match="cannot write to its disk"):
                world.submit("refused")
            worker.wait_for("intake.redis_away")
            connection.config_set("stop-writes-on-bgsave-error", "no")
        world.check_text(world.submit("accepted"), "accepted")
        assert worker.alive
        world.check_left()


@pytest.mark.experiment(29)
def test_a_cluster_is_named(make_world: Callable[..., World]) -> None:
    """Cluster mode is not what Millstream runs on, and a client says so."""
    with a_server("--cluster-enabled", "yes", "--cluster-port", str(free_port())) as server:
        world = make_world(server.url)
        with pytest.raises(RedisUnavailable, match="cluster mode"):
            world.submit("refused")
