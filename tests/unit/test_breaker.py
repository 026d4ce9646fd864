"""The retry budget and the breaker, by an injected clock: what an outage costs, and that nobody is locked out."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from worker.breaker import LEAST, OPEN, PROBING, RESERVE, Guard, RetryBudget, Ticket, Wait


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def guard(time: Time) -> Guard:
    return Guard(time)


def ticket(guard: Guard, *, again: bool = False) -> Ticket:
    found = guard.admit("m", again=again)
    assert isinstance(found, Ticket), found
    return found


def wait(guard: Guard, model: str = "m", *, again: bool = False) -> Wait:
    found = guard.admit(model, again=again)
    assert isinstance(found, Wait)
    return found


def open_it(guard: Guard) -> None:
    for _ in range(LEAST):
        ticket(guard).failed()
    assert guard.open


def test_it_opens_when_half_of_enough_answers_failed(guard: Guard, time: Time) -> None:
    """Nine failures are too few to judge; ten answers of which five failed are not."""
    for _ in range(5):
        ticket(guard).answered()
    for _ in range(5):
        assert not guard.open
        ticket(guard).failed()
    assert wait(guard) == Wait(OPEN, open=True)
    time.now += 5
    assert wait(guard) == Wait(OPEN - 5, open=True)


def test_old_answers_do_not_count(guard: Guard, time: Time) -> None:
    """Failures that trickle between good answers, fewer than half of ten seconds', leave it closed."""
    for _ in range(200):
        ticket(guard).failed()
        time.now += 0.5
        for _ in range(2):
            ticket(guard).answered()
        time.now += 0.5
    assert not guard.open


def test_failures_in_a_row_open_it_however_slow(guard: Guard, time: Time) -> None:
    """A quiet worker never has ten answers in ten seconds; ten failures in a row tell as much."""
    for _ in range(LEAST):
        assert not guard.open
        ticket(guard).failed()
        time.now += 30
    assert guard.open


def test_one_probe_at_a_time_decides(guard: Guard, time: Time) -> None:
    """After the pause one request goes through; it fails: another pause; it is answered: everybody goes through."""
    open_it(guard)
    time.now += OPEN
    probe = ticket(guard)
    assert [wait(guard) for _ in range(3)] == [Wait(PROBING, open=True)] * 3
    probe.failed()
    assert wait(guard) == Wait(OPEN, open=True)
    time.now += OPEN
    ticket(guard).answered()
    assert not guard.open
    for _ in range(100):
        ticket(guard)


def test_a_probe_whose_job_was_stopped_makes_room_for_the_next(guard: Guard, time: Time) -> None:
    """A cancelled job says nothing about the upstream, and must not lock everybody out."""
    open_it(guard)
    time.now += OPEN
    ticket(guard).dropped()
    ticket(guard).answered()
    assert not guard.open


def test_a_good_beginning_does_not_hide_a_bad_end(guard: Guard) -> None:
    """Streams that begin and break count as what they are: half of such answers failed."""
    for _ in range(LEAST):
        if guard.open:
            break
        each = ticket(guard)
        each.answered()
        each.answered()
        each.failed()
    assert guard.open


def test_answers_to_requests_from_before_change_nothing(guard: Guard, time: Time) -> None:
    """What was asked before it opened may fail or be answered late: only the probe decides."""
    late = [ticket(guard) for _ in range(5)]
    open_it(guard)
    for each in late:
        each.answered()
    assert wait(guard) == Wait(OPEN, open=True)


def test_a_retry_that_is_answered_costs_nothing(time: Time) -> None:
    """Retries that fail use the reserve up; then there is one each ten seconds, and a tenth per first request."""
    budget = RetryBudget(time)
    for _ in range(1000):
        assert budget.take() == 0
        budget.put_back()
    for _ in range(int(RESERVE)):
        assert budget.take() == 0
    assert budget.take() == pytest.approx(10)
    time.now += 9.9
    assert budget.take() == pytest.approx(0.1)
    time.now += 0.2
    assert budget.take() == 0
    for _ in range(10):
        assert budget.take() > 0
        budget.first()
    assert budget.take() == 0
    budget.refill()
    assert budget.take() == 0


