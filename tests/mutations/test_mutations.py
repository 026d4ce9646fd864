"""The oracle bites: each thing that the guarantees rest on is taken out, and the simulation must notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.simulation.judge import judge
from tests.simulation.schedule import Schedule
from tests.simulation.weather import forecast

from .mutations import MUTATIONS

MOST = 400
"""Schedules, always the same ones, within which a mutation must be noticed; none needed more than 100 when written."""


@pytest.mark.parametrize("missing", MUTATIONS)
def test_the_simulation_notices_what_is_missing(missing: str, say: Callable[[str], None]) -> None:
    """A test that cannot fail proves nothing."""
    with MUTATIONS[missing]():
        for seed in range(MOST):
            schedule = Schedule(forecast(seed))
            schedule.play()
            judge(schedule)
            if schedule.complaints:
                say(f"without {missing}: noticed in schedule {seed + 1}: {schedule.complaints[0][:150]}")
                return
    pytest.fail(f"without {missing}, {MOST} schedules went well")
