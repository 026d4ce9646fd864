"""The limiter's scripts: places in line, tickets, settlements, what an upstream says. Every call is sent twice, too."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from millstream import Client
from millstream.calls import sweep
from millstream.meters import (
    UNUSED,
    Acquired,
    Count,
    Gauge,
    Leave,
    Limits,
    Meter,
    Place,
    Settlement,
    acquire,
    again,
    learn,
    look,
    renew,
    rested,
    settle,
)
from tests.contract.conftest import Hands
from tests.oracle import end_cool_down

LEASE: Final = 15.0
INTERMEDIATE: Final = ("rq:queue:millstream-interactive:intermediate", "rq:queue:millstream-batch:intermediate")
LANES: Final = ("interactive", "batch")
NUMBERS: Final = itertools.count(1)


@dataclass
class Desk:
    """One meter, and workers that ask it."""

    hands: Hands
    limits: Limits
    meter: Meter = field(init=False)
    number: int = 0

    def __post_init__(self) -> None:
        self.meter = Meter("up", "m/1", self.limits)

    @property
    def client(self) -> Client:
        return self.hands.client

    def place(self, lane: str = "interactive", *, prompt: int = 10, most: int | None = 90) -> Place:
        """A submitted job's delivery, taken from its lane."""
        self.number += 1
        job_id = f"j{self.number}"
        self.client.submit("x", id=job_id, lane=lane)
        for name in self.client.redis.scan_iter(f"rq:queue:millstream-{lane}"):
            rq_id = self.client.redis.rpop(name)
            self.client.redis.expire(f"rq:job:{rq_id.decode()}", 60)
        self.client.redis.rpush(INTERMEDIATE[LANES.index(lane)], f"{job_id}-00000000")
        self.client.redis.expire(INTERMEDIATE[LANES.index(lane)], 60)
        return Place(f"{job_id}-00000000", job_id, lane, self.number, prompt, most)

    def places(self, count: int, lane: str = "interactive", **asked: Any) -> list[Place]:
        return [self.place(lane, **asked) for _ in range(count)]

    def acquire(
        self, places: Sequence[Place] = (), want: int = 100, *, asker: str = "w", lanes: Sequence[str] = LANES,
        lease: float = LEASE,
    ) -> Acquired:  # fmt: skip
        return self.hands.send(
            acquire(
                self.client.keys, self.meter, places, lease=lease, asker=asker, number=next(NUMBERS),
                want=want, lanes=lanes, intermediate=INTERMEDIATE,
            )
        )  # fmt: skip

    def again(self, ticket: str, *, room: float = 5.0, prompt: int = 10, most: int | None = 90) -> Leave:
        keys = self.client.keys
        return self.hands.send(
            again(keys, self.meter, ticket, "interactive", prompt, most, lease=LEASE, room=room)
        )  # fmt: skip

    def settle(self, ticket: str, took: int | None = None, answer: int | None = None) -> float | None:
        return self.hands.send(settle(self.client.keys, self.meter.name, [Settlement(ticket, took, answer)]))

    def renew(self, *tickets: str, lease: float = LEASE) -> int:
        return self.client.run(renew(self.client.keys, self.meter.name, tickets, lease=lease))

    def learn(self, **said: Any) -> float:
        return self.hands.send(learn(self.client.keys, self.meter, **said))

    def look(self) -> Gauge:
        found = self.hands.send(look(self.client.keys, self.meter.name))
        assert found is not None
        return found

    def lapse(self, *tickets: str) -> None:
        """As if nobody had renewed them for a lease."""
        self.client.redis.zadd(self.client.keys.meter(self.meter.name)[2], dict.fromkeys(tickets, 1))

    def names(self, acquired: Acquired) -> list[str]:
        """The jobs that were granted, in order."""
        return [delivery.partition("-")[0] for delivery in acquired.granted]


# Tickets -------------------------------------------------------------------------------------------------------------


def test_who_is_not_first_waits_and_has_used_nothing(sent: Hands) -> None:
    """Four streams at once: the fifth job waits in line, in the order of submission, and counts nowhere."""
    desk = Desk(sent, Limits(streams=4))
    found = desk.acquire(desk.places(6))
    assert desk.names(found) == ["j1", "j2", "j3", "j4"]
    assert (found.waiting, found.because) == (2, "streams")
    gauge = desk.look()
    assert (gauge.streams.used, gauge.streams.limit, gauge.requests.used) == (4, 4, 4)
    assert gauge.waiting == {"interactive": 2, "batch": 0}
    desk.settle("j2-00000000", 50)
    assert desk.names(desk.acquire()) == ["j5"]