def test_a_cool_down_holds_one_model(guard: Guard, time: Time) -> None:
    """Retry-After is about the model that was asked for; a shorter one does not end a longer one."""
    guard.cool("m", 3)
    guard.cool("m", 1)
    assert wait(guard) == Wait(3)
    assert isinstance(guard.admit("other", again=False), Ticket)
    time.now += 3
    ticket(guard)


def test_models_that_cool_are_bounded(guard: Guard, time: Time) -> None:
    """Jobs name models as they like: that must not fill the memory, and what is over makes room."""
    for number in range(5000):
        guard.cool(f"m{number}", 10)
    assert len(guard._cooling) == 1000
    time.now += 11
    guard.cool("later", 5)
    assert wait(guard, "later") == Wait(5)
    assert len(guard._cooling) == 1


def test_switched_off_it_lets_everything_through(time: Time) -> None:
    """MILLSTREAM_BREAKER=0: no breaker, no budget; what the upstream itself asks for is still kept."""
    guard = Guard(time, enabled=False)
    for _ in range(100):
        ticket(guard, again=True).failed()
    guard.cool("m", 2)
    assert wait(guard) == Wait(2)


# What an outage costs ------------------------------------------------------------------------------------------------


@dataclass
class Outage:
    """Workers, each with a guard, whose jobs behave as relay.py's do: retries in memory, longer waits in the queue."""

    rate: float
    workers: int
    seed: int
    began: float = 60.0
    lasts: float = 600.0
    requests: int = 0
    answered: int = 0
    jobs: int = 0
    failed: int = 0
    _due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _number: int = 0

    def run(self) -> Outage:
        self._time, self._random = Time(), random.Random(self.seed)
        start = self._time.now
        self._down = (start + self.began, start + self.began + self.lasts)
        self._guards = [Guard(self._time) for _ in range(self.workers)]
        at = 0.0
        while at < self.began + self.lasts:
            at += self._random.expovariate(self.rate)
            self.jobs += 1
            self._at(start + at, lambda: self._ask(self._random.choice(self._guards), 0))
        while self._due:
            self._time.now, _, step = heapq.heappop(self._due)
            step()
        return self

    def _at(self, when: float, step: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._due, (when, self._number, step))

    def _ask(self, guard: Guard, retries: int) -> None:
        found = guard.admit("m", again=retries > 0)
        if isinstance(found, Wait):
            in_memory = found.seconds <= 5
            after = found.seconds * self._random.uniform(1, 1.1) + (0 if in_memory else self._random.random())
            self._at(self._time.now + after, lambda: self._ask(guard, retries if in_memory else 0))
            return
        self.requests += 1
        self._at(self._time.now + 0.2, lambda: self._told(guard, found, retries))

    def _told(self, guard: Guard, ticket: Ticket, retries: int) -> None:
        if not self._down[0] <= self._time.now < self._down[1]:
            ticket.answered()
            self.answered += 1
            return
        ticket.failed()
        if retries == 5:
            self.failed += 1
            return
        backoff = min(5.0, 0.5 * 2**retries)
        self._at(self._time.now + self._random.uniform(backoff / 2, backoff), lambda: self._ask(guard, retries + 1))


@pytest.mark.parametrize(
    ("rate", "workers", "outages"), [(1, 1, 20), (3, 1, 5), (4, 4, 5), (15, 4, 1), (30, 1, 1)], ids=str
)
def test_ten_minutes_of_outage_cost_a_tenth_more_requests(
    rate: float, workers: int, outages: int, say: Callable[[str], None]
) -> None:
    """Requests in all are at most 1.1 per job, down to one job a second and worker; all jobs but a few are answered."""
    runs = [Outage(rate, workers, seed).run() for seed in range(outages)]
    extra = [(each.requests - each.jobs) / each.jobs for each in runs]
    assert max(extra) <= 0.10
    for each in runs:
        assert each.failed <= 5, "a job fails only when its retries end before the breaker opens"
        assert each.answered + each.failed == each.jobs
    say(f"{len(runs)} outages at {rate} jobs/s on {workers} workers: at most {max(extra):.1%} extra requests")
