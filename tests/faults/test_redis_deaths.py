"""The server is killed under live jobs, with every setting of its append-only file, and on a disk that is slow."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from millstream import Client, JobNotFound
from tests.contract.consumers import Consumer
from tests.faults.crowd import Crowd, Submitter, Watcher
from tests.faults.report import Experiment
from tests.tally import TALLY
from tests.valkey import Valkey
from tests.worker_process import wait_until
from tests.world import World

JOBS: Final = 50


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Callable[[World], Client]:
    """Makes clients that try everything once, so that a submit whose reply is lost is told so."""

    def make(world: World) -> Client:
        with monkeypatch.context() as patch:
            patch.setattr("millstream.redis_door.RETRIES", 0)
            return Client(settings=world.settings)

    return make


def die_and_come_back(server: Valkey, moments: random.Random) -> float:
    """Kill it at a random moment and start it again a random while later; when it was killed."""
    time.sleep(moments.uniform(0.0, 0.5))
    server.kill()
    killed = time.monotonic()
    time.sleep(moments.uniform(0.0, 0.7))
    server.restart()
    return killed


@pytest.mark.experiment(24)
def test_what_was_accepted_outlives_a_server_that_syncs_always(
    make_world: Callable[..., World], make_valkey: Callable[..., Valkey], impatient: Callable[[World], Client],
    soak: bool, seed: int, experiment: Experiment,
) -> None:  # fmt: skip
    """kill -9 under 50 live jobs and under submits: every id that was returned completes, consumers see the whole log.

    An id that was not returned is wholly there or not there at all, and no attempt is lost.
    """
    moments = random.Random(seed)
    server = make_valkey(appendfsync="always")
    world = make_world(server.url)
    workers = [world.worker(), world.worker()]
    accepted = unanswered = 0
    for number in range(7 if soak else 1):
        TALLY.trials += 1
        crowd = Crowd(world, f"always {seed} {number}", JOBS)
        consumer = Consumer(world.make_client, crowd.jobs)
        crowd.streams()
        submitter = Submitter(world, lambda: impatient(world), "submitted at the very moment")
        die_and_come_back(server, moments)
        submitter.wait_for_more(10)
        submitter.stop()
        seen = consumer.join()
        crowd.check({job_id: [events] for job_id, events in seen.items()})
        for job_id in submitter.accepted:
            submitter.check_one(job_id)
        submitter.check_refused()
        accepted += len(submitter.accepted)
        unanswered += len(submitter.refused)
        for job_id in [*crowd.jobs, *submitter.accepted]:
            assert world.client.status(job_id).broken == 0
    assert all(worker.alive for worker in workers)
    world.check_left()
    experiment.note(f"appendfsync always, seed {seed}: {accepted} more submitted meanwhile, {unanswered} unanswered")


@pytest.mark.experiment(24)
def test_what_a_server_that_syncs_every_second_lost_is_said(
    make_world: Callable[..., World], make_valkey: Callable[..., Valkey], impatient: Callable[[World], Client],
    soak: bool, seed: int, experiment: Experiment,
) -> None:  # fmt: skip
    """kill -9 under 50 live jobs: what the server was still to write is missing, and whoever saw it is told.

    A server that was killed between an answer and its next write may have lost a few; everything else is as with
    `always`.
    """
    moments = random.Random(seed)
    server = make_valkey(appendfsync="everysec")
    world = make_world(server.url)
    workers = [world.worker(), world.worker()]
    loss = Loss()
    for number in range(7 if soak else 1):
        TALLY.trials += 1
        crowd = Crowd(world, f"everysec {seed} {number}", JOBS)
        watchers = [Watcher(world.make_client, job_id) for job_id in crowd.jobs]
        crowd.streams()
        submitter = Submitter(world, lambda: impatient(world), "submitted at the very moment")
        killed = die_and_come_back(server, moments)
        submitter.wait_for_more(10)
        submitter.stop()
        loss.check(world, [crowd], watchers, killed, submitter)
    assert all(worker.alive for worker in workers)
    world.check_left()
    experiment.note(f"appendfsync everysec, seed {seed}: {loss}")


class Loss:
    """What a server lost, and that everybody was told. `check` raises for whatever was lost in silence, or mixed."""

    def __init__(self) -> None:
        self.jobs = self.rewound = self.whole = 0

    def __str__(self) -> str:
        return f"{self.whole} jobs whole, {self.jobs} accepted jobs lost and said so, {self.rewound} consumers told"

    def check(
        self, world: World, crowds: Sequence[Crowd], watchers: Sequence[Watcher], killed: float,
        submitter: Submitter | None = None,
    ) -> dict[str, Exception | None]:  # fmt: skip
        """What the watchers were told, by job."""
        told = {watcher.job_id: watcher.told() for watcher in watchers}
        self.rewound += sum(1 for each in told.values() if each is not None)
        for crowd in crowds:
            for job_id, prompt in zip(crowd.jobs, crowd.prompts, strict=True):
                self._check_one(world, job_id, crowd.texts(prompt))
        for watcher in watchers:
            if told[watcher.job_id] is None:
                watcher.check(world, [killed])
        if submitter is not None:
            for job_id in submitter.accepted:
                if not self._is_lost(world, job_id):
                    submitter.check_one(job_id)
                    self.whole += 1
            submitter.check_refused()
        return told

    def _check_one(self, world: World, job_id: str, texts: Sequence[str]) -> None:
        if self._is_lost(world, job_id):
            return
        result = world.outcome(job_id, 60)
        if result.status == "failed":
            assert result.error is not None
            assert result.error["code"] == "log_lost", result.error
        else:
            assert result.text in texts, f"{job_id}: no attempt said this: {result.text[:200]!r}"
            self.whole += 1
        world.check(job_id)

    def _is_lost(self, world: World, job_id: str) -> bool:
        """Whether the server forgot the job: then wholly, and whoever asks is told."""
        try:
            world.outcome(job_id, 60)
        except JobNotFound:
            assert not world.redis.exists(world.keys.spec(job_id), world.keys.log(job_id))
            assert world.redis.zscore(world.keys.open, job_id) is None
            self.jobs += 1
            return True
        return False


def holds_back(world: World, server: Valkey) -> bool:
    """Whether the server stands still, from now on, in a moment in which it has not written what it acknowledged."""
    before = written(server)
    if world.redis.info("persistence")["aof_buffer_length"] <= 50_000:
        return False
    server.freeze()
    if written(server) == before:
        return True
    server.thaw()
    return False


def written(server: Valkey) -> int:
    """Bytes in its append-only files."""
    return sum(path.stat().st_size for path in server.folder.rglob("*.aof"))


SLOW_DISK: Final = """
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <unistd.h>
int fdatasync(int fd) { usleep(1500000); return syscall(SYS_fdatasync, fd); }
int fsync(int fd) { usleep(1500000); return syscall(SYS_fsync, fd); }
"""


@pytest.fixture
def slow_disk(tmp_path: Path) -> Iterator[Callable[[], Valkey]]:
    """Starts a server whose every fsync takes 1.5 s longer; only its own restart is spared."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a disk slow with")
    source, shim = tmp_path / "slow_disk.c", tmp_path / "slow_disk.so"
    source.write_text(SLOW_DISK)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", shim, source], check=True)
    server = Valkey.start(appendfsync="everysec", environ={"LD_PRELOAD": str(shim)})
    yield lambda: server
    server.close()