def test_a_job_in_line_says_so(sent: Hands) -> None:
    """Its status has what it waits for and until about when; its delivery has left the intermediate list."""
    desk = Desk(sent, Limits(streams=1))
    desk.acquire(desk.places(2))
    wait = desk.client.status("j2").wait
    assert wait is not None
    assert {name: wait[name] for name in ("what", "upstream", "model", "because")} == {
        "what": "limit", "upstream": "up", "model": "m/1", "because": "streams"
    }  # fmt: skip
    assert wait["until"] > sent.now_ms() / 1000
    assert desk.client.redis.lrange(INTERMEDIATE[0], 0, -1) == [b"j1-00000000"]
    assert sent.claim("j2").outcome == "claimed", "a claim takes it whatever it waits for"
    assert desk.client.status("j2").wait is None


def test_what_leaves_the_line_is_in_the_intermediate_list_until_it_is_booked(sent: Hands) -> None:
    """There RQ finds what a worker took and died with; outside of every list its hash would stay for ever."""
    desk = Desk(sent, Limits(streams=1, tokens=5000))
    desk.acquire(desk.places(3), want=1, asker="w1")
    desk.settle("j1-00000000", 100)
    assert desk.names(desk.acquire(asker="w2")) == ["j2"]
    assert desk.client.redis.lrange(INTERMEDIATE[0], 0, -1) == [b"j1-00000000", b"j2-00000000"]
    desk.limits = Limits(streams=1, tokens=50)
    desk.meter = Meter("up", "m/1", desk.limits)
    assert list(desk.acquire(asker="w2").too_large) == ["j3-00000000"]
    assert desk.client.redis.lrange(INTERMEDIATE[0], 0, -1)[2:] == [b"j3-00000000"]
    desk.client.redis.expire(INTERMEDIATE[0], 60)


def test_a_cancelled_job_leaves_no_word_in_line(sent: Hands) -> None:
    """Cancel works at once; whoever takes the place finds the job closed and gives the ticket back whole."""
    desk = Desk(sent, Limits(requests=40, tokens=1000, streams=1))
    desk.acquire(desk.places(2))
    desk.client.cancel("j2")
    assert desk.client.status("j2").wait is None
    desk.settle("j1-00000000", 100)
    assert desk.names(desk.acquire()) == ["j2"]
    desk.settle("j2-00000000", UNUSED)
    gauge = desk.look()
    assert (gauge.requests.used, gauge.tokens.used, gauge.streams.used) == (1, 100, 0)


def test_a_request_larger_than_the_limit_is_refused_for_good(sent: Hands) -> None:
    """It does not wait: no window will ever have room for it."""
    desk = Desk(sent, Limits(tokens=1000))
    found = desk.acquire([desk.place(prompt=500, most=501), desk.place(prompt=100, most=100)])
    assert found.too_large == {"j1-00000000": 1001}
    assert desk.names(found) == ["j2"]
    assert desk.again("x", prompt=500, most=501).outcome == "too_large"
    assert desk.look().tokens.used == 200


def test_all_of_a_request_is_granted_or_nothing(sent: Hands) -> None:
    """Streams and requests are free, tokens are not: nothing of it is taken."""
    desk = Desk(sent, Limits(requests=100, tokens=1000, streams=10))
    assert desk.names(desk.acquire(desk.places(2))) == ["j1", "j2"]
    found = desk.acquire(desk.places(1))
    assert (desk.names(found), found.because) == ([], "tokens")
    gauge = desk.look()
    assert (gauge.requests.used, gauge.tokens.used, gauge.streams.used) == (2, 200, 2)


def test_no_sixth_of_a_window_takes_more_than_a_quarter(sent: Hands) -> None:
    """What begins at once is a quarter; a request that is larger than that goes alone."""
    desk = Desk(sent, Limits(requests=40))
    assert len(desk.acquire(desk.places(10)).granted) == 10
    assert desk.acquire(desk.places(1)).because == "requests"
    sent.client.redis.flushall()
    desk = Desk(sent, Limits(tokens=1000))
    found = desk.acquire([desk.place(prompt=0, most=800), desk.place(prompt=0, most=10)])
    assert (desk.names(found), found.because) == (["j1"], "tokens")


