"""The exit status: what a script learns from a command."""

from __future__ import annotations

import itertools

import pytest

from millstream import errors
from millstream.events import TERMINAL_STATUSES
from producer import exits
from producer.__main__ import COMMANDS


def test_the_help_names_every_command_that_is_done_or_not() -> None:
    """What a command without an ending of its own says with 0."""
    told = dict(exits.MEANINGS)[exits.DONE]
    assert [name for name in set(COMMANDS) - {"submit", "follow", "result"} if name not in told] == []


def test_every_ending_of_a_job_has_its_own_exit_status() -> None:
    """A script can tell the four endings apart."""
    assert set(exits.ENDINGS) == TERMINAL_STATUSES
    assert {ending: exits.worst([ending]) for ending in exits.ENDINGS} == {
        "completed": 0, "failed": 1, "incomplete": 3, "cancelled": 4,
    }  # fmt: skip


def test_of_several_jobs_the_worst_speaks_whatever_their_order() -> None:
    """Completed is better than incomplete, that than cancelled, that than failed."""
    best_first = ["completed", "incomplete", "cancelled", "failed"]
    for worst in range(1, 5):
        for order in itertools.permutations(best_first[:worst]):
            assert exits.worst(order) == exits.ENDINGS[best_first[worst - 1]]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.JobFailed("a", "x", "y"), 1),
        (errors.LogRewound("a", 2, 1), 1),
        (errors.SettingsError("x"), 2),
        (errors.SpecError("x"), 2),
        (errors.JobNotFound("a"), 2),
        (errors.JobExists("a"), 2),
        (errors.JobExpired("a"), 2),
        (errors.MillstreamError("x"), 2),
        (errors.RedisUnavailable("x"), 5),
        (errors.ResultTimeout("a", 1.0), 124),
    ],
)
def test_every_error_of_the_library_has_its_exit_status(error: errors.MillstreamError, status: int) -> None:
    """The statuses are those of the interface; --help lists each of them."""
    assert exits.of_error(error) == status
    assert status in dict(exits.MEANINGS)
