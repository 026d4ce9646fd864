"""How a job ends, is handed back and is forgotten: cancel, release, forget, and what every ending leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from millstream import Cancelled, Client, JobNotFound, MillstreamError
from millstream.calls import Ending
from millstream.events import compact
from tests.contract.conftest import COMPLETED, DONE, STARTED, Hands
from tests.oracle import check_log


def queued(hands: Hands) -> None:
    pass


def in_progress(hands: Hands) -> None:
    hands.begin("j", "a", "b")


def lapsed(hands: Hands) -> None:
    hands.begin("j", "a", lease=0.001)
    hands.let_lapse("j")


def waiting(hands: Hands) -> None:
    hands.claim("j")
    hands.release("j", delay=60.0, waits_for='{"limit":"tpm"}')


OPEN_STATES = [queued, in_progress, lapsed, waiting]


@pytest.mark.parametrize("state", OPEN_STATES, ids=lambda state: state.__name__)
def test_a_job_is_cancelled_in_every_open_state(client: Client, sent: Hands, state: Callable[[Hands], None]) -> None:
    """Queued, running, abandoned or waiting for a limit: at once, with the text so far kept."""
    client.submit("Hi", id="j")
    state(sent)
    before = int(sent.state("j")["seq"])
    assert client.cancel("j") == client.cancel("j") == "cancelled"
    log = check_log(client, "j")
    assert isinstance(log[-1], Cancelled)
    assert len(log) == before + 1
    assert client.status("j").ended


def test_the_first_end_wins(client: Client, sent: Hands) -> None:
    """Cancelling a job that has ended says how it ended, and writes nothing."""
    client.submit("Hi", id="j")
    sent.begin("j")
    sent.append("j", 2, DONE, ending=COMPLETED)
    written = sent.everything()
    assert client.cancel("j") == "completed"
    assert sent.everything() == written


def test_nobody_cancels_forgets_or_releases_what_is_not_there(client: Client, hands: Hands) -> None:
    """And nothing is written by trying."""
    for call in (client.cancel, client.forget, client.status):
        with pytest.raises(JobNotFound):
            call("nobody")
    assert hands.release("nobody") == "unknown"
    assert hands.everything() == {}


def test_a_released_job_is_queued_without_a_holder(client: Client, sent: Hands) -> None:
    """No attempt is counted, nothing waits, and a sweep looks after its next delivery with patience."""
    client.submit("Hi", id="j")
    sent.begin("j", "a")
    with sent.from_now() as after:
        assert sent.release("j") == "released"
    state = sent.state("j")
    assert (state["status"], state["holder"], state["broken"], state["seq"]) == ("queued", "", "0", "2")
    assert not {"lease", "not_before", "wait"} & set(state)
    assert client.redis.zscore(client.keys.open, "j") in after(60_000)


def test_a_released_job_says_what_it_waits_for(client: Client, sent: Hands) -> None:
    """And until when; the sweep looks at that time."""
    client.submit("Hi", id="j")
    sent.claim("j")
    assert sent.release("j", delay=30.0, waits_for='{"limit":"rpm"}') == "released"
    status = client.status("j")
    assert status.wait == {"limit": "rpm", "until": int(sent.state("j")["not_before"]) / 1000}
    assert client.redis.zscore(client.keys.open, "j") == int(sent.state("j")["not_before"])


@pytest.mark.parametrize("token", ["stale", ""])
def test_only_the_holder_releases(client: Client, sent: Hands, token: str) -> None:
    """A stale worker hands nothing back."""
    client.submit("Hi", id="j")
    assert sent.release("j", token) == "fenced", "it was never claimed"
    sent.begin("j")
    written = sent.everything()
    assert sent.release("j", token) == "fenced"
    assert sent.everything() == written


def test_a_job_that_ended_is_not_released(client: Client, sent: Hands) -> None:
    """A shutdown that comes with a cancel changes nothing."""
    client.submit("Hi", id="j")
    sent.begin("j")
    client.cancel("j")
    assert sent.release("j") == "closed"
    check_log(client, "j")


def by_worker(status: str) -> Callable[[Client, Hands], None]:
    def end(client: Client, hands: Hands) -> None:
        hands.begin("j", "a")
        ending = Ending(status, b"{}", b'{"code":"x","message":"y"}' if status == "failed" else b"")
        hands.append("j", 3, compact(status, finish_reasons={}), ending=ending)

    return end


def by_cancel(client: Client, hands: Hands) -> None:
    client.cancel("j")


def by_claim(client: Client, hands: Hands) -> None:
    hands.begin("j", "a")
    hands.claim("j", nth=2)


def by_sweep(client: Client, hands: Hands) -> None:
    client.redis.hset(client.keys.state("j"), "expires", 1)
    hands.make_due("j")
    hands.sweep("j")


ENDINGS = {
    "completed": by_worker("completed"), "incomplete": by_worker("incomplete"), "failed": by_worker("failed"),
    "cancelled": by_cancel, "attempts used up": by_claim, "expired": by_sweep,
}  # fmt: skip


@pytest.mark.parametrize("way", ENDINGS)
def test_every_ending_closes_announces_and_expires(client: Client, hands: Hands, way: str) -> None:
    """One terminal event on the channel and last in the log, one entry in the feed and on its channel, one expiry."""
    client.submit("Hi", id="j", retention=100, max_attempts=1)
    with client.redis.pubsub() as pubsub:
        pubsub.subscribe(client.keys.chunks("j"), client.keys.ended)
        for _ in range(2):
            assert pubsub.get_message(timeout=5.0) is not None
        ENDINGS[way](client, hands)
        heard: list[Any] = []
        while not any(each["channel"] == client.keys.ended.encode() for each in heard):
            message = pubsub.get_message(timeout=5.0)
            assert message is not None
            heard.append(message)
        assert pubsub.get_message(timeout=0.02) is None, "nothing follows"
    log = check_log(client, "j")
    status = log[-1].type
    assert [json.loads(each["data"])["type"] for each in heard[:-1]] == [event.type for event in log]
    assert json.loads(heard[-1]["data"]) == {"id": "j", "status": status}
    ((_, entry),) = client.redis.xrange(client.keys.ended)
    assert entry == {b"id": b"j", b"status": status.encode()}
    assert 95_000 < client.redis.pttl(client.keys.log("j")) <= 100_000


def test_a_forgotten_job_goes_in_a_minute(client: Client, sent: Hands) -> None:
    """All its keys at once; who still reads can finish."""
    client.submit("Hi", id="j")
    sent.begin("j", "a")
    client.cancel("j")
    client.forget("j")
    client.forget("j")
    assert 59_000 < client.redis.pttl(client.keys.state("j")) <= 60_000
    assert len(check_log(client, "j")) == 3
    assert [event.type for event in client.follow("j")] == ["started", "chunk", "cancelled"]


def test_forgetting_never_keeps_longer(client: Client, hands: Hands) -> None:
    """A retention of less than a minute stays what it is."""
    client.submit("Hi", id="j", retention=5)
    client.cancel("j")
    client.forget("j")
    assert client.redis.pttl(client.keys.log("j")) <= 5000
    check_log(client, "j")


def test_an_open_job_is_not_forgotten(client: Client) -> None:
    """The error says to cancel it first."""
    client.submit("Hi", id="j")
    with pytest.raises(MillstreamError, match=r"'j' is queued.*cancel it first"):
        client.forget("j")
    assert client.redis.ttl(client.keys.state("j")) == -1


def test_an_open_job_never_expires(client: Client, sent: Hands) -> None:
    """Whatever happens to it before its end, no key of it has a time to live."""
    client.submit("Hi", id="j", retention=1)
    sent.begin("j", "a")
    sent.release("j")
    sent.claim("j", "t2")
    sent.append("j", 3, STARTED, token="t2", attempt=2)
    assert [client.redis.ttl(name("j")) for name in (client.keys.spec, client.keys.state, client.keys.log)] == [-1] * 3
