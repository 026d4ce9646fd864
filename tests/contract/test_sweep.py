"""sweep: the jobs that are due and that nobody works on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from millstream import AsyncClient, Client, Failed
from millstream.calls import redeliver, sweep
from millstream.delivery import job_of, queue_key
from tests.contract.conftest import COMPLETED, DONE, LEASE, Hands
from tests.oracle import check_log
from worker.sweeper import Sweeper

LEASE_MS = int(LEASE * 1000)
PATIENCE_MS = 4 * LEASE_MS


def looked_at(client: Client, job_id: str = "j") -> int:
    """When the sweep looks at the job again (ms)."""
    score = client.redis.zscore(client.keys.open, job_id)
    assert score is not None
    return int(score)


def test_a_lost_lease_is_found_at_once(client: Client, hands: Hands) -> None:
    """A dead worker's job is to be delivered again; if that delivery is lost too, the next lease finds it."""
    client.submit("Hi", id="j", lane="batch")
    hands.begin("j", lease=0.001)
    hands.let_lapse("j")
    with hands.from_now() as after:
        assert hands.sweep("j") == [("j", "batch", "lost")]
    assert looked_at(client) in after(LEASE_MS)
    assert hands.sweep("j") == [], "it was taken"
    hands.make_due("j")
    assert hands.sweep("j") == [("j", "batch", "lost")]
    assert hands.state("j")["status"] == "in_progress", "a sweep only finds: the claim decides"


def test_a_lost_job_that_waits_behind_older_ones_is_delivered_once(client: Client, hands: Hands) -> None:
    """Its delivery is there: a lane that nobody serves for a day must not fill with others of the same job."""
    client.submit("Hi", id="j")
    created = int(hands.state("j")["created"])
    for _ in range(2):  # each lease that is lost is delivered at once
        hands.begin("j", lease=0.001)
        hands.let_lapse("j")
        hands.make_due("j")
        assert hands.sweep("j", oldest={"interactive": created - 1}) == [("j", "interactive", "lost")]
        for _ in range(3):
            hands.make_due("j")
            assert hands.sweep("j", oldest={"interactive": created}) == [], "its own, or an older one, stands there"
        hands.make_due("j")
        assert hands.sweep("j", oldest={"interactive": created + 1}) == [("j", "interactive", "lost")]
        assert hands.claim("j", "t2").outcome == "claimed"
        assert "swept" not in hands.state("j")
        hands.release("j", "t2", int(hands.state("j")["attempt"]))


def test_what_is_delivered_again_stands_first_with_the_oldest_at_the_head(client: Client, hands: Hands) -> None:
    """Somebody may be watching: it was accepted before those that wait. And no sweep takes those behind it for lost."""
    names = [f"j{number}" for number in range(5)]
    for number, name in enumerate(names):
        client.submit("Hi", id=name)
        client.redis.hset(client.keys.state(name), "created", 1000 + number)
        hands.begin(name, lease=0.001)
    queue = queue_key(client.keys, "interactive")
    client.redis.delete(queue, *(b"rq:job:" + taken for taken in client.redis.lrange(queue, 0, -1)))
    client.submit("Hi", id="backlog")
    hands.let_lapse(names[-1])
    shuffled = [names[at] for at in (3, 0, 4, 2, 1)]
    hands.make_due(*shuffled)
    found = hands.sweep(*shuffled, oldest={"interactive": int(hands.state("backlog")["created"])})
    assert [job_id for job_id, _, _ in found] == names[::-1]
    for job_id, lane, _ in found:
        assert client.run(redeliver(client.keys, job_id, lane))
    assert client.run(redeliver(client.keys, "due", "interactive", last=True))
    stand = [job_of(entry.decode()) for entry in client.redis.lrange(queue, 0, -1)]
    assert stand == [*names, "backlog", "due"]
    hands.make_due(*names)
    assert hands.sweep(*names, oldest={"interactive": 1000}) == []


