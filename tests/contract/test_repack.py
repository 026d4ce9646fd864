"""Moving an ended log into large packs: no cursor, no reader and no accident sees a difference, but in `at`."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Final

import pytest

from millstream import AsyncClient, Client, JobExpired, Settings, reading
from millstream.calls import BUILDING_MS, PACK_BYTES, repack
from millstream.events import compact_text
from millstream.reading import Reading
from tests.contract.conftest import COMPLETED, DONE, Hands
from tests.contract.consumers import Consumer, wait_until
from tests.contract.kept_logs import Kept, end_a_log, timeless
from tests.oracle import check_log

STEPS: Final = [1, 2, 7, 64]
"""Packs a step may read."""

only_valkey = pytest.mark.parametrize("backend", ["valkey"], indirect=True)


@pytest.fixture
def pages_of_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers take 3 packs at a time, not 256."""
    monkeypatch.setattr(reading, "PAGE", 3)


# The same events ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packs", STEPS)
def test_every_cursor_sees_the_same_between_any_two_steps(
    client: Client, hands: Hands, packs: int, say: Callable[[str], None]
) -> None:
    """Logs of 2 to 120 events, of all kinds, in packs of 1 to 5: before, between the steps and after the last."""
    steps = 0
    for seed in range(6):
        rng = random.Random(f"{seed} {packs}")
        end_a_log(hands, f"j{seed}", rng.choice((1, 12, 40, 80, 120)), rng, pack=rng.choice((1, 5)))
        kept = Kept(client, f"j{seed}")
        before = kept.packs
        everywhere = range(len(kept.events) + 1)
        kept.check(everywhere)
        while kept.step(packs) == "more":
            steps += 1
            kept.check(everywhere if packs > 2 else rng.sample(everywhere, 3))
        kept.check(everywhere)
        assert kept.packs <= before
        assert timeless(check_log(client, kept.job_id)) == kept.events
    say(f"6 logs in {steps} steps of {packs}")


@pytest.mark.parametrize(
    ("backend", "events"), [("fake", 400), ("valkey", 3000)], ids=["fake", "valkey"], indirect=["backend"]
)
@pytest.mark.parametrize("packs", STEPS)
def test_a_long_log_is_repacked_and_read_the_same(client: Client, hands: Hands, packs: int, events: int) -> None:
    """Packs of one event each, up to 3,000: fewer afterwards, unless a step may read just one; nothing else."""
    rng = random.Random(packs)
    end_a_log(hands, "j", events, rng, pack=1)
    kept = Kept(client, "j")
    before = kept.packs
    kept.finish(packs)
    kept.check([0, 1, *range(events - 1, events + 2), *rng.sample(range(events), 20)])
    assert kept.packs <= before / packs + 3


def test_large_packs_are_kept_within_their_bound(client: Client, hands: Hands) -> None:
    """Small packs before and after one of 64 KB: it stays alone, what is joined stays within 16 KB."""
    client.submit("Hi", id="j")
    hands.begin("j")
    texts = [b'"ab"'] * 40 + [compact_text("x" * 60_000)] + [compact_text("y" * 700)] * 70
    for seq, text in enumerate(texts, 2):
        hands.append("j", seq, text)
    hands.append("j", len(texts) + 2, DONE, ending=COMPLETED)
    kept = Kept(client, "j")
    kept.finish(64)
    kept.check([0, 40, 41, 42, 43, len(kept.events)])
    *joined, alone = sorted(len(fields[b"e"]) for _, fields in client.redis.xrange(client.keys.log("j")))
    assert alone > 60_000
    assert max(joined) <= PACK_BYTES + 100
    assert len(joined) < 9


@pytest.mark.parametrize("packs", [1, 2, 5])
def test_a_reader_page_by_page_sees_exactly_the_log(
    client: Client, hands: Hands, pages_of_3: None, packs: int, say: Callable[[str], None]
) -> None:
    """From every cursor, with repacking steps between any two of its pages, however many."""
    rng = random.Random(packs)
    end_a_log(hands, "j", 24, rng, pack=2)
    kept = Kept(client, "j")
    trials = 0
    for after in range(len(kept.events) + 1):
        for most in (1, 30):
            kept.put_back()

            def some_steps(most: int = most) -> None:
                for _ in range(rng.randint(0, most)):
                    kept.step(packs)

            expected = [event for event in kept.shown() if event.seq > after]
            assert timeless(kept.pages(after, some_steps)) == expected
            trials += 1
    say(f"{trials} readers, with steps of {packs} between their pages")


