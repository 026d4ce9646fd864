"""The order of the line on its way to the upstream: tickets are spaced while they are scarce, and fetched in turn."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import pytest

from millstream import Client
from millstream.meters import (
    UNUSED,
    WINDOW,
    Acquired,
    Leave,
    Limits,
    Meter,
    Place,
    Settlement,
    acquire,
    again,
    settle,
)
from millstream.testing import fake_client
from tests.contract.conftest import Clock, Hands
from tests.contract.test_limits import INTERMEDIATE, LANES, Desk

LIMITS: Final = Limits(requests=240)
GAP: Final = WINDOW / 6 / 60
"""Seconds between tickets: the pace at which ten seconds get their quarter, 60."""


@dataclass
class Crowd:
    """Workers that ask when they were told to. Every call is sent twice, as after a lost reply."""

    client: Client
    clock: Clock
    limits: Limits
    meter: Meter = field(init=False)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    turns: dict[str, float] = field(default_factory=dict)
    granted: list[tuple[float, str, int]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    lanes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of workers that do not serve all."""

    def __post_init__(self) -> None:
        self.meter = Meter("up", "m", self.limits)

    def join(self, first: int, count: int, lane: str = "interactive", most: int = 90) -> Acquired:
        """They were submitted in the order of their numbers."""
        jobs = range(first, first + count)
        return self.ask("joins", [Place(f"j{n}-00000000", f"j{n}", lane, n, 10, most) for n in jobs], want=0)

    def ask(self, asker: str, places: list[Place] | None = None, want: int = 50) -> Acquired:
        """In its turn, or, where that is still to come, before."""
        self.calls[asker] += 1
        call = acquire(
            self.client.keys, self.meter, places or [], lease=15.0, asker=asker, number=next(self.numbers), want=want,
            lanes=self.lanes.get(asker, LANES), intermediate=INTERMEDIATE,
            turn=max(0.0, self.turns.get(asker, 0.0) - self.clock.now),
        )  # fmt: skip
        found = self.client.run(call)
        assert self.client.run(call) == found
        self.turns[asker] = self.clock.now + found.turn
        self.granted += [(self.clock.now, asker, int(name.partition("-")[0][1:])) for name in found.granted]
        return found

    def go(self, seconds: float, workers: list[str]) -> None:
        """Each asks at its turn, for so long."""
        end = self.clock.now + seconds
        for worker in workers:
            self.ask(worker)
        while True:
            worker = min(workers, key=lambda each: self.turns[each])
            if self.turns[worker] > end:
                break
            self.clock.now = max(self.clock.now + 0.001, self.turns[worker])
            self.ask(worker)
        self.clock.now = end


@pytest.fixture
def crowd(clock: Clock) -> Iterator[Crowd]:
    """At 240 a minute."""
    with fake_client() as client:
        yield Crowd(client, clock, LIMITS)


WORKERS: Final = [f"w{number}" for number in range(4)]


def test_scarce_tickets_are_spaced_and_in_order(crowd: Crowd) -> None:
    """Four workers ask in turn: one after the other gets the next of the line, a step after the one before."""
    crowd.join(1, 1000)
    crowd.go(9.9, WORKERS)
    assert [number for _, _, number in crowd.granted] == list(range(1, 61))
    times = [at for at, _, _ in crowd.granted]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert min(gaps) >= GAP - 0.05
    assert times[-1] - times[0] == pytest.approx(59 * GAP, abs=0.1), "a quarter in a sixth: nothing of the pace is lost"


def test_one_call_fetches_one_ticket_and_each_worker_its_share(crowd: Crowd) -> None:
    """Turns are given out one after the other, so that nobody asks in vain and nobody begins all of the jobs."""
    crowd.join(1, 1000)
    crowd.go(9.9, WORKERS)
    shares = Counter(worker for _, worker, _ in crowd.granted)
    assert min(shares.values()) >= 14
    assert sum(crowd.calls.values()) <= 60 + 2 * len(WORKERS)


def test_a_worker_that_asks_before_its_turn_keeps_it(crowd: Crowd) -> None:
    """A ticket that came back, or jobs that join, are asked for at once; the others' turns are not put off by it."""
    crowd.join(1, 1000)
    crowd.ask("w0")
    first = crowd.ask("w1")
    for _ in range(5):
        crowd.clock.now += 0.001
        assert crowd.ask("w1").turn == pytest.approx(crowd.turns["w1"] - crowd.clock.now, abs=0.002)
    assert first.turn == pytest.approx(2 * GAP, abs=0.06)
    assert crowd.ask("w2").turn < 3 * GAP + 0.01


def test_a_dead_workers_turn_is_taken_over(crowd: Crowd) -> None:
    """Its ticket is the next one's, who comes a step later; once it asks no more it is given no turn."""
    crowd.join(1, 1000)
    crowd.go(3.0, WORKERS)
    before = len(crowd.granted)
    crowd.go(5.0, WORKERS[:1])
    assert len(crowd.granted) - before >= 5 / GAP - 5
    assert [number for _, _, number in crowd.granted] == list(range(1, len(crowd.granted) + 1))