def test_a_ticket_is_settled_once(sent: Hands) -> None:
    """Too much comes back, too little is a debt, and a second settlement changes nothing."""
    desk = Desk(sent, Limits(tokens=10_000))
    desk.acquire(desk.places(3))
    desk.settle("j1-00000000", 40, 30)
    assert desk.look().tokens.used == 240
    desk.settle("j2-00000000", 150, 140)
    assert desk.look().tokens.used == 290
    desk.settle("j1-00000000", 0)
    desk.settle("j3-00000000")
    assert desk.look().tokens.used == 290
    assert desk.look().streams.used == 0


def test_without_a_word_on_its_length_an_answer_is_reserved_as_such_answers_were(sent: Hands) -> None:
    """A thousand tokens while nothing is known; the average and twice the deviation afterwards."""
    desk = Desk(sent, Limits(tokens=10**6))
    assert desk.acquire([desk.place(most=None)]).granted == {"j1-00000000": 1010}
    for number in range(20):
        desk.again(f"x{number}")
        desk.settle(f"x{number}", 60, 50)
    tokens = desk.acquire([desk.place(most=None)]).granted["j2-00000000"]
    assert 60 <= tokens <= 110
    assert desk.look().answer_tokens == 50


def test_a_dead_workers_streams_come_back_with_its_lease(hands: Hands) -> None:
    """The stream is free again; what was reserved counts as used in its window."""
    desk = Desk(hands, Limits(requests=400, tokens=100_000, streams=2))
    desk.acquire(desk.places(2))
    assert desk.look().streams.used == 2
    desk.lapse("j1-00000000", "j2-00000000")
    assert desk.look().streams.used == 0
    gauge = desk.look()
    assert (gauge.requests.used, gauge.tokens.used) == (2, 200)
    assert desk.names(desk.acquire(desk.places(2))) == ["j3", "j4"]
    held = desk.client.redis.hkeys(desk.client.keys.meter(desk.meter.name)[3])
    assert sorted(held) == [b"j3-00000000", b"j4-00000000"], "nothing of the dead one is kept"


def test_a_renewed_ticket_lives_on(hands: Hands) -> None:
    """Renewing says how many had run out; those hold their streams again."""
    desk = Desk(hands, Limits(streams=2))
    with hands.from_now() as after:
        desk.acquire(desk.places(2))
    tickets = desk.client.keys.meter(desk.meter.name)[2]
    assert int(desk.client.redis.zscore(tickets, "j1-00000000")) in after(int(LEASE * 1000))
    assert desk.renew("j1-00000000") == 0
    desk.lapse("j2-00000000")
    assert desk.look().streams.used == 1
    assert desk.renew("j1-00000000", "j2-00000000") == 1
    assert desk.look().streams.used == 2
    desk.settle("j2-00000000", 10)
    assert desk.look().streams.used == 1


def test_a_meters_memory_is_bounded_by_its_open_tickets(hands: Hands) -> None:
    """Once all is settled, tickets and line are gone, and every key that stays has a TTL."""
    desk = Desk(hands, Limits(requests=4000))
    for _ in range(5):
        found = desk.acquire(desk.places(20))
        for delivery in found.granted:
            desk.settle(delivery, 10, 5)
    keys = desk.client.keys
    _, used, tickets, held, *lines = keys.meter(desk.meter.name)[:6]
    assert desk.client.redis.exists(tickets, held, *lines) == 0
    assert desk.client.redis.hlen(used) <= 2 * 121
    assert all(desk.client.redis.pttl(name) > 0 for name in desk.client.redis.scan_iter("*limit*"))


# Lanes ---------------------------------------------------------------------------------------------------------------


def test_interactive_goes_first(sent: Hands) -> None:
    """However long the batch was there."""
    desk = Desk(sent, Limits(streams=1))
    desk.acquire(desk.places(3, "batch"))
    desk.acquire(desk.places(2))
    order = []
    held = "j1-00000000"
    while held:
        desk.settle(held, 1)
        found = list(desk.acquire().granted)
        held = found[0] if found else ""
        order.append(held.partition("-")[0])
    assert order == ["j4", "j5", "j2", "j3", ""]