def test_a_lost_job_that_stands_in_a_line_is_left_there(client: Client, hands: Hands) -> None:
    """Its delivery waits for a limit: whoever takes it from there claims the job."""
    client.submit("Hi", id="j")
    hands.begin("j", lease=0.001)
    hands.let_lapse("j")
    line = client.keys.line("up/m", "interactive")
    client.redis.zadd(line, {"j-1:0": 1})
    client.redis.expire(line, 60)
    client.redis.hset(client.keys.state("j"), mapping={"line": line, "place": "j-1:0"})
    hands.make_due("j")
    assert client.run(sweep(client.keys, LEASE, ["j"], {"interactive": None}, {"j": line})) == []
    client.redis.delete(line)
    hands.make_due("j")
    assert client.run(sweep(client.keys, LEASE, ["j"], {"interactive": None}, {"j": line})) == [
        ("j", "interactive", "lost")
    ]


def test_an_incomplete_state_stops_nobody(client: Client, hands: Hands) -> None:
    """Somebody else wrote it: it is looked at again later, and the others are found."""
    foreign: list[dict[str, Any]] = [{}, {"lane": "batch"}, {"lane": b"\xff", "created": "x"}]
    names = [f"bad{number}" for number in range(len(foreign))]
    for name, more in zip(names, foreign, strict=True):
        client.redis.hset(client.keys.state(name), mapping={"status": "in_progress", "lease": 1, **more})
    client.submit("Hi", id="j")
    hands.make_due("j", *names)
    assert hands.sweep("j", *names) == [("j", "interactive", "vanished")]
    client.redis.delete(*map(client.keys.state, names))


def test_a_living_lease_is_left_alone(client: Client, hands: Hands) -> None:
    """A job that was due by a score of old is looked at when its lease ends."""
    client.submit("Hi", id="j")
    hands.begin("j")
    hands.make_due("j")
    assert hands.sweep("j") == []
    assert client.redis.zscore(client.keys.open, "j") == int(hands.state("j")["lease"])


def test_a_job_that_is_not_due_is_left_alone(client: Client, hands: Hands) -> None:
    """A candidate list may be old: what another sweep took meanwhile is skipped."""
    client.submit("Hi", id="j")
    score = client.redis.zscore(client.keys.open, "j")
    assert hands.sweep("j") == []
    assert client.redis.zscore(client.keys.open, "j") == score


@pytest.mark.parametrize("oldest", [None, 1, -1])
def test_a_queued_job_has_vanished_only_if_nothing_older_waits(
    client: Client, hands: Hands, oldest: int | None
) -> None:
    """A backlog is no loss: `oldest` is when the lane's oldest delivery was submitted, beside the job's time."""
    client.submit("Hi", id="j")
    created = int(hands.state("j")["created"])
    hands.make_due("j")
    with hands.from_now() as after:
        found = hands.sweep("j", oldest={"interactive": None if oldest is None else created + oldest, "batch": 0})
    assert found == ([] if oldest == -1 else [("j", "interactive", "vanished")])
    assert looked_at(client) in after(PATIENCE_MS)


async def test_a_head_whose_job_is_gone_says_nothing_of_the_jobs_behind_it(
    client: Client, async_client: AsyncClient
) -> None:
    """It was cancelled and forgotten, or somebody else put it there. Whoever serves the lane takes it away."""
    sweeper = Sweeper(async_client)
    queue, state = queue_key(client.keys, "interactive"), client.keys.state("j")
    assert await sweeper._oldest("interactive") is None
    client.submit("Hi", id="j")
    assert await sweeper._oldest("interactive") == int(client.redis.hget(state, "created"))
    client.redis.hset(state, "queued", 7)
    assert await sweeper._oldest("interactive") == 7
    kept = client.redis.dump(state)
    client.redis.delete(b"rq:job:" + client.redis.lindex(queue, 0))
    spoils: list[Callable[[], object]] = [
        lambda: client.redis.delete(state),
        lambda: client.redis.set(state, "no hash"),
        lambda: client.redis.lpush(queue, b"\xff"),
        lambda: client.redis.set(queue, "no list"),
    ]
    for spoil in spoils:
        spoil()
        assert await sweeper._oldest("interactive") == 0
    client.redis.delete(queue, state)
    client.redis.restore(state, 0, kept)
    assert await sweeper._oldest("interactive") is None


