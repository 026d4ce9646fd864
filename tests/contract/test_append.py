"""append: events of many jobs in one call, each guarded by its token."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from millstream import Chunk, Client, Completed
from millstream.calls import Ending, Frame, append, holder
from millstream.events import compact, compact_text
from tests.contract.conftest import COMPLETED, DONE, STARTED, Hands
from tests.oracle import check_log, read_log


def texts(client: Client, job_id: str = "j") -> list[str]:
    return [event.content for event in read_log(client.redis, client.keys, job_id) if isinstance(event, Chunk)]


def test_events_are_written_in_one_pack(client: Client, hands: Hands) -> None:
    """Named by its last seq, with the server's time, the attempt and all boundaries kept."""
    client.submit("Hi", id="j")
    hands.claim("j")
    before = hands.now_ms()
    assert hands.append("j", 1, STARTED, b'"a"', b'"b"') == ("ok", 3)
    ((entry_id, fields),) = client.redis.xrange(client.keys.log("j"))
    assert (entry_id, fields[b"a"], fields[b"e"]) == (b"3-0", b"1", b"[" + STARTED + b',"a","b"]')
    assert before <= int(fields[b"t"]) <= hands.now_ms()
    assert hands.state("j")["seq"] == "3"


def test_a_call_that_is_retried_writes_once(client: Client, hands: Hands) -> None:
    """The reply was lost: the second one says `duplicate`, and nothing changes."""
    client.submit("Hi", id="j")
    hands.begin("j")
    assert hands.append("j", 2, b'"a"', b'"b"') == ("ok", 3)
    written = hands.everything()
    assert hands.append("j", 2, b'"a"', b'"b"') == ("duplicate", 3)
    assert hands.append("j", 2, b'"a"') == ("duplicate", 3)
    assert hands.everything() == written


def test_a_known_prefix_is_skipped(client: Client, sent: Hands) -> None:
    """The rest is written with the seqs it has."""
    client.submit("Hi", id="j")
    sent.begin("j", "a", "b")
    assert sent.append("j", 2, b'"a"', b'"b"', b'"c"')[1] == 4
    assert texts(client) == ["a", "b", "c"]


def test_a_known_prefix_before_the_end_is_skipped(client: Client, sent: Hands) -> None:
    """The terminal event is written once, also when text and end come in one call that is retried."""
    client.submit("Hi", id="j")
    sent.begin("j", "a")
    assert sent.append("j", 2, b'"a"', b'"b"', DONE, ending=COMPLETED)[1] == 4
    assert [event.type for event in check_log(client, "j")] == ["started", "chunk", "chunk", "completed"]


def test_an_end_alone_is_a_log(client: Client, sent: Hands) -> None:
    """A call may carry nothing but the terminal event; the shortest log has one event."""
    client.submit("Hi", id="j")
    sent.claim("j")
    sent.append("j", 1, DONE, ending=COMPLETED)
    (end,) = check_log(client, "j")
    assert end == Completed(seq=1, attempt=1, at=end.at, finish_reasons={0: "stop"})


def test_after_the_end_the_writer_hears_duplicate_and_others_closed(client: Client, hands: Hands) -> None:
    """A retry of what was written is known; anything new comes too late."""
    client.submit("Hi", id="j")
    hands.begin("j", "a")
    assert hands.append("j", 3, DONE, ending=COMPLETED) == ("ok", 3)
    written = hands.everything()
    assert hands.append("j", 3, DONE, ending=COMPLETED) == ("duplicate", 3)
    assert hands.append("j", 2, b'"a"') == ("duplicate", 3)
    assert hands.append("j", 4, b'"more"') == ("closed", 3)
    assert hands.append("j", 4) == ("closed", 3), "a heartbeat"
    assert hands.everything() == written


def test_after_a_cancel_the_worker_hears_closed(client: Client, sent: Hands) -> None:
    """Its next write or heartbeat; the terminal event it brings does not count: the first one wins."""
    client.submit("Hi", id="j")
    sent.begin("j", "a")
    assert client.cancel("j") == "cancelled"
    assert sent.append("j", 3) == ("closed", 3)
    assert sent.append("j", 3, b'"more"') == ("closed", 3)
    assert sent.append("j", 3, DONE, ending=COMPLETED) == ("closed", 3)
    assert check_log(client, "j")[-1].type == "cancelled"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_gap_is_refused(client: Client, sent: Hands, count: int) -> None:
    """The server lost what it had acknowledged: it says from where to send again. Heartbeats find out too."""
    client.submit("Hi", id="j")
    sent.begin("j", "a")
    written = sent.everything()
    assert sent.append("j", 4, *[b'"z"'] * count) == ("gap", 2)
    assert sent.everything() == written
    assert sent.append("j", 3, b'"b"', *[b'"z"'] * count)[1] == 3 + count


def fenced_by_a_newer_token(client: Client, hands: Hands) -> None:
    hands.begin("j", "a", lease=0.001)
    hands.let_lapse("j")
    assert hands.claim("j", "t2").attempt == 2


