"""The oracle bites: each thing that the guarantees rest on is taken out, and the simulation must notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.simulation.judge import judge
from tests.simulation.schedule import Schedule
from tests.simulation.weather import forecast

from .mutations import MUTATIONS, Mutation

MOST = 200
"""Schedules, always the same ones, within which a mutation must be noticed."""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.missing)
def test_the_simulation_notices_what_is_missing(mutation: Mutation, say: Callable[[str], None]) -> None:
    """A test that cannot fail proves nothing; and the same schedule goes well when nothing is missing."""
    with mutation.apply():
        noticed = next(((seed, found) for seed in range(MOST) if (found := _complaints(seed, mutation))), None)
    assert noticed is not None, f"without {mutation.missing}, {MOST} schedules went well"
    seed, complaints = noticed
    say(f"without {mutation.missing}: noticed in schedule {seed + 1}: {complaints[0][:150]}")
    assert _complaints(seed, mutation) == []


def _complaints(seed: int, mutation: Mutation) -> list[str]:
    schedule = Schedule(forecast(seed, mutation.only))
    schedule.play()
    judge(schedule)
    return schedule.complaints