def test_a_part_of_each_limit_is_kept_free_for_interactive(sent: Hands) -> None:
    """Ten thousand rows hold at most nine tenths of a window, of a sixth of it, and of the streams."""
    desk = Desk(sent, Limits(requests=80, streams=19))
    assert len(desk.acquire(desk.places(17, "batch")).granted) == 17
    assert desk.acquire(desk.places(1, "batch")).because == "streams"
    assert len(desk.acquire(desk.places(2)).granted) == 2
    assert desk.acquire(desk.places(1)).because == "streams"
    for limits, part in ((Limits(requests=80), 18), (Limits(tokens=8000), 18)):
        sent.client.redis.flushall()
        desk = Desk(sent, limits)
        assert len(desk.acquire(desk.places(part, "batch")).granted) == part
        assert desk.acquire(desk.places(1, "batch")).granted == {}
        assert len(desk.acquire(desk.places(2)).granted) == 2
        assert desk.acquire(desk.places(1)).granted == {}


def test_batch_gets_one_ticket_of_twenty(sent: Hands) -> None:
    """While both lanes wait, batch is not starved."""
    desk = Desk(sent, Limits(requests=4000))
    desk.acquire([*desk.places(4, "batch"), *desk.places(60)], want=0)
    order = [name for _ in range(64) for name in desk.names(desk.acquire(want=1))]
    assert [at for at, name in enumerate(order) if int(name[1:]) <= 4] == [19, 39, 59, 63]


def test_a_worker_of_one_lane_takes_only_that(sent: Hands) -> None:
    """What waits in the other lane is left to others, and not asked for over and over."""
    desk = Desk(sent, Limits(requests=400))
    desk.acquire([desk.place("batch")], want=0)
    found = desk.acquire(lanes=("interactive",))
    assert (found.granted, found.waiting, found.again) == ({}, 1, 1.0)
    assert desk.names(desk.acquire(lanes=("batch",))) == ["j1"]


# Requests again ------------------------------------------------------------------------------------------------------


def test_a_further_request_takes_from_the_meters_too(sent: Hands) -> None:
    """A retry is a request like any other."""
    desk = Desk(sent, Limits(requests=400, tokens=10_000))
    assert desk.again("x1") == Leave("granted", 100)
    gauge = desk.look()
    assert (gauge.requests.used, gauge.tokens.used, gauge.streams.used) == (1, 100, 1)


def test_a_running_jobs_request_goes_before_the_line(hands: Hands) -> None:
    """The line stands still for it, until its place lapses: two seconds after its time."""
    desk = Desk(hands, Limits(streams=1))
    desk.acquire(desk.places(2))
    with hands.from_now() as after:
        waits = desk.again("x1")
    assert (waits.outcome, waits.because) == ("wait", "streams")
    desk.settle("j1-00000000", 1)
    assert desk.names(desk.acquire()) == []
    front = desk.client.keys.meter(desk.meter.name)[6]
    lapses = float(desk.client.redis.zscore(front, "x1"))
    assert int(lapses) in after(round((waits.seconds + 2) * 1000))
    desk.client.redis.zadd(front, {"x1": hands.now_ms()})
    assert desk.names(desk.acquire()) == ["j2"], "whoever waited there is dead"


def test_after_a_cool_down_alone_nobody_stands_still(hands: Hands) -> None:
    """Without a limit there is enough for all: the jobs in line need not wait until the one that retries has asked."""
    desk = Desk(hands, Limits())
    desk.learn(cool=60)
    assert desk.again("x1", room=90).because == "cooling"
    assert desk.names(desk.acquire(desk.places(1))) == []
    end_cool_down(desk.client.redis, desk.client.keys, desk.meter.name)
    assert desk.names(desk.acquire()) == ["j1"]


def test_a_wait_too_long_for_memory_keeps_nobody_waiting(hands: Hands) -> None:
    """The job goes back to its lane; the line moves on meanwhile."""
    desk = Desk(hands, Limits(streams=1))
    desk.acquire(desk.places(2))
    assert desk.again("x1", room=0.5).outcome == "wait"
    desk.settle("j1-00000000", 1)
    assert desk.names(desk.acquire()) == ["j2"]


# Learning ------------------------------------------------------------------------------------------------------------