def fenced_by_a_newer_attempt(client: Client, hands: Hands) -> None:
    hands.begin("j", "a")
    assert hands.claim("j", nth=2).attempt == 2


def fenced_by_a_release(client: Client, hands: Hands) -> None:
    hands.begin("j", "a")
    assert hands.release("j") == "released"


def fenced_after_the_end(client: Client, hands: Hands) -> None:
    fenced_by_a_newer_token(client, hands)
    hands.append("j", 3, DONE, token="t2", attempt=2, ending=COMPLETED)


def fenced_before_the_claim(client: Client, hands: Hands) -> None:
    pass


@pytest.mark.parametrize(
    "stale",
    [fenced_by_a_newer_token, fenced_by_a_newer_attempt, fenced_by_a_release, fenced_after_the_end,
     fenced_before_the_claim],
    ids=lambda stale: stale.__name__,
)  # fmt: skip
def test_a_stale_writer_is_refused(client: Client, sent: Hands, stale: Any) -> None:
    """Whatever it brings: text, a heartbeat, an end, seqs that are known; nothing is written."""
    client.submit("Hi", id="j")
    stale(client, sent)
    seq = int(sent.state("j")["seq"])
    written = sent.everything()
    for first, events, ending in ((seq + 1, [b'"x"'], None), (seq + 1, [], None), (seq + 1, [DONE], COMPLETED),
                                  (1, [STARTED], None), (seq + 9, [b'"x"'], None)):  # fmt: skip
        assert sent.append("j", first, *events, ending=ending) == ("fenced", seq)
    assert sent.everything() == written


def test_a_job_nobody_knows_is_unknown(sent: Hands) -> None:
    """Its keys have expired or never were; none is made."""
    assert sent.append("nobody", 1, b'"x"') == ("unknown", 0)
    assert sent.append("nobody", 1) == ("unknown", 0)
    assert sent.append("nobody", 1, DONE, ending=COMPLETED) == ("unknown", 0)
    assert sent.everything() == {}


def test_a_heartbeat_renews_the_lease_and_writes_no_event(client: Client, sent: Hands) -> None:
    """The sweep looks after the new lease."""
    client.submit("Hi", id="j")
    sent.begin("j", "a", lease=0.001)
    assert sent.append("j", 3) == ("ok", 2)
    lease = int(sent.state("j")["lease"])
    assert lease > sent.now_ms() + 14_000
    assert client.redis.zscore(client.keys.open, "j") == lease
    assert len(read_log(client.redis, client.keys, "j")) == 2


def test_a_lease_from_before_the_clock_went_back_is_renewed(client: Client, sent: Hands) -> None:
    """It ends later than any lease of now could: left alone, it would outlive its holder by as much."""
    client.submit("Hi", id="j")
    sent.begin("j")
    ahead = sent.now_ms() + 3_600_000
    client.redis.hset(client.keys.state("j"), "lease", ahead)
    client.redis.zadd(client.keys.open, {"j": ahead})
    with sent.from_now() as after:
        assert sent.append("j", 2) == ("ok", 1)
    assert int(sent.state("j")["lease"]) in after(15_000)
    assert client.redis.zscore(client.keys.open, "j") == int(sent.state("j")["lease"])


def test_a_fresh_lease_is_not_renewed(client: Client, hands: Hands) -> None:
    """Two writes less on nearly every call; a lease still lives at least nine tenths of its time after a write."""
    client.submit("Hi", id="j")
    hands.begin("j")
    lease = hands.state("j")["lease"]
    hands.append("j", 2, b'"a"')
    assert hands.state("j")["lease"] == lease


def test_the_running_usage_is_kept(client: Client, sent: Hands) -> None:
    """For the status, and for the terminal event of a cancel."""
    client.submit("Hi", id="j")
    sent.begin("j")
    sent.append("j", 2, b'"a"', usage=b'{"total_tokens":7,"estimated":true}')
    assert client.status("j").usage == {"total_tokens": 7, "estimated": True}
    client.cancel("j")
    end = check_log(client, "j")[-1]
    assert getattr(end, "usage", None) == {"total_tokens": 7, "estimated": True}


def test_what_the_end_brings_is_kept_in_the_state(client: Client, sent: Hands) -> None:
    """Finish reasons, usage and error can be had without reading the log."""
    client.submit("Hi", id="j")
    sent.begin("j")
    end = compact("completed", finish_reasons={0: "stop", 1: "length"}, usage={"total_tokens": 3})
    ending = Ending("completed", b'{"0":"stop","1":"length"}')
    sent.append("j", 2, end, ending=ending, usage=b'{"total_tokens":3}')
    status = client.status("j")
    assert (status.status, status.finish_reasons, status.usage) == (
        "completed",
        {0: "stop", 1: "length"},
        {"total_tokens": 3},
    )
    assert status.error is None
    check_log(client, "j")


