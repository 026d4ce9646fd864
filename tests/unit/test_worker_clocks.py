"""The clocks of a stream, by a loop whose time is the test's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.unit.writer_desk import leaping
from worker.clocks import TICK, Clock, Ticker


def on_leaping_time(test: Callable[[], object]) -> None:
    async def main() -> None:
        test()

    leaping(main())


class Hand:
    """A clock with a time that the test sets: what `loop.time` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)
        self.clock = Clock(first=5.0, idle=2.0, total=10.0, strike=lambda: None)

    def look(self) -> str | None:
        return self.clock.look(self.now)


def test_the_first_content_has_a_time_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it the idle clock does not run; after it the first one does not."""

    def test() -> None:
        hand = Hand(monkeypatch)
        hand.now += 5.0
        assert hand.look() is None
        hand.now += 0.01
        assert hand.look() == "first_token_timeout"
        hand.clock.content()
        assert hand.look() is None

    on_leaping_time(test)


def test_only_content_winds_the_idle_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds after the last content it strikes, however often it had been wound."""

    def test() -> None:
        hand = Hand(monkeypatch)
        for _ in range(4):
            hand.now += 1.9
            hand.clock.content()
        assert hand.look() is None
        hand.now += 2.01
        assert hand.look() == "idle_timeout"

    on_leaping_time(test)


def test_the_total_goes_before_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be wound."""

    def test() -> None:
        hand = Hand(monkeypatch)
        hand.now += 10.01
        hand.clock.content()
        assert hand.look() == "total_timeout"

    on_leaping_time(test)


@pytest.mark.parametrize("content", [False, True])
def test_the_clocks_stand_still_while_we_pause(monkeypatch: pytest.MonkeyPatch, content: bool) -> None:
    """A pause of an hour is nobody's fault; afterwards each has the time it had left."""

    def test() -> None:
        hand = Hand(monkeypatch)
        if content:
            hand.clock.content()
        hand.now += 1.0
        hand.clock.pause()
        hand.now += 3600
        assert hand.look() is None
        hand.clock.resume()
        hand.clock.resume()  # without a pause it changes nothing
        assert hand.look() is None
        hand.now += 0.99 if content else 3.99
        assert hand.look() is None
        hand.now += 0.02
        assert hand.look() == ("idle_timeout" if content else "first_token_timeout")

    on_leaping_time(test)


def test_a_clock_strikes_once_and_soon() -> None:
    """The ticker strikes what has run out, once, at most a tick late, and leaves the others alone."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        struck: list[float] = []
        ticker = Ticker()
        early, late, gone = (Clock(first, 1e9, 1e9, lambda: struck.append(loop.time())) for first in (5.0, 7.0, 1.0))
        for clock in (early, late, gone):
            ticker.add(clock)
        ticker.remove(gone)
        running = asyncio.create_task(ticker.run())
        await asyncio.sleep(20)
        running.cancel()
        assert [early.struck, late.struck, gone.struck] == ["first_token_timeout", "first_token_timeout", None]
        assert [5.0 < struck[0] <= 5.0 + 2 * TICK, 7.0 < struck[1] <= 7.0 + 2 * TICK, len(struck)] == [True, True, 2]

    leaping(main())


def test_time_that_nobody_looked_is_nobodys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that stood still takes the time off its clocks, but for those that stood still themselves."""

    def test() -> None:
        hand = Hand(monkeypatch)
        hand.clock.content()
        hand.now += 101.0
        hand.clock.excuse(100.0)
        assert hand.look() is None
        assert hand.clock.spent == 1.0
        hand.now += 1.01
        assert hand.look() == "idle_timeout"
        hand.clock.content()
        hand.clock.excuse(100.0)  # content that came first is not moved into the future
        hand.now += 2.01
        assert hand.look() == "idle_timeout"
        paused = Hand(monkeypatch)
        paused.clock.pause()
        paused.now += 50.0
        paused.clock.excuse(50.0)
        paused.clock.resume()
        assert paused.clock.spent == 0.0

    on_leaping_time(test)
