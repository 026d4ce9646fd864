"""No schedule of jobs breaks a limit: the scripts themselves, on a clock that the test moves."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millstream import Client
from millstream.calls import Call, T
from millstream.meters import (
    SLACK,
    UNUSED,
    WINDOW,
    Acquired,
    Limits,
    Meter,
    Place,
    Settlement,
    acquire,
    again,
    look,
    settle,
)
from millstream.testing import fake_client
from tests.contract.conftest import Clock

SLOT: Final = WINDOW / 120

_NUMBERS: Final = itertools.count(1)


@dataclass
class Upstream:
    """Counts what arrives, each request a moment after its ticket, as late as a worker may be."""

    arrived: list[tuple[float, int]] = field(default_factory=list)

    def most(self, span: float) -> tuple[int, int]:
        """The most requests and tokens that any so many seconds held, both ends included."""
        times = sorted(self.arrived)
        worst, first, tokens = (0, 0), 0, 0
        for last, (at, cost) in enumerate(times):
            tokens += cost
            while at - times[first][0] > span:
                tokens -= times[first][1]
                first += 1
            worst = max(worst[0], last - first + 1), max(worst[1], tokens)
        return worst


@dataclass
class Fleet:
    """Workers that all want tickets, on one meter."""

    client: Client
    clock: Clock
    limits: Limits
    upstream: Upstream = field(default_factory=Upstream)
    held: dict[str, tuple[float, float, int]] = field(default_factory=dict)
    number: int = 0
    order: list[int] = field(default_factory=list)

    def run(self, call: Call[T]) -> T:
        return self.client.run(call)

    def join(self, count: int, lane: str, most: int) -> None:
        places = []
        for _ in range(count):
            self.number += 1
            places.append(Place(f"j{self.number}-00000000", f"j{self.number}", lane, self.number, 0, most))
        self.ask(places, 0)

    def ask(self, places: list[Place], want: int, delay: float = 0.0) -> Acquired:
        found = self.run(
            acquire(
                self.client.keys, Meter("up", "m", self.limits), places, lease=15.0, asker="w",
                number=next(_NUMBERS), want=want, lanes=("interactive", "batch"), intermediate=("i", "b"),
            )
        )  # fmt: skip
        for delivery, tokens in found.granted.items():
            self.held[delivery] = (self.clock.now, self.clock.now + delay, tokens)
            self.order.append(int(delivery.partition("-")[0][1:]))
        return found

    def ask_on(self, until: float, want: int, delay: float = 0.0) -> None:
        """Ask whenever there may be a ticket, for so many."""
        while self.clock.now < until and want > 0:
            found = self.ask([], want, delay)
            want -= len(found.granted)
            if found.again is None:
                break
            self.clock.now += found.again or 0.001

    def settle(self, part: float) -> None:
        """One ticket of those held ends: it took this part of what was reserved, or was given back unused."""
        if not self.held:
            return
        delivery, (_, arrives, reserved) = self.held.popitem()
        took = UNUSED if part < 0 else int(reserved * part)
        if took != UNUSED:
            self.upstream.arrived.append((arrives, took))
        self.run(settle(self.client.keys, "up/m", [Settlement(delivery, took)]))

    def end(self) -> None:
        self.upstream.arrived += [(arrives, tokens) for _, arrives, tokens in self.held.values()]


STEP = st.tuples(
    st.integers(0, 12), st.sampled_from(["interactive", "batch"]), st.integers(1, 400), st.floats(0.0, 8.0),
    st.floats(0.0, WINDOW * SLACK), st.integers(0, 40), st.lists(st.floats(-0.3, 1.0), max_size=6),
)  # fmt: skip
"""Jobs that join and how large they are, seconds that pass, how late requests are, tickets wanted, settlements."""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limits=st.tuples(st.integers(8, 120), st.integers(400, 6000)), schedule=st.lists(STEP, min_size=5, max_size=50))
def test_no_window_holds_more_than_the_limit(
    clock: Clock, limits: tuple[int, int],
    schedule: list[tuple[int, str, int, float, float, int, list[float]]],
) -> None:  # fmt: skip
    """Any minute at the upstream: at most the requests and tokens of the limit; any ten seconds: at most a quarter.

    Whatever joins, whatever is settled, given back or late; but a single request larger than a quarter goes alone.
    """
    requests, tokens = limits
    with fake_client() as client:
        fleet = Fleet(client, clock, Limits(requests, tokens))
        for count, lane, most, passes, late, want, settlements in schedule:
            fleet.join(count, lane, most)
            ends = clock.now + passes
            fleet.ask_on(clock.now + min(1.0, passes), want, late)
            for part in settlements:
                fleet.settle(part)
            clock.now = max(clock.now, ends)
        fleet.end()
    minute, near = fleet.upstream.most(WINDOW), fleet.upstream.most(WINDOW / 6)
    assert minute[0] <= requests
    assert minute[1] <= tokens
    assert near[0] <= requests // 4
    largest = max((cost for _, cost in fleet.upstream.arrived), default=0)
    assert near[1] <= max(tokens // 4, largest)


@pytest.mark.parametrize(("requests", "tokens", "cost"), [(60, 0, 10), (600, 0, 10), (0, 20_000, 150), (97, 9000, 90)])
def test_nearly_all_of_a_limit_is_used(clock: Clock, requests: int, tokens: int, cost: int) -> None:
    """Under demand every minute holds at least 95 % of the limit, in the order of submission."""
    most = min(each for each in (requests, tokens // cost) if each)
    with fake_client() as client:
        fleet = Fleet(client, clock, Limits(requests, tokens))
        fleet.join(5 * most + 50, "interactive", cost)
        began = clock.now
        fleet.ask_on(began + 5 * WINDOW, 10**6)
        fleet.end()
    used = Counter(int((at - began) // WINDOW) for at, _ in fleet.upstream.arrived)
    assert sum(used.values()) >= 0.95 * 5 * most
    assert min(used.values()) >= 0.9 * most
    assert fleet.upstream.most(WINDOW)[0] <= most
    assert fleet.order == sorted(fleet.order)


def test_batch_alone_leaves_the_share_of_interactive_unused(clock: Clock) -> None:
    """Nine tenths, of each minute and of each ten seconds; interactive jobs find theirs at any moment."""
    with fake_client() as client:
        fleet = Fleet(client, clock, Limits(200))
        fleet.join(2000, "batch", 10)
        began, waits = clock.now, []
        while clock.now < began + 3 * WINDOW:
            fleet.ask([], 1000)
            if int(clock.now - began) % 5 == 0 and (clock.now - began) % 1 == 0:
                fleet.join(1, "interactive", 10)
                waits.append(len(fleet.ask([], 1).granted))
            clock.now += SLOT / 2
        fleet.end()
    assert fleet.upstream.most(WINDOW)[0] <= 200
    assert set(waits) == {1}, "none of them waited"
    assert len(fleet.upstream.arrived) >= 0.86 * 3 * 200


@pytest.mark.parametrize("window", [1.0, 1.7, 10.0, 59.0])
def test_a_window_that_slots_do_not_divide_is_kept(clock: Clock, window: float) -> None:
    """The slots of a window are never shorter than it: whoever is as late as a worker may be still meets the limit."""
    with fake_client() as client:
        fleet = Fleet(client, clock, Limits(40, window=window))
        fleet.join(200, "interactive", 10)
        fleet.ask_on(clock.now + 3 * window, 10**6)
        fleet.end()
    times = sorted(at for at, _ in fleet.upstream.arrived)
    assert min(later - at for at, later in zip(times, times[40:], strict=False)) > window * (1 + SLACK)


def test_workers_of_two_windows_do_not_stand_still(clock: Clock) -> None:
    """While a deploy lasts the longer window holds, and nearly all of its limit is used; afterwards the shorter one."""
    with fake_client() as client:
        old, new = Fleet(client, clock, Limits(40)), Fleet(client, clock, Limits(40, window=30.0))
        old.join(500, "interactive", 10)
        began = clock.now
        while clock.now < began + 4 * WINDOW:
            for fleet in (old, new):
                fleet.ask([], 50)
            clock.now += 1.0
        arrived = [at for fleet in (old, new) for at, _, _ in fleet.held.values()]
        assert len(arrived) >= 0.9 * 4 * 40
        assert Upstream([(at, 1) for at in arrived]).most(WINDOW)[0] <= 40
        began = clock.now
        for _ in range(8 * int(WINDOW)):
            new.ask([], 50)
            clock.now += 0.5
        later = [at for at, _, _ in new.held.values() if at > began + 2 * WINDOW]
    assert len(later) >= 0.9 * 4 * 40
    assert Upstream([(at, 1) for at in later]).most(30.0)[0] <= 40


def test_a_clock_that_went_back_gives_no_tokens_away(clock: Clock) -> None:
    """What was reserved before counts as used after it; it does not come back to slots that hold something else, which
    would let more through than the limit.
    """
    with fake_client() as client:
        fleet = Fleet(client, clock, Limits(tokens=1000))
        fleet.join(1, "interactive", 900)
        fleet.ask_on(clock.now + 1, 1)
        clock.now -= 70
        used: list[int] = []
        for _ in range(150):
            fleet.ask([], 0)
            if len(used) == 80:
                fleet.settle(0.1)
            gauge = fleet.run(look(client.keys, "up/m"))
            assert gauge is not None
            used.append(gauge.tokens.used)
            clock.now += 1.0
    assert used[0] == 900
    assert min(used) == used[-1] == 0


def test_a_clock_that_went_back_a_little_keeps_the_quarter(clock: Clock) -> None:
    """By half a window: what is granted from then on still counts in its sixth."""
    with fake_client() as client:
        fleet = Fleet(client, clock, Limits(40))
        fleet.join(1, "interactive", 10)
        fleet.ask([], 1)
        clock.now -= WINDOW / 2
        granted = 0
        for _ in range(10):
            fleet.join(3, "interactive", 10)
            granted += len(fleet.ask([], 3).granted)
            clock.now += 0.4
    assert granted == 9


def test_the_answers_to_the_workers_are_kept_while_they_ask(clock: Clock) -> None:
    """Whatever else is called first when times to live are due: a lost reply finds its answer."""
    with fake_client() as client:
        fleet = Fleet(client, clock, Limits(40))
        replies = client.keys.meter("up/m")[7]
        fleet.join(1, "interactive", 10)
        for _ in range(12):
            clock.now += WINDOW / 5
            fleet.run(settle(client.keys, "up/m", [Settlement("none")]))
            fleet.ask([], 0)
            assert client.redis.pttl(replies) > WINDOW * 1000 / 2


def test_rows_that_wait_before_the_line_hold_up_no_chat(clock: Clock) -> None:
    """Batch has used up its part, one of its running rows waits to ask again: what is kept free for chats is free."""

    def ask_until_it_waits(fleet: Fleet, lane: str) -> str:
        for number in itertools.count():
            ticket, meter = f"{lane}{number}", Meter("up", "m", fleet.limits)
            call = again(fleet.client.keys, meter, ticket, lane, 10, 10, lease=15.0, room=60.0)
            found = fleet.run(call)
            assert fleet.run(call) == found
            if found.outcome == "wait":
                return ticket
        raise AssertionError

    with fake_client() as client:
        fleet = Fleet(client, clock, Limits(40, share=0.5))
        row = ask_until_it_waits(fleet, "batch")
        fleet.join(1, "batch", 10)
        fleet.join(1, "interactive", 10)
        assert list(fleet.ask([], 5).granted) == ["j2-00000000"]
        chat = ask_until_it_waits(fleet, "interactive")
        clock.now += 12.5
        fleet.join(1, "interactive", 10)
        assert fleet.ask([], 5).granted == {}, "a chat's place is before all"
        for ticket in (chat, row):
            fleet.run(settle(client.keys, "up/m", [Settlement(ticket, UNUSED)]))
        assert len(fleet.ask([], 5).granted) == 2
        assert client.redis.zcard(client.keys.meter("up/m")[6]) == 0