@only_valkey
def test_followers_on_a_real_server_do_not_notice(
    client: Client, hands: Hands, settings: Settings, monkeypatch: pytest.MonkeyPatch, say: Callable[[str], None]
) -> None:
    """Blocking and asyncio consumers, started at any cursor, while a thread repacks the log under them."""
    monkeypatch.setattr(reading, "PAGE", 16)
    end_a_log(hands, "j", 900, random.Random(1), pack=1)
    kept = Kept(client, "j")
    smaller, trials = 0, 0
    for trial in range(12):
        kept.put_back()
        before = kept.packs
        cursors = [0, 0, trial * 40, 880]
        started = threading.Barrier(2 * len(cursors) + 1)
        consumers = [
            Consumer(partial(_together, started, make, settings), ["j"], after)
            for after in cursors
            for make in (Client, AsyncClient)
        ]
        started.wait()
        kept.finish(7)
        for consumer, after in zip(consumers, [each for each in cursors for _ in range(2)], strict=True):
            assert timeless(consumer.join()["j"]) == [event for event in kept.shown() if event.seq > after]
            trials += 1
        smaller += kept.packs < before / 5
    assert smaller == 12
    say(f"{trials} followers of a log that was repacked under them")


def _together(started: threading.Barrier, make: type[Client | AsyncClient], settings: Settings) -> Client | AsyncClient:
    started.wait()
    return make(settings=settings)


# Accidents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packs", STEPS)
def test_a_step_that_is_repeated_does_no_harm(client: Client, hands: Hands, packs: int) -> None:
    """Each reply is lost once and the call sent again: the events stay, and it comes to its end."""
    end_a_log(hands, "j", 150, random.Random(packs), pack=2)
    kept = Kept(client, "j")
    twice = Hands(client, twice=True)
    for _ in range(400):
        reply = twice.send(repack(client.keys, "j", packs))
        kept.check([0, 70])
        if reply == "done":
            break
    assert reply == "done"
    assert client.redis.zscore(client.keys.repack, "j") is None
    assert not client.redis.exists(client.keys.building("j"))


def test_a_copy_that_is_lost_half_way_is_begun_again(client: Client, hands: Hands, say: Callable[[str], None]) -> None:
    """It expired or was deleted after any number of steps; two repackers in any order: the events stay the same."""
    rng = random.Random(5)
    end_a_log(hands, "j", 100, rng, pack=2)
    kept = Kept(client, "j")
    trials = 0
    for _ in range(25):
        kept.put_back()
        lost = rng.randint(0, 6)
        for _ in range(lost):
            kept.step(rng.choice((1, 3, 7)))  # two repackers with steps of different sizes, say
        client.redis.delete(client.keys.building("j"))
        while kept.step(rng.choice((2, 3, 7, 64))) == "more":
            pass
        kept.check([0, rng.randrange(100)])
        trials += 1
    say(f"{trials} copies lost half way")


def test_a_job_that_is_gone_half_way_leaves_nothing(client: Client, hands: Hands) -> None:
    """Its retention ends between two steps: `gone`, it leaves the list, and its copy does not outlive it."""
    end_a_log(hands, "j", 100, random.Random(1))
    kept = Kept(client, "j")
    client.forget("j")
    assert kept.step(7) == "more"
    state, copy = (client.redis.pexpiretime(name("j")) for name in (client.keys.state, client.keys.building))
    assert 0 < copy <= state
    client.redis.delete(client.keys.state("j"), client.keys.log("j"), client.keys.spec("j"))
    assert kept.step(7) == "gone"
    assert client.redis.zscore(client.keys.repack, "j") is None
    at = Reading("j", 3)
    at.known = True
    with pytest.raises(JobExpired):
        at.read(client._page(at))


