"""The outbox, case by case; what holds in every order of events is in test_worker_outbox_machine.py."""

from __future__ import annotations

import json
from typing import Final

import pytest

from millstream.calls import Ending
from millstream.events import compact
from worker.outbox import FULL, KEPT, MAX_FRAME, MAX_TEXT, Outbox

KEYS: Final = ("state", "log")
STARTED: Final = compact("started", worker="w")
DONE: Final = compact("completed", finish_reasons={0: "stop"})
COMPLETED: Final = Ending("completed", b'{"0":"stop"}')


@pytest.fixture
def stops() -> list[str]:
    return []


@pytest.fixture
def outbox(stops: list[str]) -> Outbox:
    return Outbox("job", KEYS, "token", 1, 0, stops.append)


def settled(outbox: Outbox) -> bool:
    """Whether `settled` would return now."""
    return outbox._settled.is_set()


def full(outbox: Outbox) -> bool:
    return outbox.full


def shown(outbox: Outbox) -> bool:
    return outbox.shown


def test_pieces_of_one_choice_merge_and_are_counted(outbox: Outbox) -> None:
    """What waits becomes one event with the number of its pieces; another choice begins another event."""
    for text in ("a", "b", "c"):
        outbox.text(0, text)
    outbox.text(1, "d")
    outbox.text(0, "e")
    assert outbox.freeze().events == [b'[0,3,"abc"]', b'[1,1,"d"]', b'"e"']


def test_what_comes_while_a_frame_is_out_forms_the_next_one(outbox: Outbox) -> None:
    """Text merged into a frame that is asked again would be answered `duplicate`, and lost."""
    outbox.text(0, "first")
    frame = outbox.freeze()
    outbox.text(0, "second")
    assert outbox.freeze() is frame
    assert (frame.first, frame.events) == (1, [b'"first"'])
    outbox.answered("duplicate", 1)
    assert (outbox.freeze().first, outbox.freeze().events) == (2, [b'"second"'])


def test_a_large_text_becomes_several_events_and_frames(outbox: Outbox) -> None:
    """No event over MAX_TEXT characters, no frame over MAX_FRAME bytes."""
    outbox.text(0, "x" * (10 * MAX_TEXT + 5))
    sizes = []
    while outbox.waiting:
        frame = outbox.freeze()
        sizes += [len(event) for event in frame.events]
        assert sum(map(len, frame.events)) <= MAX_FRAME
        outbox.answered("ok", frame.first + len(frame.events) - 1)
    assert len(sizes) == 11
    assert max(sizes) <= MAX_TEXT + 20


def test_pieces_that_merge_keep_within_one_event(outbox: Outbox) -> None:
    """Text that waits merges only as long as the event stays within MAX_TEXT characters."""
    for _ in range(3):
        outbox.text(0, "x" * (MAX_TEXT - 1))
    outbox.text(0, "y")
    assert list(map(len, outbox.freeze().events)) == [
        MAX_TEXT - 1 + 2,
        MAX_TEXT - 1 + 2,
        len(f'[0,2,"{"x" * MAX_TEXT}"]'),
    ]


def test_the_upstream_waits_while_too_much_does(outbox: Outbox) -> None:
    """Full at FULL characters; there is room again when a frame has been acknowledged."""
    while not full(outbox):
        outbox.text(0, "x" * 1000)
    assert FULL <= sum(map(len, outbox._waiting)) + outbox._length < FULL + 2 * MAX_TEXT
    while full(outbox):
        frame = outbox.freeze()
        outbox.answered("ok", frame.first + len(frame.events) - 1)
    assert outbox._room.is_set()
    assert outbox.waiting


@pytest.mark.parametrize("code", ["closed", "fenced", "unknown", "error"])
def test_a_refusal_stops_the_outbox_once(outbox: Outbox, stops: list[str], code: str) -> None:
    """It says so once, forgets what waited, and counts as settled: nothing more will be written."""
    outbox.text(0, "a")
    outbox.freeze()
    outbox.text(0, "b")
    outbox.answered(code, 0)
    assert (stops, outbox.stopped, outbox.waiting, outbox.ended) == ([code], code, False, False)
    assert settled(outbox)
    outbox.freeze()
    outbox.answered("closed", 0)
    assert stops == [code]


def test_settled_means_nothing_waits_and_nothing_is_out(outbox: Outbox) -> None:
    """A heartbeat on its way counts too: it must not overtake the claim of a new attempt."""
    assert settled(outbox)
    outbox.text(0, "a")
    assert not settled(outbox)
    outbox.freeze()
    assert not settled(outbox)
    outbox.answered("ok", 1)
    assert settled(outbox)
    heartbeat = outbox.freeze()
    assert (heartbeat.events, heartbeat.first, settled(outbox)) == ([], 2, False)
    outbox.answered("ok", 1)
    assert settled(outbox)


def test_a_seam_goes_with_the_text_it_stands_in(outbox: Outbox) -> None:
    """After a text that was dropped it would tell of an answer that nobody can read."""
    outbox.text(0, "a")
    outbox.event(compact("resumed"))
    outbox.event(compact("retrying", error={}, delay=2.0))
    outbox.drop_chunks()
    assert outbox.freeze().events == [compact("retrying", error={}, delay=2.0)]


