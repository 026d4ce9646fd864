"""claim: the right to run a job, as its newest attempt."""

from __future__ import annotations

import pytest

from millstream import Client, Failed
from millstream.calls import Claim
from tests.contract.conftest import COMPLETED, DONE, STARTED, Hands
from tests.oracle import check_log


def test_a_queued_job_becomes_attempt_1(client: Client, sent: Hands) -> None:
    """It is in progress, leased, and looked after when the lease ends."""
    client.submit("Hi", id="j")
    with sent.from_now() as after:
        assert sent.claim("j") == Claim("claimed", 1, 0, None, 0, 3)
    state = sent.state("j")
    assert (state["status"], state["attempt"], state["holder"]) == ("in_progress", "1", "t1:1")
    assert int(state["lease"]) in after(15_000)
    assert client.redis.zscore(client.keys.open, "j") == int(state["lease"])
    assert int(state["started"]) <= sent.now_ms()


def test_a_token_gets_its_own_attempt_again(client: Client, sent: Hands) -> None:
    """With what is in the log by then: the reply of the claim was lost, but the events were written."""
    client.submit("Hi", id="j")
    sent.begin("j", "a")
    assert sent.claim("j") == Claim("claimed", 1, 2, None, 0, 3)


def test_a_job_with_a_living_lease_is_busy(client: Client, sent: Hands) -> None:
    """Another delivery of the same job is told for how long, and changes nothing."""
    client.submit("Hi", id="j")
    sent.begin("j")
    written = sent.everything()
    claim = sent.claim("j", "t2")
    assert (claim.outcome, 0 < claim.busy_ms <= 15_000) == ("busy", True)
    assert sent.everything() == written


def test_an_expired_lease_goes_to_whoever_asks(client: Client, sent: Hands) -> None:
    """It is a lost attempt, and counts as one."""
    client.submit("Hi", id="j")
    sent.begin("j", "a", lease=0.001)
    sent.let_lapse("j")
    assert sent.claim("j", "t2") == Claim("claimed", 2, 2, "worker_lost", 1, 3)


def test_an_expired_lease_nobody_took_stays_valid(client: Client, sent: Hands) -> None:
    """A worker that was merely slow goes on, and its next write renews the lease."""
    client.submit("Hi", id="j")
    sent.begin("j", lease=0.001)
    sent.let_lapse("j")
    with sent.from_now() as after:
        assert sent.append("j", 2, b'"late"')[0] in ("ok", "duplicate")
    assert int(sent.state("j")["lease"]) in after(15_000)
    assert sent.claim("j", "t2").outcome == "busy"


def test_a_broken_stream_is_a_further_attempt_of_the_same_owner(client: Client, sent: Hands) -> None:
    """Asked for by its number, so that a retry does not count twice."""
    client.submit("Hi", id="j")
    sent.begin("j", "a")
    assert sent.claim("j", nth=2) == Claim("claimed", 2, 2, "stream_broken", 1, 3)
    assert sent.claim("j", nth=2).attempt == 2
    assert sent.claim("j", nth=3) == Claim("claimed", 3, 2, "stream_broken", 2, 3)
    assert sent.append("j", 3, STARTED, attempt=2)[0] == "fenced"


def test_a_stale_token_begins_no_further_attempt(client: Client, sent: Hands) -> None:
    """Its job has a newer owner."""
    client.submit("Hi", id="j")
    sent.begin("j", lease=0.001)
    sent.let_lapse("j")
    sent.claim("j", "t2")
    written = sent.everything()
    assert sent.claim("j", "t1", nth=2).outcome == "fenced"
    assert sent.everything() == written


@pytest.mark.parametrize("way", ["broken", "lost"])
def test_a_job_fails_when_its_attempts_are_used_up(client: Client, sent: Hands, way: str) -> None:
    """`max_attempts` broken or lost ones; the failure has a code and says what the last one died of."""
    client.submit("Hi", id="j", max_attempts=2)
    sent.begin("j", "a", lease=0.001)
    if way == "broken":
        sent.claim("j", nth=2)
        last = sent.claim("j", nth=3)
    else:
        sent.let_lapse("j")
        assert sent.claim("j", "t2", lease=0.001).attempt == 2
        sent.let_lapse("j")
        last = sent.claim("j", "t3")
    assert last == Claim("closed", status="failed")
    end = check_log(client, "j")[-1]
    assert isinstance(end, Failed)
    assert end.error["code"] == "attempts_exhausted"
    assert ("stream_broken" if way == "broken" else "worker_lost") in end.error["message"]
    status = client.status("j")
    assert (status.error, status.broken, status.ended_at) == (end.error, 2, end.at)


def test_deploys_and_waiting_cost_no_attempt(client: Client, sent: Hands) -> None:
    """A job that is handed back ten times still has all its attempts."""
    client.submit("Hi", id="j", max_attempts=1)
    for attempt in range(1, 11):
        claim = sent.claim("j", f"t{attempt}")
        assert (claim.attempt, claim.broken) == (attempt, 0)
        assert claim.reason == (None if attempt == 1 else "released")
        assert sent.release("j", f"t{attempt}", attempt) == "released"


def test_a_job_that_waits_for_its_time_is_busy(client: Client, sent: Hands) -> None:
    """Until then; afterwards it can be claimed, and does not wait any more."""
    client.submit("Hi", id="j")
    sent.claim("j")
    sent.release("j", delay=60, waits_for='{"limit":"rpm"}')
    claim = sent.claim("j", "t2")
    assert (claim.outcome, 0 < claim.busy_ms <= 60_000) == ("busy", True)
    sent.make_past("j", "not_before")
    assert sent.claim("j", "t2").outcome == "claimed"
    assert client.status("j").wait is None


def test_a_job_that_was_not_started_by_its_expiry_fails(client: Client, sent: Hands) -> None:
    """With a code that says so; it is never run."""
    client.submit("Hi", id="j", expires=0.05)
    sent.let_lapse("j", "expires")
    assert sent.claim("j") == Claim("closed", status="failed")
    (end,) = check_log(client, "j")
    assert isinstance(end, Failed)
    assert end.error["code"] == "expired"


def test_a_job_that_was_started_does_not_expire(client: Client, sent: Hands) -> None:
    """`expires` is about the first start alone."""
    client.submit("Hi", id="j", expires=60)
    sent.begin("j", lease=0.001)
    sent.let_lapse("j")
    sent.make_past("j", "expires")
    assert sent.claim("j", "t2").outcome == "claimed"


@pytest.mark.parametrize("status", ["completed", "cancelled"])
def test_a_job_that_has_ended_is_closed(client: Client, sent: Hands, status: str) -> None:
    """To every token, its own included; the claim says how it ended."""
    client.submit("Hi", id="j")
    sent.begin("j")
    if status == "completed":
        sent.append("j", 2, DONE, ending=COMPLETED)
    else:
        client.cancel("j")
    written = sent.everything()
    for token, nth in (("t1", None), ("t1", 2), ("t2", None), ("t2", 2)):
        assert sent.claim("j", token, nth=nth) == Claim("closed", status=status)
    assert sent.everything() == written


def test_a_job_nobody_knows_is_unknown(sent: Hands) -> None:
    """A delivery may outlive its job; nothing is written for it."""
    assert sent.claim("nobody").outcome == "unknown"
    assert sent.everything() == {}