def test_its_own_delivery_waiting_is_no_loss(client: Client, hands: Hands) -> None:
    """The oldest delivery may be the job's own."""
    client.submit("Hi", id="j")
    hands.make_due("j")
    assert hands.sweep("j", oldest={"interactive": int(hands.state("j")["created"])}) == []


def test_a_job_whose_wait_is_over_is_delivered_once(client: Client, hands: Hands) -> None:
    """From then on it waits in its lane like any other: a backlog there is no reason to deliver it again."""
    client.submit("Hi", id="j")
    hands.claim("j")
    with hands.from_now() as after:
        hands.release("j", delay=60, waits_for='{"limit":"rpm"}')
    hands.make_due("j")
    assert hands.sweep("j") == []
    assert looked_at(client) in after(60_000)
    hands.make_past("j", "not_before")
    hands.make_due("j")
    assert hands.sweep("j") == [("j", "interactive", "due")]
    assert client.status("j").wait is None
    since = int(hands.state("j")["queued"])
    for first in (int(hands.state("j")["created"]), since):
        hands.make_due("j")
        assert hands.sweep("j", oldest={"interactive": first}) == [], "it stands behind those that were there"
    hands.make_due("j")
    assert hands.sweep("j", oldest={"interactive": since + 1}) == [("j", "interactive", "vanished")]
    assert "queued" not in hands.state("j"), "from now on it stands first"
    assert hands.claim("j", "t2").outcome == "claimed"


def test_a_job_that_was_not_started_by_its_expiry_ends(client: Client, hands: Hands) -> None:
    """Even if no worker ever comes; it is not delivered."""
    client.submit("Hi", id="j", expires=0.05)
    hands.let_lapse("j", "expires")
    hands.make_due("j")
    assert hands.sweep("j") == []
    (end,) = check_log(client, "j")
    assert isinstance(end, Failed)
    assert end.error["code"] == "expired"
    assert client.status("j").error == end.error


def test_a_job_that_expires_later_is_still_delivered(client: Client, hands: Hands) -> None:
    """`expires` ahead is no reason to end it."""
    client.submit("Hi", id="j", expires=100)
    hands.make_due("j")
    assert hands.sweep("j") == [("j", "interactive", "vanished")]


def test_leftovers_leave_the_list_of_open_jobs(client: Client, hands: Hands) -> None:
    """An id whose job has ended, or has no state at all (a server that lost half), is dropped."""
    client.submit("Hi", id="j")
    hands.begin("j")
    hands.append("j", 2, DONE, ending=COMPLETED)
    hands.make_due("j", "ghost")
    assert hands.sweep("j", "ghost") == []
    assert client.redis.zcard(client.keys.open) == 0


def test_a_broken_job_keeps_no_sweep_from_the_others(client: Client, hands: Hands) -> None:
    """It is looked at again later, not in every sweep."""
    client.redis.set(client.keys.state("bad"), "no hash")
    client.submit("Hi", id="j")
    hands.make_due("bad", "j")
    with hands.from_now() as after:
        assert hands.sweep("bad", "j") == [("j", "interactive", "vanished")]
    assert looked_at(client, "bad") in after(PATIENCE_MS)


def test_several_sweeps_at_once_take_different_jobs(client: Client, hands: Hands, say: Callable[[str], None]) -> None:
    """Each due job is delivered by exactly one of them."""
    rounds, jobs, sweepers = 5, 30, 4
    ids = [job.id for job in client.submit_many([{"prompt": "Hi"} for _ in range(jobs)])]

    def sweep_one_by_one() -> list[tuple[str, ...]]:
        return [row for job_id in ids for row in client.run(sweep(client.keys, LEASE, [job_id], {}))]

    for _ in range(rounds):
        hands.make_due(*ids)
        with ThreadPoolExecutor(sweepers) as pool:
            found = list(pool.map(lambda _: sweep_one_by_one(), range(sweepers)))
        taken = sorted(job_id for each in found for job_id, _, _ in each)
        assert taken == sorted(ids)
    say(f"sweeps at once: {rounds} rounds of {sweepers} over {jobs} jobs")
