"""What the teller sends, in which order, and what it keeps when nobody hears it."""

from __future__ import annotations

from typing import Any

import pytest

from millstream.calls import Call
from millstream.errors import RedisUnavailable
from millstream.keys import Keys
from millstream.meters import NO_LIMITS, Meter, Settlement, learn
from worker.line import KeysBrokenError
from worker.teller import BATCH, Teller

KEYS = Keys()


class Ear:
    """Redis, as far as it hears: `fails` are the errors of the next calls."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, int]] = []
        self.fails: list[Exception | None] = []
        self.moved: list[str] = []
        self.broken: list[str] = []

    async def run(self, call: Call[Any]) -> Any:
        if self.fails and (error := self.fails.pop(0)) is not None:
            raise error
        self.heard.append((call.script, str(call.args[0]), len(call.args)))
        return 0.0

    def teller(self) -> Teller:
        return Teller(
            self.run, KEYS, lease=15.0, moves=lambda name, _: self.moved.append(name),
            broken=lambda name, _: self.broken.append(name),
        )  # fmt: skip


def said(name: str) -> tuple[str, Call[float]]:
    return f"{name}/m", learn(KEYS, Meter(name, "m", NO_LIMITS), cool=5.0)


async def test_what_an_upstream_said_goes_before_what_is_settled() -> None:
    """Until it is known, others ask an upstream that wants to be left alone."""
    ear = Ear()
    teller = ear.teller()
    for number in range(BATCH + 1):
        teller.settle("a/m", Settlement(f"t{number}", 1))
    teller.learn(*said("b"))
    await teller.flush()
    sent = [(script, name) for script, name, _ in ear.heard]
    assert sent == [("limit_learn", "b/m"), ("limit_settle", "a/m"), ("limit_settle", "a/m")]
    assert ear.moved == ["a/m", "a/m"]


async def test_what_nobody_heard_is_said_again() -> None:
    """Redis was away: nothing is lost, and what was heard is not repeated."""
    ear = Ear()
    teller = ear.teller()
    teller.learn(*said("b"))
    teller.settle("a/m", Settlement("t1", 1))
    teller.settle("c/m", Settlement("t2", 1))
    ear.fails = [None, None, RedisUnavailable("away")]
    with pytest.raises(RedisUnavailable):
        await teller.flush()
    await teller.flush()
    assert [name for _, name, _ in ear.heard] == ["b/m", "a/m", "c/m"]


async def test_a_broken_meter_is_in_no_others_way() -> None:
    """It cannot be told; it is said once, and the next one is."""
    ear = Ear()
    teller = ear.teller()
    teller.learn(*said("a"))
    teller.settle("a/m", Settlement("t1", 1))
    teller.settle("c/m", Settlement("t2", 1))
    ear.fails = [KeysBrokenError("x"), KeysBrokenError("x")]
    await teller.flush()
    assert ear.broken == ["a/m", "a/m"]
    assert [name for _, name, _ in ear.heard] == ["c/m"]
