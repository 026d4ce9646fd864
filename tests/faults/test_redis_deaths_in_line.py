"""The server is killed while jobs wait in the line of a limit and tickets are held."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from millstream.meters import Limits
from tests.faults.report import Experiment
from tests.live.test_worker_limits import arrivals, in_lines, most_within, submit_many
from tests.tally import TALLY
from tests.upstream import Text, answer
from tests.valkey import Valkey
from tests.worker_process import wait_until
from tests.world import World, table


@pytest.mark.experiment(24)
def test_a_line_outlives_a_server_that_syncs_always(
    make_world: Callable[..., World], make_valkey: Callable[..., Valkey], tmp_path: Path, soak: bool,
    experiment: Experiment,
) -> None:  # fmt: skip
    """kill -9 with jobs in line and on the way out of it: each completes in its first attempt, none is asked for twice,
    and neither a window nor a sixth of one holds more than it may, by the upstream's own count.
    """
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    limits = Limits(requests=120, streams=12, window=12.0)
    server = make_valkey(appendfsync="always")
    file = tmp_path / "upstreams.toml"
    world = make_world(server.url, MILLSTREAM_UPSTREAMS=str(file))
    tables = "[upstreams.up.limits]\nrpm = 120\nstreams = 12\nwindow = 12"
    file.write_text(table("up", world.upstream.base_url, f'api_key_env = "OPENAI_API_KEY"\n{tables}'))
    world.upstream.on(answer(Text(10, pace_seconds=0.03, seed=3), usage=True))
    workers = [world.worker(), world.worker(), world.worker()]
    deaths, jobs = (6, 360) if soak else (2, 150)
    ids = submit_many(world, [f"job {number}" for number in range(jobs)], model="m")
    for _ in range(deaths):
        TALLY.trials += 1
        asked = len(arrivals(world))
        wait_until(lambda: len(arrivals(world)) > asked + 10 and in_lines(world) > 0, "the line moves")  # noqa: B023
        time.sleep(moments.uniform(0.0, 0.5))
        server.kill()
        server.restart()
    for job_id in ids:
        assert world.outcome(job_id, 60).status == "completed"
        assert (world.client.status(job_id).attempt, world.client.status(job_id).broken) == (1, 0)
    times = arrivals(world)
    assert len(times) == jobs
    assert most_within(times, limits.window) <= limits.requests
    assert most_within(times, limits.window / 6) <= limits.requests // 4
    wait_until(lambda: world.client.limits()[0].streams.used == 0, "every ticket is back")
    assert all(worker.alive for worker in workers)
    world.check_left()
    experiment.note(f"{deaths} deaths with jobs in line, seed {seed}: {jobs} completed, each asked for once")
