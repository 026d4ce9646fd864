"""How long a reader waits for a server that went away."""

from __future__ import annotations

import logging

import pytest

from millstream.errors import RedisUnavailable
from millstream.outage import OUTAGE, Outage
from millstream.testing import ManualClock

AWAY = RedisUnavailable("away")


def test_a_server_that_never_answered_is_no_outage() -> None:
    """A wrong address is told at once."""
    with pytest.raises(RedisUnavailable):
        Outage(ManualClock()).outlast(AWAY)


def test_a_reader_may_sleep_over_what_it_was_given(caplog: pytest.LogCaptureFixture) -> None:
    """An outage begins with its first failure, not with the last answer; each is told once."""
    clock = ManualClock()
    outage = Outage(clock)
    with caplog.at_level(logging.WARNING, "millstream"):
        for _ in range(2):
            outage.answered()
            clock.advance(2 * OUTAGE)
            for _ in range(3):
                outage.outlast(AWAY)
    assert len(caplog.records) == 2
    clock.advance(OUTAGE + 1)
    with pytest.raises(RedisUnavailable):
        outage.outlast(AWAY)


def test_a_deadline_ends_the_waiting() -> None:
    """Whoever waits for so many seconds waits no longer for a server."""
    clock = ManualClock()
    outage = Outage(clock, until=clock() + 5)
    outage.answered()
    outage.outlast(AWAY)
    clock.advance(5)
    with pytest.raises(RedisUnavailable):
        outage.outlast(AWAY)
