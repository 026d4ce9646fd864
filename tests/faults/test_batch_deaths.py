"""A batch whose producer and worker are killed again and again: every row is in the output exactly once."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Final

import pytest

from tests.faults.report import Experiment
from tests.live.batch_processes import batch, check_answers, map_rows, paced, paid, read, write
from tests.tally import TALLY
from tests.world import World

STREAMS: Final = 40
"""What a worker holds when it is killed, and so what is paid again."""


@pytest.mark.experiment(40)
def test_every_row_once_whoever_is_killed(
    world: World, tmp_path: Path, experiment: Experiment, soak: bool, seed: int
) -> None:
    """Both are killed at random moments, in turn and together; the same command goes on."""
    kills, count = (20, 4000) if soak else (3, 240)
    chance = random.Random(seed)
    experiment.note(f"{kills} kills of the producer, {kills} of the worker, {count} rows, seed {seed}")
    world.environ["MILLSTREAM_MAX_ATTEMPTS"] = "100"  # one row may be held by several workers that die
    paced(world, 0.005)
    source, out = write(tmp_path / "in.jsonl", map_rows(count)), tmp_path / "out.jsonl"
    worker = world.worker("--streams", f"{STREAMS}")
    for round_ in range(kills):
        with batch(world.environ, source, out, "--window", "60") as run:
            run.wait_for(min(count - 1, run.written() + chance.randrange(1, max(2, count // (kills + 1)))))
            time.sleep(chance.random() * 0.05)  # any moment, not always the one after a line was written
            if round_ % 2:
                worker.kill()
                run.process.kill()
                worker = world.worker("--streams", f"{STREAMS}")
            else:
                run.process.kill()
                worker.kill()
                worker = world.worker("--streams", f"{STREAMS}")
        TALLY.trials += 1
    with batch(world.environ, source, out, "--window", "60") as run:
        assert run.end(within=300)[0] == 0
    check_answers(read(out), count)
    # What the producer left open is picked up; only what a killed worker held is paid again.
    assert count <= paid(world).total() <= count + kills * STREAMS
