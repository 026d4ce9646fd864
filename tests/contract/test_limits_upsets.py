"""What upsets a meter: numbers beyond reason, changed settings, lost keys, a clock that jumps. The limit holds."""

from __future__ import annotations

import msgspec
import pytest

from millstream.meters import MOST, UNUSED, Acquired, Limits, Meter, Place, acquire
from tests.contract.conftest import Hands
from tests.contract.test_limits import INTERMEDIATE, LANES, LEASE, Desk


def grants(desk: Desk, times: int) -> int:
    return sum(len(desk.acquire().granted) for _ in range(times))


@pytest.mark.parametrize("most", [10**18, 10**30, -(10**9)])
def test_no_job_asks_for_more_than_can_be_counted(sent: Hands, most: int) -> None:
    """Its number of tokens is a producer's; one that broke the sums would stop everybody behind it, or pay for them."""
    desk = Desk(sent, Limits(requests=4000))
    for _ in range(20):
        assert len(desk.acquire([desk.place(most=most)]).granted) == 1
    assert desk.again("x", most=most).outcome == "granted"
    assert 0 < desk.look().tokens.used <= 21 * (MOST + 10)


@pytest.mark.parametrize("took", [10**30, -(10**9)])
def test_no_upstream_says_more_than_can_be_counted(sent: Hands, took: int) -> None:
    """Usage is what somebody's server wrote: whatever it is, the ticket is settled and the next job is granted."""
    desk = Desk(sent, Limits(requests=4000))
    for _ in range(20):
        (ticket,) = desk.acquire([desk.place(most=None)]).granted
        desk.settle(ticket, took, took)
    gauge = desk.look()
    assert (gauge.requests.used, gauge.streams.used) == (20, 0)
    assert 0 <= gauge.tokens.used <= 20 * MOST


def test_a_call_that_comes_late_takes_no_tickets(hands: Hands) -> None:
    """Its connection was given up, its answer fetched by another one: only then does the server read it once more."""
    desk = Desk(hands, Limits(requests=4000))
    places = desk.places(4)

    def call(number: int, *joins: Place) -> Acquired:
        keys = desk.client.keys
        return desk.client.run(
            acquire(
                keys, desk.meter, joins, lease=LEASE, asker="w", number=number, want=1, lanes=LANES,
                intermediate=INTERMEDIATE,
            )
        )  # fmt: skip

    assert desk.names(call(9, *places)) == ["j1"]
    assert desk.names(call(10)) == ["j2"]
    late = call(9, *places)
    assert (late.granted, late.too_large, late.again) == ({}, {}, None)
    gauge = desk.look()
    assert (gauge.requests.used, gauge.waiting["interactive"]) == (2, 2)


def test_batch_goes_on_after_its_tickets_expired_as_a_whole(hands: Hands) -> None:
    """Its part of the streams is what runs: every worker died, and nobody asked for longer than the keys live."""
    desk = Desk(hands, Limits(streams=10))
    assert len(desk.acquire(desk.places(12, "batch")).granted) == 9
    _, _, tickets, held, *_ = desk.client.keys.meter(desk.meter.name)
    desk.client.redis.delete(tickets, held)
    assert len(desk.acquire().granted) == 3


def test_a_delivery_that_stood_in_line_twice_holds_one_stream(hands: Hands) -> None:
    """Its answer is expected to be longer by now, so that it is another member of the line; it is one ticket."""
    desk = Desk(hands, Limits(streams=10))
    place = desk.place("batch")
    desk.acquire([place], want=0)
    assert len(desk.acquire([msgspec.structs.replace(place, most=95)]).granted) == 1
    desk.settle(place.delivery, 5)
    assert len(desk.acquire(desk.places(12, "batch")).granted) == 9


def test_a_running_job_that_gives_up_waiting_leaves_its_place(sent: Hands) -> None:
    """Cancelled meanwhile: the line does not stand still for it any longer."""
    desk = Desk(sent, Limits(streams=1))
    desk.acquire(desk.places(2))
    assert desk.again("x1", room=60).outcome == "wait"
    desk.settle("x1", UNUSED)
    desk.settle("j1-00000000", 1)
    assert desk.names(desk.acquire()) == ["j2"]


def test_a_short_wait_before_the_line_does_not_end_a_longer_one(hands: Hands) -> None:
    """Both keep their places until two seconds after their time."""
    desk = Desk(hands, Limits(requests=40))
    front = desk.client.keys.meter(desk.meter.name)[6]
    desk.learn(cool=30)
    desk.again("x1", room=60)
    left = desk.client.redis.pttl(front)
    desk.client.redis.hset(desk.client.keys.meter(desk.meter.name)[0], "cooling", hands.now_ms() + 100)
    desk.again("x2", room=60)
    assert desk.client.redis.pttl(front) == pytest.approx(left, abs=5000)


def test_who_is_larger_than_a_lowered_limit_leaves_the_line(sent: Hands) -> None:
    """It would be granted alone. The worker counts it anew: its answer may be estimated, and then it fits."""
    desk = Desk(sent, Limits(tokens=1000))
    desk.acquire([desk.place(prompt=500, most=400), desk.place(prompt=10, most=20)], want=0)
    desk.meter = Meter("up", "m/1", Limits(tokens=100))
    found = desk.acquire(want=1)
    assert (found.granted, found.too_large, found.waiting) == ({}, {"j1-00000000": 900}, 1)
    assert desk.acquire(want=1).granted == {"j2-00000000": 30}
    assert desk.look().tokens.used == 30


def test_workers_of_two_windows_keep_one_limit(hands: Hands) -> None:
    """While settings are rolled out, what was counted by the old ones is counted by the new ones."""
    desk = Desk(hands, Limits(requests=40))
    windows = [desk.meter, Meter("up", "m/1", Limits(requests=40, window=30))]
    granted = 0
    for number in range(40):
        desk.meter = windows[number % 2]
        granted += len(desk.acquire(desk.places(1, LANES[number % 3 % 2])).granted)
    assert granted == 10
    assert desk.look().requests.used == granted
    desk.settle("j1-00000000", UNUSED)
    assert desk.look().requests.used <= granted


def test_a_clock_that_went_back_gives_no_requests_away(hands: Hands) -> None:
    """A replica's clock, after a failover, may be minutes behind: the slots of the future count as used now."""
    desk = Desk(hands, Limits(requests=40))
    desk.acquire(desk.places(10), want=1)
    meter, used, *_ = desk.client.keys.meter(desk.meter.name)
    packed = [int(count) for count in desk.client.redis.hget(meter, "counts").split()]
    for at, ahead in ((1, 400), (2, 400), (-2, 200_000), (-1, 200_000)):  # both oldest slots, the step and the turn
        packed[at] += ahead
    desk.client.redis.hset(meter, "counts", "".join(f"{count} " for count in packed))
    for name in desk.client.redis.hkeys(used):
        field = f"{name[:1].decode()}{int(name[1:]) + 400}"
        desk.client.redis.hset(used, field, desk.client.redis.hget(used, name))
        desk.client.redis.hdel(used, name)
    assert grants(desk, 1) == 9
    assert desk.acquire(desk.places(1)).granted == {}
    assert desk.look().requests.used == 10
