"""Where a consumer stands in a log: every decision, one by one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from millstream import Chunk, Completed, JobExpired, JobNotFound, LogRewound, ResultTimeout, Started
from millstream.events import AnyEvent, Unknown, compact_text, encode
from millstream.keys import Keys
from millstream.reading import LISTEN, PAGE, SILENCE, Following, Page, Reading, page
from millstream.testing import ManualClock

KEYS = Keys()
LOG: list[AnyEvent] = [
    Started(seq=1, attempt=1, at=1.0),
    Chunk(seq=2, attempt=1, at=2.0, delta={"content": "a"}),
    Chunk(seq=3, attempt=1, at=3.0, delta={"content": "b"}),
    Completed(seq=4, attempt=1, at=4.0),
]


def found(upto: int, after: int = 0) -> Page:
    """The page of a log that ends at `upto`, as it is read with the cursor at `after`."""
    return Page(LOG[max(0, after - 1) : upto], upto, closed=upto == len(LOG))


def message(event: AnyEvent | bytes, kind: str = "message", job_id: str = "j") -> dict[str, Any]:
    data = event if isinstance(event, bytes) else encode(event)  # type: ignore[arg-type]
    return {"type": kind, "channel": KEYS.chunks(job_id).encode(), "data": data}


def test_an_early_consumer_takes_events_as_they_come() -> None:
    """In order, one by one, up to the end."""
    reading = Reading("j")
    assert reading.read(found(0)) == []
    assert [reading.heard(event) for event in LOG] == [[event] for event in LOG]
    assert reading.ended


def test_a_late_consumer_reads_the_log() -> None:
    """All of it at once, and is done."""
    reading = Reading("j")
    assert reading.read(found(4)) == LOG
    assert reading.ended


def test_nothing_is_read_behind_the_end() -> None:
    """Whoever wrote there: a log ends with its terminal event."""
    reading = Reading("j")
    more = Chunk(seq=5, attempt=1, at=5.0, delta={"content": "late"})
    assert reading.read(Page([*LOG, more], 5, closed=True)) == LOG
    assert reading.ended


@pytest.mark.parametrize("after", range(5))
def test_a_consumer_goes_on_from_every_cursor(after: int) -> None:
    """It gets what lies above its cursor; at the end there is nothing, and it knows that it is done."""
    reading = Reading("j", after)
    assert reading.read(found(4, after)) == LOG[after:]
    assert reading.ended


@pytest.mark.parametrize("after", [-1, -100])
def test_a_cursor_below_the_start_is_the_start(after: int) -> None:
    """There is no event 0 or -1 to miss."""
    assert Reading("j", after).read(found(4)) == LOG


def test_what_was_read_is_not_taken_again_from_the_channel() -> None:
    """Between the subscription and the reading of the log both may bring the same event."""
    reading = Reading("j")
    reading.read(found(3))
    assert [reading.heard(event) for event in LOG[:3]] == [[], [], []]
    assert reading.heard(LOG[3]) == [LOG[3]]


def test_nothing_is_taken_after_the_end() -> None:
    """Whatever is published then."""
    reading = Reading("j")
    reading.read(found(4))
    assert reading.heard(Chunk(seq=5, attempt=1, at=5.0, delta={})) == []


def test_a_gap_on_the_channel_is_filled_from_the_log() -> None:
    """An event above the next one means that one was lost: nothing is taken until the log was read."""
    reading = Reading("j")
    reading.read(found(1))
    assert reading.heard(LOG[2]) is None
    assert reading.cursor == 1
    assert reading.read(found(3, 1)) == LOG[1:3]


def test_a_job_that_was_never_there_is_not_found() -> None:
    """No state, and none was seen before."""
    with pytest.raises(JobNotFound):
        Reading("j").read(Page([], None))


def test_a_job_that_went_away_has_expired() -> None:
    """No state now, but there was one."""
    reading = Reading("j")
    reading.read(found(1))
    with pytest.raises(JobExpired):
        reading.read(Page([], None))


@pytest.mark.parametrize("events", [[], LOG[:2], LOG[2:]], ids=["gone", "short", "headless"])
def test_a_log_shorter_than_its_last_seq_has_expired(events: list[AnyEvent]) -> None:
    """The reader says that events are missing instead of skipping them."""
    with pytest.raises(JobExpired):
        Reading("j").read(Page(events, 4, closed=True))


def test_a_cursor_beyond_the_log_means_that_the_server_lost_events() -> None:
    """Also for a reading that brings its cursor from elsewhere."""
    with pytest.raises(LogRewound):
        Reading("j", after=9).read(found(4, 4))
    reading = Reading("j")
    reading.read(found(3))
    with pytest.raises(LogRewound):
        reading.read(found(2, 3))


def rewritten() -> list[AnyEvent]:
    return [*LOG[:2], Started(seq=3, attempt=2, at=9.0), Chunk(seq=4, attempt=2, at=9.0, delta={"content": "z"})]


def test_a_newer_attempt_at_the_cursor_means_that_the_log_was_written_anew() -> None:
    """The log is longer than what was seen, but it is another story from event 3 on."""
    reading = Reading("j")
    reading.read(found(3))
    with pytest.raises(LogRewound):
        reading.read(Page(rewritten()[2:], 4))


def test_a_newer_attempt_below_the_cursor_means_that_the_log_was_written_anew() -> None:
    """The same, heard on the channel: the log is read and decides, since anybody may publish."""
    reading = Reading("j")
    reading.read(found(3))
    assert reading.heard(rewritten()[2]) is None
    with pytest.raises(LogRewound):
        reading.read(Page(rewritten()[2:], 4))


def test_the_mark_tells_an_attempt_from_another_of_its_number() -> None:
    """The server lost attempt 1 with its claim; the next attempt 1 is longer than what was seen, and another story."""

    def begun(mark: str | None, seq: int = 1) -> Started:
        return Started(seq=seq, attempt=1, at=1.0, mark=mark)

    def text(seq: int) -> Chunk:
        return Chunk(seq=seq, attempt=1, at=1.0, delta={"content": "z"})

    found: list[tuple[list[AnyEvent], bool]] = [
        ([begun("a"), text(2)], True),
        ([begun("b"), text(2)], False),
        ([begun(None), text(2)], False),
        ([text(1), begun("a", 2)], False),  # it began later
        ([text(2)], True),  # it begins too late to tell; the gap does
        ([], True),
    ]
    for there, same in found:
        reading = Reading("j")
        reading.read(Page([begun("a"), text(2)], 2))
        assert reading.begun == 1
        page = Page([text(2), text(3), text(4)], 4, begun=there)
        if same:
            assert [event.seq for event in reading.read(page)] == [3, 4]
        else:
            with pytest.raises(LogRewound, match="was written anew"):
                reading.read(page)
    live = Reading("j")
    live.read(Page([begun("a"), text(2)], 2))
    assert live.heard(begun("b")) is None, "the log must be read"
    assert live.heard(begun("a")) == []


@pytest.mark.parametrize(
    "other", [Chunk(seq=3, attempt=1, at=3.0, delta={"content": "z"}), Completed(seq=3, attempt=1, at=3.0)]
)
def test_another_event_at_the_cursor_means_that_the_log_was_written_anew(other: AnyEvent) -> None:
    """Also of the same attempt: its claim was lost with it, or the job ended where the lost event had been."""
    reading = Reading("j")
    reading.read(found(3))
    assert reading.heard(other) is None
    with pytest.raises(LogRewound):
        reading.read(Page([other], 3, closed=other.terminal))


@pytest.mark.parametrize("after", [0, 3])
def test_an_end_below_the_cursor_means_that_the_log_was_written_anew(after: int) -> None:
    """A reader that has not ended has seen no end: the log is read, and ends before its cursor."""
    reading = Reading("j", after)
    if not after:
        reading.read(found(3))
    assert reading.heard(Completed(seq=2, attempt=1, at=9.0)) is None
    with pytest.raises(LogRewound):
        reading.read(Page([], 2, closed=True))


def test_the_same_event_at_another_time_is_the_same() -> None:
    """Repacking rounds times, and a worker sends again what the server lost."""
    reading = Reading("j")
    reading.read(found(3))
    again = msgspec.structs.replace(LOG[2], at=9.0)
    assert reading.heard(again) == []
    assert reading.read(Page([again, LOG[3]], 4, closed=True)) == [LOG[3]]


def test_an_event_of_an_unknown_type_counts_and_is_not_shown() -> None:
    """Its seq is taken, so there is no gap after it."""
    odd = Unknown(seq=2, attempt=1, at=2.0, type="later")
    reading = Reading("j")
    assert reading.heard(LOG[0]) == [LOG[0]]
    assert reading.heard(odd) == []
    assert reading.heard(LOG[2]) == [LOG[2]]
    late = Reading("j")
    assert late.read(Page([LOG[0], odd, *LOG[2:]], 4, closed=True)) == [LOG[0], *LOG[2:]]
    assert late.ended


def test_a_full_page_is_not_the_last() -> None:
    """A log of more packs than a page holds is read on; one entry less and it is known to be the end."""
    entries = [
        (b"%d-0" % (i + 1), {b"a": b"1", b"t": b"0", b"e": b"[" + compact_text("x") + b"]"}) for i in range(PAGE)
    ]
    assert not page(entries, [b"999", b"in_progress"]).last
    assert page(entries[:-1], [b"999", b"in_progress"]).last


@pytest.mark.parametrize(
    ("state", "seq", "closed"),
    [([None, None], None, False), ([b"7", b"queued"], 7, False), ([b"7", b"in_progress"], 7, False),
     ([b"7", b"completed"], 7, True), ([b"7", b"cancelled"], 7, True)],
)  # fmt: skip
def test_a_page_knows_its_state(state: list[bytes | None], seq: int | None, closed: bool) -> None:
    """The last seq and whether it is the end, as read in the same transaction."""
    made = page([], state)
    assert (made.seq, made.closed) == (seq, closed)


# Several readings behind one subscription -------------------------------------------------------------------------


def following(*job_ids: str, upto: int = 0, clock: ManualClock | None = None) -> Following:
    made = Following(job_ids or ("j",), clock=clock or ManualClock())
    for reading in made.due():
        made.read(reading, found(upto))
    return made


def test_a_new_reading_is_due_and_then_listens() -> None:
    """Each log is read once before anything is taken from the channel."""
    made = Following(["a", "b", "a"], clock=ManualClock())
    assert [reading.job_id for reading in made.due()] == ["a", "b"]
    made.read(made.due()[0], found(1))
    assert [reading.job_id for reading in made.due()] == ["b"]


def test_a_reading_with_more_pages_stays_due() -> None:
    """Until its last page."""
    made = Following(["j"], clock=ManualClock())
    made.read(made.due()[0], Page(LOG[:2], 4, last=False, closed=True))
    assert made.due()
    made.read(made.due()[0], found(4, 2))
    assert not made.open


def test_silence_makes_a_job_due() -> None:
    """15 s without a message of a job: its terminal event may be the one that was lost."""
    clock = ManualClock()
    made = following("a", "b", clock=clock)
    clock.advance(SILENCE / 2)
    made.take(message(LOG[0], job_id="a"), KEYS.job_of)
    clock.advance(SILENCE / 2)
    assert [reading.job_id for reading in made.due()] == ["b"], "a was heard of meanwhile"
    clock.advance(SILENCE / 2)
    assert [reading.job_id for reading in made.due()] == ["a", "b"]


def test_a_gap_makes_only_its_job_due() -> None:
    """Nothing is delivered from above a gap."""
    made = following("a", "b", upto=1)
    assert made.take(message(LOG[2], job_id="b"), KEYS.job_of) == []
    assert [reading.job_id for reading in made.due()] == ["b"]
    assert made.read(made.due()[0], found(3, 1)) == [("b", LOG[1]), ("b", LOG[2])]


def test_a_renewed_subscription_makes_its_job_due() -> None:
    """redis-py reconnects by itself; the second acknowledgement is the only sign that messages may be lost."""
    made = following("a", "b")
    made.take(message(b"", kind="subscribe", job_id="a"), KEYS.job_of)
    assert [reading.job_id for reading in made.due()] == ["a"]
    made.reconnected()
    assert [reading.job_id for reading in made.due()] == ["a", "b"]


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\xff", b"[]", b'{"seq":1}', b'{"a":' * 100_000], ids=repr)
def test_nonsense_on_the_channel_makes_the_log_due(data: bytes) -> None:
    """Anybody may publish; the log is the truth."""
    made = following()
    assert made.take(message(data), KEYS.job_of) == []
    assert made.due()


@pytest.mark.parametrize("kind", ["unsubscribe", "psubscribe", "pmessage"])
def test_other_replies_are_nothing(kind: str) -> None:
    """They bring no event and no doubt."""
    made = following()
    assert made.take(message(LOG[0], kind=kind), KEYS.job_of) == []
    assert made.take(None, KEYS.job_of) == []
    assert not made.due()


def test_a_job_that_ended_is_not_followed_any_more() -> None:
    """The others go on; a late copy of its messages changes nothing."""
    made = following("a", "b", upto=3)
    assert made.take(message(LOG[3], job_id="a"), KEYS.job_of) == [("a", LOG[3])]
    assert made.open == ["b"]
    assert made.take(message(LOG[3], job_id="a"), KEYS.job_of) == []
    made.reconnected("a")
    assert made.due() == []


def test_listening_lasts_until_a_log_is_due() -> None:
    """At most `longest`, never 0 (which would be a busy loop), and not past the caller's own time."""
    clock = ManualClock()
    made = following(clock=clock)
    assert made.patience(LISTEN, None) == LISTEN
    assert made.patience(LISTEN, clock() + 0.5) == 0.5
    clock.advance(SILENCE - 0.25)
    assert made.patience(LISTEN, None) == 0.25
    clock.advance(0.25)
    assert 0 < made.patience(LISTEN, None) <= 0.001


def test_a_caller_whose_time_is_over_hears_how_long_it_was() -> None:
    """A TimeoutError that names the job; the job goes on."""
    clock = ManualClock()
    made = following(clock=clock)
    until = clock() + 2.0
    clock.advance(2.0)
    with pytest.raises(ResultTimeout, match="'j' has not ended within 2 s"):
        made.patience(LISTEN, until)


def test_news_after_silence_mean_that_the_subscription_is_deaf() -> None:
    """A half-open connection says nothing for ever: it is given up when the log knows more; a quiet job is no sign."""
    clock = ManualClock()
    made = Following(["j"], clock=clock)
    looks = []
    for upto, silence in ((1, 0.0), (1, SILENCE), (2, SILENCE)):  # the first look is always news
        clock.advance(silence)
        made.read(made.due()[0], Page(LOG[:upto], upto))
        looks.append(made.deaf)
    assert looks == [False, False, True]
    made.reconnected()
    looks.append(made.deaf)
    made.read(made.due()[0], Page(LOG[:3], 3))  # and so is what came during a reconnect
    assert [*looks, made.deaf] == [False, False, True, False, False]