def test_the_copy_of_a_job_does_not_reach_the_next_of_its_name(client: Client, hands: Hands) -> None:
    """A short retention ends in mid-repack, and the id is used again at once: the new log holds the new events only."""
    client.submit("Hi", id="j", retention=1)
    hands.begin("j")
    for seq in range(2, 40):
        hands.append("j", seq, compact_text("old"))
    hands.append("j", 40, DONE, ending=COMPLETED)
    assert client.run(repack(client.keys, "j", 7)) == "more"
    wait_until(lambda: not client.redis.exists(client.keys.state("j")), "the retention ends")
    end_a_log(hands, "j", 60, random.Random(3))
    kept = Kept(client, "j")
    kept.finish(7)
    kept.check([0, 5])


def test_the_new_log_expires_with_its_job(client: Client, hands: Hands) -> None:
    """As long as the state does, be it the job's own retention or the minute after `forget`; the copy before that."""
    for job_id, forgotten in (("kept", False), ("forgotten", True)):
        end_a_log(hands, job_id, 100, random.Random(1))
        kept = Kept(client, job_id)
        assert kept.step(7) == "more"
        assert 0 < client.redis.pttl(client.keys.building(job_id)) <= BUILDING_MS
        if forgotten:
            client.forget(job_id)
        kept.finish(7)
        log, state = (client.redis.pexpiretime(name(job_id)) for name in (client.keys.log, client.keys.state))
        assert log == state
        assert (client.redis.pttl(client.keys.log(job_id)) <= 60_000) == forgotten
        check_log(client, job_id)


def test_forgetting_half_way_reaches_the_new_log(client: Client, hands: Hands) -> None:
    """`forget` after any step: no key of the job lives longer than its minute."""
    for steps in range(5):
        end_a_log(hands, f"j{steps}", 60, random.Random(steps))
        kept = Kept(client, f"j{steps}")
        for _ in range(steps):
            kept.step(20)
        client.forget(f"j{steps}")
        kept.finish(20)
        left = [client.redis.pttl(name) for name in client.redis.scan_iter(f"*{{j{steps}}}*")]
        assert len(left) == 3
        assert all(0 < ttl <= 60_000 for ttl in left)


def test_a_job_that_is_kept_keeps_its_log(client: Client, hands: Hands) -> None:
    """An operator took the TTLs away with PERSIST, before or in mid-repack: the new log has none either."""
    for job_id, steps in (("before", 0), ("between", 1)):
        end_a_log(hands, job_id, 60, random.Random(1))
        kept = Kept(client, job_id)
        for _ in range(steps):
            kept.step(7)
        names = [name(job_id) for name in (client.keys.spec, client.keys.state, client.keys.log)]
        for name in names:
            client.redis.persist(name)
        kept.finish(7)
        assert [client.redis.ttl(name) for name in names] == [-1, -1, -1]
        kept.check([0, 30])
        client.forget(job_id)
        client.redis.delete(*names)


def test_a_job_that_has_not_ended_is_left_alone(client: Client, hands: Hands) -> None:
    """Queued, running or handed back: `gone`, and not a byte is different, but that it leaves the list."""
    client.submit("Hi", id="queued")
    for job_id in ("running", "back"):
        client.submit("Hi", id=job_id)
        hands.begin(job_id, *map(str, range(20)))
    hands.release("back")
    before = hands.everything()
    for job_id in ("queued", "running", "back", "unheard-of"):
        client.redis.zadd(client.keys.repack, {job_id: 1})
        assert client.run(repack(client.keys, job_id)) == "gone"
    assert hands.everything() == before
    for job_id in ("queued", "running", "back"):
        client.cancel(job_id)


def test_a_log_in_large_packs_is_left_alone(client: Client, hands: Hands) -> None:
    """Above 2 KB a pack there is nothing to gain: no copy is made, and the entries stay as they are."""
    client.submit("Hi", id="j")
    hands.begin("j")
    for seq in range(2, 14):
        hands.append("j", seq, compact_text("x" * 5_000))
    hands.append("j", 14, DONE, ending=COMPLETED)
    before = client.redis.xrange(client.keys.log("j"))
    assert client.redis.zscore(client.keys.repack, "j") is not None
    assert client.run(repack(client.keys, "j")) == "done"
    assert client.redis.xrange(client.keys.log("j")) == before
    assert client.redis.zscore(client.keys.repack, "j") is None
    check_log(client, "j")