def test_chunks_nobody_saw_may_be_dropped(outbox: Outbox) -> None:
    """Those of a request that broke; events of other kinds stay, and what is frozen stays too."""
    outbox.event(STARTED)
    outbox.text(0, "seen")
    frozen = outbox.freeze()
    outbox.text(0, "unseen")
    outbox.event(compact("chunk", index=0, n=1, delta={"reasoning": "unseen"}))
    outbox.event(compact("retrying", delay=2))
    outbox.text(1, "unseen")
    outbox.drop_chunks()
    assert frozen.events == [STARTED, b'"seen"']
    outbox.answered("ok", 2)
    assert outbox.freeze().events == [compact("retrying", delay=2)]


def test_shown_means_a_chunk_was_frozen(outbox: Outbox) -> None:
    """From then on a silent retry would rewrite what may have been seen."""
    outbox.event(STARTED)
    outbox.text(0, "a")
    assert not shown(outbox)
    outbox.drop_chunks()
    outbox.freeze()
    outbox.answered("ok", 1)
    assert not shown(outbox)
    outbox.event(compact("chunk", index=0, n=1, delta={"reasoning": "Hm"}))
    outbox.freeze()
    assert shown(outbox)
    outbox.answered("ok", 2)
    outbox.begin(2, 2)
    assert not shown(outbox)


def test_more_lost_than_is_kept_is_said(outbox: Outbox, stops: list[str]) -> None:
    """The server lost more of the end than the outbox has: the job ends as `log_lost`, after what is left."""
    for _ in range(3 * KEPT // MAX_TEXT):
        outbox.text(0, "x" * MAX_TEXT)
        frame = outbox.freeze()
        outbox.answered("ok", frame.first + len(frame.events) - 1)
    outbox.text(0, "after")
    outbox.freeze()
    outbox.answered("gap", 1)
    assert stops == ["log_lost"]
    last = outbox.freeze()
    assert last.first == 2
    assert [json.loads(event)["error"]["code"] for event in last.events] == ["log_lost"]
    assert last.ending is not None
    assert last.ending.status == "failed"
    outbox.answered("ok", 2)
    assert outbox.ended


@pytest.mark.parametrize("ends", ["log_lost", "completed"])
def test_nothing_follows_the_terminal_event(outbox: Outbox, ends: str) -> None:
    """A packet may arrive in the same turn of the loop, before its reading is stopped."""
    outbox.event(STARTED)
    outbox.text(0, "x")
    outbox.freeze()
    outbox.answered("ok", 2)
    if ends == "log_lost":
        for _ in range(6):  # more than is kept
            outbox.text(0, "y" * MAX_TEXT)
            outbox.answered("ok", outbox.freeze().first)
        outbox.text(0, "z")
        outbox.freeze()
        outbox.answered("gap", 0)
    else:
        outbox.finish(DONE, COMPLETED)
    outbox.text(0, "late packet")
    outbox.event(b'{"type":"retrying"}')
    frame = outbox.freeze()
    assert frame.ending is not None
    assert frame.ending.status == ("failed" if ends == "log_lost" else "completed")
    assert len(frame.events) == 1
    outbox.answered("ok", frame.first)
    assert outbox.ended
    assert not outbox.waiting


def test_what_was_sent_again_is_not_counted_twice(outbox: Outbox, stops: list[str]) -> None:
    """After a gap that could be filled, a deeper one that cannot is still told from it."""
    for _ in range(24):
        outbox.text(0, "x" * (KEPT // 8))  # so that 7 to 9 are kept
        outbox.freeze()
        outbox.answered("ok", outbox.seq + 1)
    outbox.freeze()
    outbox.answered("gap", 24 - 5)
    assert stops == []
    while outbox.waiting:
        frame = outbox.freeze()
        outbox.answered("ok", frame.first + len(frame.events) - 1)
    assert outbox.seq == 24
    outbox.freeze()
    outbox.answered("gap", 24 - 11)
    assert stops == ["log_lost"]


def test_a_new_attempt_sends_nothing_of_the_old_one_again(outbox: Outbox, stops: list[str]) -> None:
    """A gap below the claim of this attempt cannot be filled with events of the one before."""
    outbox.text(0, "old")
    outbox.freeze()
    outbox.answered("ok", 1)
    outbox.begin(2, 1)
    outbox.text(0, "new")
    outbox.freeze()
    outbox.answered("gap", 0)
    assert stops == ["log_lost"]


def test_running_usage_goes_with_the_next_frame_and_survives_a_gap(outbox: Outbox) -> None:
    """It is sent once, unless the server lost what it came with."""
    outbox.text(0, "a")
    outbox.freeze()
    outbox.answered("ok", 1)
    outbox.text(0, "b")
    outbox.usage = b'{"n":1}'
    assert outbox.freeze().usage == b'{"n":1}'
    outbox.answered("gap", 0)
    assert outbox.freeze().usage == b'{"n":1}'
    outbox.answered("ok", 2)
    assert outbox.freeze().usage == b""


def test_the_terminal_event_waits_for_all_before_it(outbox: Outbox) -> None:
    """The frame that closes the job is the last one, whatever had to be split before it."""
    outbox.text(0, "x" * (5 * MAX_TEXT))
    outbox.finish(DONE, COMPLETED)
    endings = []
    while outbox.waiting:
        frame = outbox.freeze()
        endings.append(frame.ending)
        outbox.answered("ok", frame.first + len(frame.events) - 1)
    assert endings[-1] == COMPLETED
    assert set(endings[:-1]) == {None}
    assert len(endings) > 1
    assert outbox.ended