def test_who_waits_for_long_is_not_told_to_come_one_after_the_other_for_ever(crowd: Crowd) -> None:
    """Sixty workers and a step of a second: a turn is at most a second after the ticket, whoever is dead."""
    crowd.meter = Meter("up", "m", Limits(requests=8))
    crowd.join(1, 1000)
    for number in range(60):
        found = crowd.ask(f"w{number}")
        assert found.again is not None
        assert found.turn <= found.again + 1.0


def test_when_no_more_wait_than_may_be_granted_all_are_at_once(crowd: Crowd) -> None:
    """A burst within a sixth's quarter has nothing to wait for."""
    crowd.join(1, 60)
    assert len(crowd.ask("w0", want=100).granted) == 60


def test_an_interactive_job_beside_a_batch_waits_for_nobody(crowd: Crowd) -> None:
    """The batch is spaced, the share of interactive is free: its ticket comes at once, the batch keeps its pace."""
    crowd.join(1, 1000, "batch")
    for number in range(6):
        crowd.go(9.0, WORKERS)
        crowd.join(2000 + number, 1)
        assert list(crowd.ask("w0").granted) == [f"j{2000 + number}-00000000"]
    rows = [number for _, _, number in crowd.granted if number < 2000]
    assert rows == list(range(1, len(rows) + 1))
    assert len(rows) >= 200


def test_high_limits_give_several_tickets_a_call(crowd: Crowd) -> None:
    """At 12,000 a minute there are 300 in a second: fetched by 20 calls, not by 300, and none of the pace is lost."""
    crowd.meter = Meter("up", "m", Limits(requests=12_000))
    crowd.join(1, 5000)
    crowd.go(5.0, WORKERS)
    assert len(crowd.granted) == pytest.approx(1500, abs=60)
    assert sum(crowd.calls.values()) <= 130
    assert [number for _, _, number in crowd.granted] == sorted(number for _, _, number in crowd.granted)


def test_tokens_are_spaced_by_what_requests_took(crowd: Crowd) -> None:
    """900 are reserved for each and 30 used: the pace is that of the 30, once it is known."""
    crowd.meter = Meter("up", "m", Limits(tokens=12_000))
    crowd.join(1, 1000, most=890)
    settled = 0
    while crowd.clock.now < 1_800_000_020:
        found = crowd.ask("w0")
        wait = found.turn
        for name in found.granted:
            back = crowd.client.run(settle(crowd.client.keys, "up/m", [Settlement(name, 30, 20)]))
            wait = min(wait, back or 0.0)
            settled += 1
        crowd.clock.now += max(0.001, wait)
    assert settled >= 120
    assert [number for _, _, number in crowd.granted] == sorted(number for _, _, number in crowd.granted)


def test_after_a_cool_down_there_is_no_stampede(sent: Hands) -> None:
    """Who waited is let go a step after the other."""
    desk = Desk(sent, Limits(requests=40))
    desk.learn(cool=60)
    assert desk.acquire(desk.places(30)).because == "cooling"
    name = desk.client.keys.meter(desk.meter.name)[0]
    desk.client.redis.hset(name, "cooling", 0)
    found = desk.acquire()
    assert desk.names(found) == ["j1"]
    assert found.because == "requests"
    assert found.again == pytest.approx(1.0, abs=0.3)


def test_rows_of_a_cancelled_batch_hold_nobody_up(crowd: Crowd) -> None:
    """Each leaves the line with a ticket that comes back at once, and nobody waits for the step it took."""
    crowd.meter = Meter("up", "m", Limits(requests=60))
    crowd.join(1, 100, "batch")
    crowd.join(101, 1, "batch")
    began = crowd.clock.now
    while not any(number == 101 for _, _, number in crowd.granted):
        wait = crowd.ask("w0").turn
        for _, _, number in crowd.granted[-1:]:
            call = settle(crowd.client.keys, "up/m", [Settlement(f"j{number}-00000000", UNUSED)])
            moves = crowd.client.run(call)
            assert crowd.client.run(call) == moves
            wait = wait if moves is None else min(wait, moves)
        crowd.clock.now += max(0.005, wait)
    assert crowd.clock.now - began < 2.0


def test_a_large_request_that_was_never_made_holds_nobody_up(sent: Hands) -> None:
    """It had all of the window: given back whole, the next one may go."""
    desk = Desk(sent, Limits(tokens=1000))
    assert desk.names(desk.acquire(desk.places(2, most=900))) == ["j1"]
    assert desk.settle("j1-00000000", UNUSED) == 0.0
    assert desk.names(desk.acquire()) == ["j2"]


