"""A fleet on one meter, by chance, on a clock of its own: nothing beyond the limit, nobody forgotten, no idle time."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import pytest

from millstream import Client
from millstream.calls import Call, T
from millstream.meters import (
    UNUSED,
    WINDOW,
    Acquired,
    Count,
    Limits,
    Meter,
    Place,
    Settlement,
    acquire,
    again,
    learn,
    look,
    renew,
    settle,
)
from millstream.testing import fake_client
from tests.contract.conftest import Clock
from tests.contract.test_limits import INTERMEDIATE, LANES
from tests.contract.test_limits_window import Upstream
from worker.lines import Lines

METER: Final = "up/m"
LEASE: Final = 15.0
COUNTED: Final = WINDOW * 125 / 120
"""Seconds after which a grant surely counts no more; of a sixth, the next."""

COUNTED_NEAR: Final = WINDOW * 25 / 120
IDLE: Final = 2.5
"""Seconds at most that the first in line waits although it may go and a worker is free: its turn is at most a second
late, a line that others began is seen within another, and a step may be to go.
"""


def near_limit(limit: int) -> int:
    """What a sixth of a window gets."""
    return limit // 4 if limit >= 8 else math.ceil(limit / 4)


@dataclass(eq=False)
class Ticket:
    """What was counted for a request, and who holds it."""

    name: str
    lane: str
    tokens: int
    at: float
    holder: Worker
    open: bool = True


@dataclass(eq=False)
class Worker:
    """Asks in its turn, as the real one does."""

    name: str
    lanes: tuple[str, ...]
    free: int
    lines: Lines
    until: float = math.inf
    """When its tickets have run out after its death."""
    asking: bool = False
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def alive(self) -> bool:
        return self.until == math.inf


@dataclass
class Plan:
    """What a run is like; the chances are per request."""

    limits: Limits
    jobs: int
    seconds: float
    most: tuple[int, int] = (10, 90)
    streaming: float = 4.0
    unused: float = 0.05
    retried: float = 0.05
    late: float = 0.1
    lost: float = 0.1
    kills: int = 2
    lanes: tuple[tuple[str, ...], ...] = (LANES, LANES, LANES)
    told: bool = False
    """Whether the upstream says now and then that it wants to be left alone, or counts more than we do."""


class Fleet:
    """Workers, jobs and an upstream; events in the order of their time."""

    def __init__(self, client: Client, clock: Clock, plan: Plan, seed: int) -> None:
        self.client, self.clock, self.plan, self.chance = client, clock, plan, random.Random(seed)
        self.meter = Meter("up", "m", plan.limits)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order, self.named = itertools.count(), itertools.count(1)
        self.workers = [self.worker(lanes) for lanes in plan.lanes]
        self.queued: dict[str, list[Place]] = {lane: [] for lane in LANES}
        self.line: dict[str, dict[str, Place]] = {lane: {} for lane in LANES}
        self.granted: list[str] = []
        self.tickets: list[Ticket] = []
        self.fronts: dict[str, str] = {}  # lanes of running jobs that wait before the line
        self.upstream = Upstream()
        self.streams = self.most_streams = 0
        self.idle, self.idle_since = 0.0, clock.now
        self.calls = 0

    # Time ------------------------------------------------------------------------------------------------------------

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.clock.now + seconds, next(self.order), what))

    def play(self, until: float) -> None:
        while self.events and self.events[0][0] <= until:
            at, _, what = heapq.heappop(self.events)
            self.clock.now = max(self.clock.now, at)
            what()
            self.watch()

    def every(self, seconds: float, worker: Worker, what: Callable[[Worker], None]) -> None:
        def go() -> None:
            if worker.alive:
                what(worker)
                self.after(seconds, go)

        self.after(self.chance.uniform(0, seconds), go)

    def run(self, call: Call[T]) -> T:
        """One reply in so many is lost: the call is sent again, and nothing comes of it."""
        self.calls += 1
        reply = self.client.run(call)
        if self.chance.random() < self.plan.lost:
            assert self.client.run(call) == reply
        return reply

    # Workers ---------------------------------------------------------------------------------------------------------

    def worker(self, lanes: tuple[str, ...]) -> Worker:
        made = Worker(f"w{next(self.named)}", lanes, 30, Lines(lambda: self.chance.uniform(0, 0.1)))
        self.every(1.0, made, self.look)
        self.every(LEASE / 3, made, self.renew)
        return made

    def look(self, worker: Worker) -> None:
        waiting = self.client.redis.zrange(self.client.keys.waiting, 0, -1, withscores=True)
        worker.lines.looked((name.decode(), max(self.clock.now, at / 1000)) for name, at in waiting)
        self.plan_ask(worker)

    def renew(self, worker: Worker) -> None:
        held = [each.name for each in self.tickets if each.open and each.holder is worker]
        if held:
            assert self.run(renew(self.client.keys, METER, held, lease=LEASE)) == 0

    def plan_ask(self, worker: Worker) -> None:
        at = worker.lines.next(self.clock.now)
        if at is not None and worker.alive and not worker.asking and worker.free > 0:
            self.after(max(0.0, at - self.clock.now) + self.chance.uniform(0.001, 0.01), lambda: self.serve(worker))

    def serve(self, worker: Worker) -> None:
        if worker.alive and not worker.asking and worker.free > 0 and worker.lines.to_ask(self.clock.now):
            self.ask(worker, [])

    def ask(self, worker: Worker, places: list[Place]) -> None:
        call = acquire(
            self.client.keys, self.meter, places, lease=LEASE, asker=worker.name, number=next(worker.numbers),
            want=worker.free, lanes=worker.lanes, intermediate=INTERMEDIATE,
            turn=worker.lines.turn(METER, self.clock.now),
        )  # fmt: skip
        for place in places:
            self.line[place.lane][place.delivery] = place
        found = self.client.run(call)
        self.calls += 1
        self.note(found)
        tickets = [
            Ticket(name, self.jobs[name].lane, tokens, self.clock.now, worker) for name, tokens in found.granted.items()
        ]
        self.tickets += tickets
        worker.asking = True

        def answered() -> None:
            """Perhaps only the second time; the others went on meanwhile."""
            if not worker.alive:
                return
            assert self.client.run(call) == found
            worker.asking = False
            worker.lines.answered(METER, self.clock.now, found.again, found.turn)
            for ticket in tickets:
                self.begin(ticket)
            self.take_in(worker)
            self.plan_ask(worker)

        if self.chance.random() < self.plan.lost:
            self.after(self.chance.uniform(0.05, 0.4), answered)
        else:
            answered()

    def note(self, found: Acquired) -> None:
        """In the order of submission, each once."""
        assert not found.too_large
        for delivery in found.granted:
            lane = self.jobs[delivery].lane
            assert delivery == min(self.line[lane], key=lambda each: self.line[lane][each].since)
            del self.line[lane][delivery]
            self.granted.append(delivery)
            self.idle_since = self.clock.now

    def kill(self) -> None:
        """Its requests end with its connections; what was counted stays."""
        worker = self.chance.choice([each for each in self.workers if each.alive])
        worker.until = self.clock.now + LEASE
        self.workers.remove(worker)
        self.streams -= sum(each.open and each.holder is worker and each.name in self.running for each in self.tickets)
        self.running -= {each.name for each in self.tickets if each.holder is worker}
        self.after(self.chance.uniform(0.1, 3.0), lambda: self.workers.append(self.worker(worker.lanes)))

    # Jobs ------------------------------------------------------------------------------------------------------------

    def submit(self) -> None:
        """In bursts."""
        self.jobs: dict[str, Place] = {}
        self.running: set[str] = set()
        numbers = itertools.count(1)
        while len(self.jobs) < self.plan.jobs:
            at, lane = self.chance.uniform(0, self.plan.seconds), self.chance.choice(LANES)
            burst = []
            for number in itertools.islice(numbers, min(self.chance.randint(1, 40), self.plan.jobs - len(self.jobs))):
                most = self.chance.randint(*self.plan.most)
                place = Place(f"j{number}-00000000", f"j{number}", lane, at * 1000 + number / 1000, 5, most)
                self.jobs[place.delivery] = place
                burst.append(place)
            self.after(at, lambda lane=lane, burst=burst: self.arrive(lane, burst))  # type: ignore[misc]

    def arrive(self, lane: str, burst: list[Place]) -> None:
        self.queued[lane] += burst
        for worker in self.chance.sample(self.workers, len(self.workers)):
            self.take_in(worker)

    def take_in(self, worker: Worker) -> None:
        """As many deliveries as it has free slots, as the intake does."""
        places: list[Place] = []
        for lane in worker.lanes:
            while self.queued[lane] and len(places) < worker.free and worker.alive and not worker.asking:
                places.append(self.queued[lane].pop(0))
        if places:
            self.ask(worker, places)

    def begin(self, ticket: Ticket) -> None:
        ticket.holder.free -= 1
        if self.chance.random() < self.plan.unused:
            self.after(0.01, lambda: self.end(ticket, UNUSED))
        elif self.chance.random() < self.plan.late:
            self.after(
                self.chance.uniform(0.75, 4.0), lambda: self.more(ticket, self.clock.now, instead_of=ticket.name)
            )
        else:
            self.after(self.chance.uniform(0, 0.7), lambda: self.send(ticket))

    def send(self, ticket: Ticket) -> None:
        if ticket.holder.alive:
            self.running.add(ticket.name)
            self.streams += 1
            self.most_streams = max(self.most_streams, self.streams)
            took = int(ticket.tokens * self.chance.choice((1.0, 1.0, self.chance.random())))
            self.upstream.arrived.append((self.clock.now, took))
            self.after(self.chance.expovariate(1 / self.plan.streaming), lambda: self.end(ticket, took))

    def end(self, ticket: Ticket, took: int) -> None:
        worker = ticket.holder
        if not worker.alive:
            return
        if ticket.name in self.running:
            self.running.remove(ticket.name)
            self.streams -= 1
        ticket.open = False
        ticket.tokens = max(0, took)
        if took == UNUSED:
            self.tickets.remove(ticket)
        moves = self.run(settle(self.client.keys, METER, [Settlement(ticket.name, took)]))
        if moves is not None:
            worker.lines.moves(METER, self.clock.now, moves)
        if took != UNUSED and self.chance.random() < self.plan.retried:
            self.more(ticket, self.clock.now)
            return
        worker.free += 1
        self.take_in(worker)
        self.plan_ask(worker)

    def more(self, ticket: Ticket, began: float, instead_of: str = "", name: str = "") -> None:
        """A further request of a running job, which waits up to five seconds and then gives up."""
        worker = ticket.holder
        if not worker.alive:
            return
        name = name or f"more{next(self.named)}"
        room = began + 5.0 - self.clock.now
        if instead_of:
            ticket.open = False
            self.tickets.remove(ticket)
        prompt, most = 5, self.jobs[ticket.name].most if ticket.name in self.jobs else 20
        found = self.run(
            again(
                self.client.keys, self.meter, name, ticket.lane, prompt, most, lease=LEASE, room=room,
                instead_of=instead_of,
            )
        )  # fmt: skip
        if found.outcome == "granted":
            self.fronts.pop(name, None)
            new = Ticket(name, ticket.lane, found.tokens, self.clock.now, worker)
            self.tickets.append(new)
            self.after(self.chance.uniform(0, 0.7), lambda: self.send(new))
        elif found.seconds * 1.1 > room:
            self.fronts.pop(name, None)
            worker.free += 1
            self.run(settle(self.client.keys, METER, [Settlement(name, UNUSED)]))
            self.plan_ask(worker)
        else:
            self.fronts[name] = ticket.lane
            wait = found.seconds * self.chance.uniform(1.0, 1.1)
            self.after(wait, lambda: self.more(ticket, began, name=name))

    def tell(self) -> None:
        """The upstream has its say."""
        more = Count(self.chance.choice((100, 150)), self.chance.randint(0, 100), 5.0)
        for said in self.chance.sample(({"cool": 3.0}, {"slow_down": True}, {"requests": more}), 1):
            self.run(learn(self.client.keys, self.meter, **said))  # type: ignore[arg-type]
        self.after(self.chance.uniform(5, 20), self.tell)

    # What must hold --------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """How long the first in line has been waiting for nothing."""
        if self.blocked():
            self.idle_since = self.clock.now
        self.idle = max(self.idle, self.clock.now - self.idle_since)

    def blocked(self) -> bool:
        """Whether nobody waits that may go, by a count of our own that is a little on the safe side."""
        if self.plan.told:
            return True
        able = {lane for each in self.workers if each.free > 0 and not each.asking for lane in each.lanes}
        lane = "interactive" if self.line["interactive"] else "batch"
        before = {each for each in self.fronts.values() if lane in ("batch", each)}
        if before or lane not in able or not self.line[lane]:
            return True
        head = min(self.line[lane].values(), key=lambda each: each.since)
        return not self.room(lane, head.prompt + (head.most or 0))

    def room(self, lane: str, cost: int) -> bool:
        limits, now = self.plan.limits, self.clock.now
        part = 1 - limits.share
        held = [each for each in self.tickets if each.at > now - COUNTED]
        running = [each for each in self.tickets if each.open and each.holder.until > now]
        if limits.streams and (
            len(running) >= limits.streams or sum(each.lane == "batch" for each in running) >= limits.streams * part - 1
        ):
            return False
        measures = ((limits.requests, 1, lambda _: 1), (limits.tokens, cost, lambda each: each.tokens))
        for limit, asks, of in measures:
            for span, most in ((COUNTED, limit), (COUNTED_NEAR, near_limit(limit))):
                used = [each for each in held if each.at > now - span]
                rows = [each for each in used if lane == each.lane == "batch"]
                if limit and used and sum(map(of, used)) + asks > most:
                    return False
                if limit and rows and sum(map(of, rows)) + asks > most * part - 1:
                    return False
        return True

    def check(self) -> None:
        limits = self.plan.limits
        minute, near = self.upstream.most(WINDOW), self.upstream.most(WINDOW / 6)
        largest = max(cost for _, cost in self.upstream.arrived)
        if limits.requests:
            assert minute[0] <= limits.requests
            assert near[0] <= near_limit(limits.requests)
        if limits.tokens:
            assert minute[1] <= limits.tokens
            assert near[1] <= max(limits.tokens // 4, largest)
        if limits.streams:
            assert self.most_streams <= limits.streams
        assert len(set(self.granted)) == len(self.granted) == len(self.jobs), "every job once"
        assert self.idle <= IDLE

    def check_rest(self) -> None:
        """All is given back, once everything is over and a window has passed."""
        self.clock.now += LEASE + 2 * WINDOW
        self.run(acquire(
            self.client.keys, self.meter, [], lease=LEASE, asker="last", number=1, want=1, lanes=LANES,
            intermediate=INTERMEDIATE,
        ))  # fmt: skip
        gauge = self.client.run(look(self.client.keys, METER))
        assert gauge is not None
        assert (gauge.requests.used, gauge.tokens.used, gauge.streams.used) == (0, 0, 0)
        assert gauge.waiting == dict.fromkeys(LANES, 0)
        meter, _, tickets, held, first, second, *_ = self.client.keys.meter(METER)
        assert self.client.redis.exists(tickets, held, first, second) == 0
        counts = [int(count) for count in self.client.redis.hget(meter, "counts").split()]
        assert not any(counts[3:12]), "requests and tokens, of both lanes, of a window and of a sixth; nobody is behind"
        assert counts[13] == 0, "streams of batch"


PLANS: Final = {
    "requests": Plan(Limits(requests=120), jobs=300, seconds=90),
    "few": Plan(Limits(requests=6), jobs=12, seconds=60, kills=1),
    "tokens": Plan(Limits(tokens=8000), jobs=250, seconds=90),
    "large": Plan(Limits(tokens=1000), jobs=20, seconds=60, most=(10, 990), kills=1),
    "streams": Plan(Limits(streams=6), jobs=150, seconds=60, streaming=2.0),
    "all": Plan(Limits(requests=200, tokens=9000, streams=12, share=0.5), jobs=250, seconds=90),
    "retries": Plan(Limits(requests=60, share=0.5), jobs=80, seconds=90, retried=0.4, streaming=1.0),
    "told": Plan(Limits(requests=200), jobs=100, seconds=60, told=True),
    "lanes": Plan(Limits(requests=120), jobs=250, seconds=90, lanes=(("interactive",), ("batch",), ("batch",))),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_fleet_keeps_the_limit_and_is_never_idle(clock: Clock, name: str) -> None:
    """Lost replies, late tickets, retries, cancelled jobs, killed workers: no window is exceeded, the order is kept,
    every job gets one ticket, all of them come back, and the first in line never waits for nothing.
    """
    with fake_client() as client:
        fleet = Fleet(client, clock, PLANS[name], seed=1)
        fleet.submit()
        if fleet.plan.told:
            fleet.after(3.0, fleet.tell)
        for _ in range(fleet.plan.kills):
            fleet.after(fleet.chance.uniform(0, fleet.plan.seconds), fleet.kill)
        end = clock.now + fleet.plan.seconds
        while len(fleet.granted) < fleet.plan.jobs or fleet.running or clock.now < end:
            assert clock.now < end + 1500
            fleet.play(clock.now + 1.0)
            clock.now += 0.01
        fleet.play(clock.now + 10.0)
        fleet.check()
        fleet.check_rest()