def test_a_cool_down_holds_for_everybody(sent: Hands) -> None:
    """Nobody gets a ticket, whatever the limits have left; nor where there is no limit."""
    for limits in (Limits(requests=100), Limits()):
        sent.client.redis.flushall()
        desk = Desk(sent, limits)
        with sent.from_now() as after:
            assert 60 < desk.learn(cool=60) <= rested(60)
        until = desk.look().cooling_until
        assert until is not None
        assert round(until * 1000) in after(round(1000 * rested(60)))
        with sent.from_now() as after:
            found = desk.acquire(desk.places(1))
        assert (found.granted, found.because) == ({}, "cooling")
        assert found.again is not None
        assert round(until * 1000) in after(round(found.again * 1000))
        assert desk.again("x").because == "cooling"
        desk.learn(cool=1)
        assert desk.look().cooling_until == until, "a shorter one does not end a longer one"


def test_a_lower_limit_of_the_upstream_counts(sent: Hands) -> None:
    """A higher one does not, nor one of another time than a window."""
    desk = Desk(sent, Limits(requests=400, tokens=10_000))
    desk.acquire([desk.place()])
    desk.learn(requests=Count(80, 79, 1.0), tokens=Count(10**9, 10**9, 1.0))
    gauge = desk.look()
    assert (gauge.requests.limit, gauge.tokens.limit) == (80, 10_000)
    desk.learn(requests=Count(40, 39, 86_400.0))
    assert desk.look().requests.limit == 80


def test_a_lower_rest_at_the_upstream_counts_as_used(sent: Hands) -> None:
    """Somebody else uses the same key: the meter says so from now on."""
    desk = Desk(sent, Limits(requests=400, tokens=10_000))
    desk.acquire([desk.place()])
    desk.learn(requests=Count(400, 100, 1.0), tokens=Count(10_000, 9_950, 1.0))
    gauge = desk.look()
    assert (gauge.requests.used, gauge.tokens.used) == (300, 100)
    desk.learn(requests=Count(400, 399, 1.0))
    assert desk.look().requests.used == 300, "never more"


def test_a_refusal_without_a_time_slows_down(sent: Hands) -> None:
    """To seven tenths of what was asked, once per burst of refusals; it grows back by 5 % every sixth of a window."""
    desk = Desk(sent, Limits(requests=1000))
    for _ in range(2):
        desk.acquire(desk.places(100))
    desk.learn(slow_down=True)
    assert desk.look().requests.limit == 140
    desk.learn(slow_down=True)
    assert desk.look().requests.limit == 140, "those that were under way are no news"
    meter = desk.client.keys.meter(desk.meter.name)[0]
    desk.client.redis.hincrby(meter, "paced", -60_000)
    assert desk.look().requests.limit == pytest.approx(140 * 1.05**6, abs=2)
    desk.client.redis.hincrby(meter, "paced", -600_000)
    assert desk.look().requests.limit == 1000


def test_what_was_learned_is_announced_for_as_long_as_it_holds(sent: Hands) -> None:
    """A worker without limits of its own asks the meter only while an upstream has limited it."""
    desk = Desk(sent, Limits())
    with sent.from_now() as after:
        desk.learn(cool=60)
    assert int(desk.client.redis.zscore(desk.client.keys.learned, "up/m/1")) in after(round(1000 * rested(60)))


# The line and the sweep ----------------------------------------------------------------------------------------------


def test_a_job_in_line_has_not_vanished(hands: Hands) -> None:
    """The sweep leaves it there; taken from there and lost, it is delivered again."""
    desk = Desk(hands, Limits(streams=1))
    desk.acquire(desk.places(2))
    keys = desk.client.keys
    hands.make_due("j2")
    line = {"j2": hands.state("j2")["line"]}

    def swept() -> list[tuple[str, ...]]:
        return desk.client.run(sweep(keys, LEASE, ["j2"], {"interactive": None, "batch": None}, line))

    assert line == {"j2": keys.line("up/m/1", "interactive")}
    assert swept() == []
    desk.settle("j1-00000000", 1)
    desk.acquire()
    hands.make_due("j2")
    assert swept() == [("j2", "interactive", "vanished")]


def test_there_is_no_meter_before_it_is_asked(hands: Hands) -> None:
    """Looking makes none."""
    assert hands.client.run(look(hands.client.keys, "up/none")) is None
    assert list(hands.client.redis.scan_iter("*")) == []
