"""The tree of errors, and that every message tells what to do."""

from __future__ import annotations

import inspect
import pickle

import pytest

from millstream import errors
from millstream.errors import (
    JobCancelled,
    JobError,
    JobExists,
    JobExpired,
    JobFailed,
    JobNotFound,
    LogRewound,
    MillstreamError,
    ResultTimeout,
    SpecError,
)

CLASSES = [each for _, each in inspect.getmembers(errors, inspect.isclass) if each.__module__ == errors.__name__]

ABOUT_A_JOB: list[JobError] = [
    JobNotFound("a1"),
    JobExists("a1"),
    JobExpired("a1"),
    LogRewound("a1", 7, 5),
    JobFailed("a1", "upstream_error", "it said no"),
    JobCancelled("a1"),
    ResultTimeout("a1", 2.0),
]


def test_one_except_catches_everything() -> None:
    """All errors of the package are MillstreamErrors."""
    assert len(CLASSES) == 12
    assert all(issubclass(each, MillstreamError) for each in CLASSES)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    """Every class is drawn."""
    for each in CLASSES:
        assert each.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize("error", ABOUT_A_JOB, ids=lambda error: type(error).__name__)
def test_an_error_about_a_job_names_it(error: JobError) -> None:
    """In the message for people and as `job_id` for programs."""
    assert error.job_id == "a1"
    assert "'a1'" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("error", ABOUT_A_JOB, ids=lambda error: type(error).__name__)
def test_an_error_crosses_processes(error: JobError) -> None:
    """Process pools pickle what a task raises; it must arrive as it left."""
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_errors_are_what_python_calls_them() -> None:
    """A timeout is a TimeoutError, a bad spec a ValueError."""
    assert issubclass(ResultTimeout, TimeoutError)
    assert issubclass(SpecError, ValueError)


def test_a_failed_job_says_why_in_one_word() -> None:
    """`code` is for programs, the message for people."""
    error = JobFailed("a1", "upstream_error", "it said no")
    assert (error.code, error.reason) == ("upstream_error", "it said no")
    assert "upstream_error" in str(error)