def test_one_call_carries_many_jobs(client: Client, sent: Hands) -> None:
    """Each with its own token, seqs, heartbeat or end, and an answer of its own in the same place."""
    ids = [job.id for job in client.submit_many([{"prompt": "Hi", "id": f"j{i}"} for i in range(6)])]
    for i, job_id in enumerate(ids):
        sent.claim(job_id, f"t{i}")
    frames = [
        Frame("j0", client.keys.written("j0"), holder("t0", 1), 1, [STARTED, b'"a"']),
        Frame("j1", client.keys.written("j1"), holder("t1", 1), 1),
        Frame("j2", client.keys.written("j2"), holder("stale", 1), 1, [STARTED]),
        Frame("nobody", client.keys.written("nobody"), holder("t", 1), 1, [STARTED]),
        Frame("j3", client.keys.written("j3"), holder("t3", 1), 2, [STARTED]),
        Frame("j4", client.keys.written("j4"), holder("t4", 1), 1, [DONE], b"", COMPLETED),
        Frame("j5", client.keys.written("j5"), holder("t5", 1), 1, [STARTED, b'"z"']),
    ]
    replies = sent.append_many(frames)
    again = "duplicate" if sent.twice else "ok"
    assert replies == [(again, 2), ("ok", 0), ("fenced", 0), ("unknown", 0), ("gap", 0), (again, 1), (again, 2)]
    assert (texts(client, "j0"), texts(client, "j5")) == (["a"], ["z"])
    check_log(client, "j4")


@pytest.mark.parametrize("broken", ["state", "log"])
def test_a_broken_key_fails_its_own_job_alone(client: Client, hands: Hands, broken: str) -> None:
    """WRONGTYPE in the middle of a call: that job gets the server's words, its neighbours are written."""
    for job_id in ("j0", "j1", "j2"):
        client.submit("Hi", id=job_id)
        hands.claim(job_id)
    key = getattr(client.keys, broken)("j1")
    client.redis.delete(key)
    client.redis.set(key, "not what it should be")
    frames = [
        Frame(job_id, client.keys.written(job_id), holder("t1", 1), 1, [STARTED, b'"a"'])
        for job_id in ("j0", "j1", "j2")
    ]
    replies = client.run(append(client.keys, 15.0, frames))
    assert [(code, seq) for code, seq, _ in replies] == [("ok", 2), ("error", 0), ("ok", 2)]
    assert "WRONGTYPE" in replies[1][2]
    assert texts(client, "j0") == texts(client, "j2") == ["a"]


HOSTILE = [
    "",
    "\0",
    '"',
    "\\",
    "\u2028",
    "👩‍👩‍👧",
    "%d%s%%",
    "]",
    '"},{"type":"completed"}',
    "\x1b[2J",
    '[0,1,"x"]',
    "\n\ndata: x",
    "x" * 60_000,
]


def test_any_text_arrives_as_it_was(client: Client, hands: Hands) -> None:
    """In the log and on the channel, for every form of a chunk; the script puts bytes together, it reads no JSON."""
    client.submit("Hi", id="j")
    hands.begin("j")
    sent = [(text, index, n) for text in HOSTILE for index, n in ((0, 1), (0, 2), (11, 345))]
    with client.redis.pubsub() as pubsub:
        pubsub.subscribe(client.keys.chunks("j"))
        assert pubsub.get_message(timeout=5.0) is not None
        hands.append("j", 2, *(compact_text(*each) for each in sent))
        heard = [pubsub.get_message(timeout=5.0) for _ in sent]
    from millstream.events import decode

    log = read_log(client.redis, client.keys, "j")[1:]
    assert [(e.content, e.index, e.n) for e in log if isinstance(e, Chunk)] == sent
    assert [decode(each["data"]) for each in heard if each] == log


def test_many_random_calls_with_lost_replies_leave_the_whole_text(
    client: Client, hands: Hands, say: Callable[[str], None], seed: int
) -> None:
    """Every call may be sent up to three times, and later ones may repeat earlier seqs: the log has each event once."""
    chance = random.Random(seed)
    client.submit("Hi", id="j")
    hands.begin("j")
    pieces = [f"{i} " for i in range(300)]
    at, calls = 0, 0
    while at < len(pieces):
        back = min(at, chance.choice([0, 0, 0, 1, 5]))
        upto = min(len(pieces), at + chance.randint(0 if back else 1, 6))
        events = [compact_text(piece) for piece in pieces[at - back : upto]]
        for _ in range(chance.choice([1, 1, 2, 3])):
            code, _ = hands.append("j", 2 + at - back, *events)
            assert code in ("ok", "duplicate"), f"seed {seed}"
            calls += 1
        at = upto
    hands.append("j", 2 + at, DONE, ending=COMPLETED)
    assert texts(client) == pieces, f"seed {seed}"
    check_log(client, "j")
    say(f"random appends: {calls} calls, seed {seed}")
