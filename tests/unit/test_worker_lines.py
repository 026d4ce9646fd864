"""When a worker asks for the lines it knows of: at its turn, and when something says that it is worth it before."""

from __future__ import annotations

import pytest

from worker.lines import BROKEN, LATEST, Lines


@pytest.fixture
def lines() -> Lines:
    """Two lines of others, due at 10 and 20; spread: half a tenth of a second."""
    found = Lines(spread=lambda: 0.05)
    found.looked([("a", 10.0), ("b", 20.0)])
    return found


def test_a_line_of_others_is_asked_for_when_it_is_due(lines: Lines) -> None:
    """Spread, since all workers learn of it by their looks."""
    assert lines.next(0.0) == 10.05
    assert lines.to_ask(10.0) == []
    assert lines.to_ask(10.05) == ["a"]
    assert lines.turn("a", 10.05) == 0.0


def test_who_was_told_its_turn_asks_exactly_then(lines: Lines) -> None:
    """Others come for the tickets before it; a look does not change that."""
    lines.answered("a", 10.05, 0.2, 0.6)
    lines.looked([("a", 10.25), ("b", 20.0)])
    assert lines.next(10.1) == pytest.approx(10.65)
    assert lines.busy_for("a", 10.1) == pytest.approx(0.15)
    assert lines.turn("a", 10.1) == pytest.approx(0.55)


def test_what_came_back_is_worth_asking_before_its_turn(lines: Lines) -> None:
    """And the turn is kept: it is said with the question."""
    lines.answered("a", 10.0, 5.0, 5.5)
    lines.moves("a", 11.0, 0.0)
    assert lines.to_ask(11.0) == ["a"]
    assert lines.turn("a", 11.0) == pytest.approx(4.5)
    lines.moves("c", 11.0, 0.1)
    assert lines.to_ask(11.2) == ["a", "c"]


def test_a_line_that_came_forward_is_not_left_to_one_turn(lines: Lines) -> None:
    """Whoever was to ask may be dead, or have no slot free: a look finds the line due and others take over."""
    lines.answered("a", 10.0, 40.0, 40.5)
    lines.looked([("a", 12.0)])
    assert lines.next(12.0) == pytest.approx(12.0 + LATEST + 0.05)


def test_an_empty_line_is_forgotten(lines: Lines) -> None:
    """By an answer, or a look that does not find it."""
    lines.answered("a", 10.0, None, 0.0)
    assert "a" not in lines
    lines.looked([])
    assert lines.next(10.0) is None


def test_a_broken_meter_is_left_alone_for_a_while(lines: Lines) -> None:
    """It is said once."""
    assert lines.breaks("a", 10.0)
    assert not lines.breaks("a", 11.0)
    assert lines.next(11.0) == 20.05
    assert lines.to_ask(11.0) == []
    assert lines.to_ask(11.0 + BROKEN) == ["a", "b"]