@pytest.mark.experiment(24)
def test_what_a_slow_disk_lost_is_said(
    make_world: Callable[..., World], slow_disk: Callable[[], Valkey], impatient: Callable[[World], Client],
    soak: bool, seed: int, experiment: Experiment,
) -> None:  # fmt: skip
    """While an fsync of 1.5 s is under way nothing is written: kill -9 loses claims, events, ends and whole jobs.

    Jobs that are lost are `JobNotFound`; whoever saw more than there is gets `LogRewound`, also when another worker
    has by then begun the same attempt anew and written more than that; no list and no text is mixed.
    """
    server = slow_disk()
    shim = server.environ
    moments = random.Random(seed)
    world = make_world(server.url, MILLSTREAM_STREAMS="15")
    workers = [world.worker(), world.worker()]
    loss = Loss()
    for number in range(4 if soak else 1):
        TALLY.trials += 1
        # Two crowds, so that the server loses of some jobs everything, of others the claim, or the tail, or the end.
        early = Crowd(world, f"slow disk {number}, early", 40, chunks=130)
        early.streams(30)
        time.sleep(moments.uniform(0.0, 2.0))
        late = Crowd(world, f"slow disk {number}, late", 20, chunks=130)
        watchers = [Watcher(world.make_client, job_id) for job_id in [*early.jobs, *late.jobs]]
        submitter = Submitter(world, lambda: impatient(world), "submitted at the very moment", pause=0.1)
        wait_until(lambda: holds_back(world, server), "writes that wait")
        server.kill()
        killed = time.monotonic()
        server.environ = {}
        server.restart()
        submitter.wait_for_more(5)
        submitter.stop()
        # What it held back is lost. Who is told depends on who had seen it, and looks before a worker has it back.
        loss.check(world, [early, late], watchers, killed, submitter)
        if soak:
            server.environ = shim
            server.restart()
    assert all(worker.alive for worker in workers)
    world.check_left()
    experiment.note(f"appendfsync everysec, fsync 1.5 s, seed {seed}: {loss}")