def test_nothing_is_spaced_by_more_than_a_sixtieth_of_a_window(crowd: Crowd) -> None:
    """A share for interactive of nine tenths, jobs as large as the limit: batch goes as soon as its last has left."""
    crowd.meter = Meter("up", "m", Limits(tokens=1000, share=0.9))
    crowd.join(1, 20, "batch", most=990)
    crowd.go(4 * 62.5, WORKERS[:1])
    assert len(crowd.granted) == 5


def test_a_worker_of_batch_alone_does_not_put_off_chats(crowd: Crowd) -> None:
    """Batch has used up its part; when a chat may go is for those to say who serve it, and who looks finds it due."""
    crowd.join(1, 200, "batch")
    crowd.go(9.0, WORKERS)
    crowd.clock.now += 60
    crowd.go(9.9, WORKERS)
    crowd.join(500, 1)
    call = acquire(
        crowd.client.keys, crowd.meter, [], lease=15.0, asker="rows", number=1, want=1, lanes=("batch",),
        intermediate=INTERMEDIATE,
    )  # fmt: skip
    found = crowd.client.run(call)
    assert crowd.client.run(call) == found
    assert found.granted == {}
    assert found.again is not None
    assert found.again > 0
    assert crowd.client.redis.zscore(crowd.client.keys.waiting, "up/m") <= crowd.clock.now * 1000
    assert list(crowd.ask("w0").granted) == ["j500-00000000"]


@pytest.mark.parametrize(
    "lanes", [(LANES, LANES), (LANES, LANES[:1]), (LANES, LANES[1:]), (LANES[:1], LANES[1:])], ids=str
)
def test_lanes_keep_their_order_whoever_serves_them(crowd: Crowd, lanes: tuple[tuple[str, ...], ...]) -> None:
    """While both wait, about one ticket of twenty is batch's, also where some workers serve one lane alone."""
    crowd.join(1, 500)
    crowd.join(1001, 500, "batch")
    crowd.lanes = {f"w{number}": served for number, served in enumerate(lanes)}
    crowd.go(50.0, list(crowd.lanes))
    rows = sum(number > 1000 for _, _, number in crowd.granted)
    assert len(crowd.granted) >= 180
    assert len(crowd.granted) / 30 <= rows <= len(crowd.granted) / 15


def test_rows_go_on_when_nobody_serves_the_chats_that_wait(crowd: Crowd) -> None:
    """The last worker that served them died a moment ago."""
    crowd.join(1, 500)
    crowd.join(1001, 500, "batch")
    crowd.lanes = {"w0": LANES[:1], "w1": LANES[1:]}
    crowd.go(5.0, ["w0", "w1"])
    before = len(crowd.granted)
    crowd.go(8.0, ["w1"])
    assert len(crowd.granted) - before >= (8.0 - 2.5 - 1.1) / (GAP / 0.9) - 2


# Exchange ------------------------------------------------------------------------------------------------------------


def exchange(desk: Desk, old: str, ticket: str, **asked: int) -> Leave:
    keys, prompt, most = desk.client.keys, asked.get("prompt", 10), asked.get("most", 90)
    call = again(keys, desk.meter, ticket, "interactive", prompt, most, lease=15.0, room=5.0, instead_of=old)
    return desk.hands.send(call)


def test_a_late_ticket_is_exchanged_at_once(sent: Hands) -> None:
    """All of the sixth is held, the old one counts in it: it gives its place to the new one, whoever waits in line."""
    desk = Desk(sent, Limits(requests=40, tokens=4000, streams=10))
    assert len(desk.acquire(desk.places(10)).granted) == 10
    desk.acquire(desk.places(5))
    assert desk.again("new").outcome == "wait"
    desk.settle("new", -1)
    assert exchange(desk, "j3-00000000", "x1") == Leave("granted", 100)
    gauge = desk.look()
    assert (gauge.requests.used, gauge.tokens.used, gauge.streams.used) == (10, 1000, 10)
    desk.settle("j3-00000000", -1)
    assert desk.look().requests.used == 10, "what was given back is not given back again"
    desk.settle("x1", 50)
    assert desk.look().tokens.used == 950


def test_an_exchange_that_must_wait_has_given_the_old_ticket_back(sent: Hands) -> None:
    """The upstream cools: nothing is held meanwhile, and the new ticket's place is before the line."""
    desk = Desk(sent, Limits(requests=40, streams=10))
    desk.acquire(desk.places(2))
    desk.learn(cool=3)
    assert exchange(desk, "j1-00000000", "x1").because == "cooling"
    gauge = desk.look()
    assert (gauge.requests.used, gauge.streams.used) == (1, 1)
    assert desk.client.redis.zcard(desk.client.keys.meter(desk.meter.name)[6]) == 1
    assert exchange(desk, "j2-00000000", "x2", most=10**6).outcome == "wait"
    desk.meter = Meter("up", "m/1", Limits(tokens=50))
    assert exchange(desk, "x2", "x3").outcome == "too_large"
    assert desk.look().streams.used == 0
