"""What one schedule is made of, all of it from its seed: who takes part, what is asked, what goes wrong and when."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .network import Faults
from .upstream import Temper

ACTIONS = (
    "kill", "stop", "terminate", "terminate twice", "cut", "stop by RQ",
    "outage", "lose the tail", "read only", "stall", "clock", "flush scripts", "cut subscribers", "stop a reader",
    "deliver again", "lose an entry", "lose a hash", "late claim", "repack", "forget",
)  # fmt: skip
"""All kinds; what each of them is stands in fate.py."""

DEAF = frozenset({"outage", "lose the tail", "read only", "stall", "clock", "cut"})
"""Kinds that keep a worker from renewing in time, or from hearing that it is no longer the holder."""

DEADLY = frozenset({"kill", "stop", "late claim"})
"""Kinds that may cost an attempt whatever the lease."""

CONSUMERS_WAIT = frozenset({"outage", "lose the tail", "stall", "clock", "cut subscribers", "stop a reader"})

PATIENT = 2.0
"""Seconds of the slowest request that a writer still waits for."""

LONG = 15.0
"""A lease, in seconds, that outlasts any outage, stall or series of lost replies of a schedule: the default."""


@dataclass
class Wanted:
    """One job: when it is asked for, how, and when somebody changes their mind."""

    job_id: str
    at: float
    options: dict[str, Any]
    cancels: list[float]
    submits: int = 1
    """How many ask for it at once, under one id."""
    in_batch: bool = False


@dataclass
class Reader:
    """One consumer: when it begins, and after how many events it reconnects (0: never)."""

    job_id: str
    delay: float
    every: int


@dataclass
class Weather:
    """A schedule's plan."""

    seed: int
    lease: float
    workers: int
    streams: int
    grace: float
    dialect: str
    until: float
    faults: Faults
    temper: Temper
    jobs: list[Wanted]
    readers: list[Reader]
    reads_all: bool = False
    actions: list[tuple[float, str, float]] = field(default_factory=list)

    @property
    def kinds(self) -> set[str]:
        return {kind for _, kind, _ in self.actions}

    @property
    def hearing(self) -> bool:
        """Whether nothing comes between a living worker and the server."""
        return not self.faults.any and not self.kinds & DEAF

    @property
    def harmless(self) -> bool:
        """Whether nothing in it may cost an attempt."""
        hasty = {"lose the tail", "terminate", "terminate twice"}  # a hand-over must succeed within 5 s
        patient = self.lease >= LONG and self.faults.slowest <= PATIENT and not self.kinds & hasty
        return not self.kinds & DEADLY and (self.hearing or patient)

    @property
    def clear(self) -> bool:
        """Whether nothing comes between consumers and the server."""
        return not self.faults.any and not self.kinds & CONSUMERS_WAIT


def forecast(seed: int, only: Sequence[str] | None = None) -> Weather:
    """The plan of this seed. With `only`, these kinds of actions alone, and more of them; without any of them, calm
    weather on a slow network, with readers that come late and stay."""
    rng = random.Random(seed)
    likes = [kind for kind in ACTIONS if rng.random() < 0.35] if only is None else only
    until = rng.uniform(3, 10)
    weather = Weather(
        seed=seed,
        lease=rng.choice((0.6, 1.0, 1.0, 2.0, LONG)),
        workers=rng.choice((1, 2, 2, 3)),
        streams=rng.choice((1, 2, 4)),
        grace=rng.choice((0.0, 0.5, 2.0)),
        dialect=rng.choice(("", "vllm", "mistral")),
        until=until,
        faults=_network(rng) if only != [] else Faults(latency=0.05),
        temper=_upstream(rng),
        jobs=[_job(rng, f"j{number}", until) for number in range(rng.choice((1, 2, 3, 4)))],
        readers=[],
        reads_all=rng.random() < 0.3,
    )
    for job in weather.jobs:
        for _ in range(rng.choice((1, 1, 2))):
            delay, every = rng.choice((0, 0, rng.uniform(0, until))), rng.choice((0, 0, 3, 7))
            if only == []:
                delay, every = job.at + rng.uniform(0, 3), 0
            weather.readers.append(Reader(job.job_id, delay, every))
    if likes:
        count = rng.randrange(7) if only is None else rng.randint(2, 4)
        weather.actions = sorted((rng.uniform(0.2, until), rng.choice(likes), rng.random()) for _ in range(count))
    return weather


def _network(rng: random.Random) -> Faults:
    if rng.random() < 0.4:
        return Faults(latency=rng.choice((0.001, 0.02)))
    return Faults(
        cut_request=rng.choice((0.0, 0.02)),
        cut_reply=rng.choice((0.0, 0.05, 0.2, 0.2)),
        silence=rng.choice((0.0, 0.005)),
        slow=rng.choice((0.0, 0.05)),
        slowest=rng.choice((0.3, 2.0, 8.0)),
        latency=rng.choice((0.001, 0.02)),
    )


def _upstream(rng: random.Random) -> Temper:
    if rng.random() < 0.3:
        return Temper(longest=rng.choice((24, 60)), pace=rng.choice((0.05, 0.15)))
    return Temper(
        breaks=rng.choice((0.0, 0.3, 0.6)),
        refuses=rng.choice((0.0, 0.2)),
        rejects=rng.choice((0.0, 0.05)),
        stalls=rng.choice((0.0, 0.15)),
        spares=rng.choice((0.0, 0.1)),
        longest=rng.choice((0, 12, 24, 60, 60)),
        pace=rng.choice((0.05, 0.15, 0.5)),
    )


def _job(rng: random.Random, job_id: str, until: float) -> Wanted:
    options: dict[str, Any] = {
        "lane": rng.choice(("interactive", "interactive", "batch")),
        "on_break": rng.choice(("restart", "restart", "continue", "fail")),
    }
    if rng.random() < 0.3:
        options["max_attempts"] = rng.choice((1, 2, 5))
    if rng.random() < 0.15:
        options["expires"] = rng.choice((0.1, 1.0, 5.0))
    at = rng.choice((0.0, rng.uniform(0, until)))
    cancels = [rng.uniform(at, until + 2)] if rng.random() < 0.3 else []
    submits = 2 if rng.random() < 0.15 else 1
    return Wanted(job_id, at, options, cancels * rng.choice((1, 1, 2)), submits, in_batch=rng.random() < 0.3)
