"""The writer and its outboxes: what goes into a call and when, and that nothing is lost or doubled whatever fails."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.calls import Ending
from millstream.events import compact, compact_text
from tests.unit.writer_desk import Desk, Line, flown, leaping, text_of, turns
from worker.outbox import KEPT, KEPT_SLACK, MAX_FRAME, Outbox
from worker.writer import HEARTBEAT, MAX_CALL, MAX_JOBS, MAX_PAUSE

BEAT: Final = 0.5
"""Seconds within which every job is carried: the guarantee behind cancelling within a second."""


# When a call goes out ----------------------------------------------------------------------------------------------


@flown
async def test_an_idle_line_sends_at_once() -> None:
    """The first chunk is in a call before any time has passed."""
    line = Line()
    async with Desk(line) as desk:
        outbox = desk.outbox("j")
        desk.say(outbox, "Hi")
        await turns()
        assert [part.events for part in line.calls[0]] == [(b'"Hi"',)]
        assert line.times == [0.0]
        await outbox.settled()


@flown
async def test_while_a_call_is_in_flight_everything_merges() -> None:
    """Three pieces of one job become one event that says so, and one call carries many jobs."""
    line = Line(held=True)
    async with Desk(line) as desk:
        outboxes = [desk.outbox(f"j{number}") for number in range(40)]
        desk.say(outboxes[0], "first")
        await turns()
        for outbox in outboxes:
            for piece in ("a", "b", "c"):
                desk.say(outbox, piece)
        assert len(line.calls) == 1
        await line.answer()
        assert [part.job_id for part in line.calls[1]] == [outbox.job_id for outbox in outboxes]
        assert {part.events for part in line.calls[1]} == {(b'[0,3,"abc"]',)}
        assert line.calls[1][0].first == 2
        await line.answer()


@flown
async def test_few_streams_never_wait() -> None:
    """At 20 messages a second no pause builds up: each goes out in the very moment it comes."""
    line = Line()
    async with Desk(line) as desk:
        outbox = desk.outbox("j")
        said = []
        for _ in range(100):
            await asyncio.sleep(0.05)
            said.append(asyncio.get_running_loop().time())
            desk.say(outbox, "x")
        await outbox.settled()
        assert line.times == said


@flown
async def test_the_pause_grows_with_the_rate() -> None:
    """More streams of 50 chunks a second: longer pauses between calls, from 0 up to 5 ms, and fewer calls per chunk."""
    pauses: list[float] = []
    for streams in (2, 20, 60, 200):
        line = Line()
        async with Desk(line) as desk:
            outboxes = [desk.outbox(f"j{number}") for number in range(streams)]
            for _ in range(50):
                for outbox in outboxes:
                    await asyncio.sleep(0.02 / streams)
                    desk.say(outbox, "x")
            ends = line.times[len(line.times) // 2 :]
            pauses.append(min(later - sooner for sooner, later in itertools.pairwise(ends)))
    arrivals = [0.02 / streams for streams in (2, 20, 60, 200)]
    assert pauses[0] == pytest.approx(arrivals[0]), "two streams do not wait for anything but their own chunks"
    assert arrivals[1] < pauses[1] < pauses[2] <= MAX_PAUSE + arrivals[2]
    assert pauses[3] == pytest.approx(MAX_PAUSE, abs=arrivals[3] + 1e-6)


@flown
async def test_flush_sets_the_pause() -> None:
    """MILLSTREAM_FLUSH_MS is the least time between two calls, the calls themselves included; 0 means none."""
    for flush in (0.0, 0.03):
        line = Line(takes=0.01)
        async with Desk(line, flush) as desk:
            outbox = desk.outbox("j")
            for _ in range(200):
                desk.say(outbox, "x")
                await asyncio.sleep(0.001)
            gaps = [later - sooner for sooner, later in itertools.pairwise(line.times)]
            assert all(gap == pytest.approx(max(flush, 0.01), abs=0.0011) for gap in gaps)
            assert min(gaps) >= max(flush, 0.01) - 1e-9
            await outbox.settled()


# Fairness and bounds -----------------------------------------------------------------------------------------------


@flown
async def test_a_long_answer_does_not_hold_up_its_siblings() -> None:
    """A job with megabytes waiting takes 64 KB of each call; a sibling's chunk is in the very next one."""
    line = Line(held=True)
    async with Desk(line) as desk:
        long, sibling = desk.outbox("long"), desk.outbox("sibling")
        for _ in range(300):
            desk.say(long, "x" * 10_000)
        await turns()
        for number in range(5):
            desk.say(sibling, f"word {number}")
            await line.answer()
            parts = {part.job_id: part for part in line.calls[-1]}
            assert text_of(parts["sibling"].events) == f"word {number}"
            assert MAX_FRAME - 17_000 < parts["long"].size <= MAX_FRAME
        line.held = False
        await line.answer()
        await long.settled()
        assert text_of(line.logs["long"]) == "x" * 3_000_000


@flown
async def test_a_call_is_bounded_in_bytes_and_jobs_and_takes_turns() -> None:
    """At most 64 KB a job, 256 KB and 256 jobs a call; who was left out comes first in the next."""
    line = Line(held=True)
    async with Desk(line) as desk:
        heavy = [desk.outbox(f"heavy{number}") for number in range(7)]
        desk.say(heavy[0], "go")
        await turns()
        for outbox in heavy:
            for _ in range(40):
                desk.say(outbox, "y" * 9_999)
        for _ in range(8):
            await line.answer()
        order = [part.job_id for parts in line.calls[1:] for part in parts]
        assert order == [heavy[number % 7].job_id for number in range(len(order))]
        for outbox in heavy:
            desk.writer.remove(outbox)
        light = [desk.outbox(f"light{number}") for number in range(600)]
        for outbox in light:
            desk.say(outbox, "z")
        for _ in range(4):
            await line.answer()
        sizes = [len(parts) for parts in line.calls if parts[0].job_id.startswith("light")]
        assert sizes == [MAX_JOBS, MAX_JOBS, 600 - 2 * MAX_JOBS]
        for parts in line.calls:
            assert all(part.size <= MAX_FRAME for part in parts)
            assert sum(part.size for part in parts) <= MAX_CALL
            assert len(parts) <= MAX_JOBS


# Heartbeats --------------------------------------------------------------------------------------------------------


def longest_silences(line: Line, jobs: Sequence[Outbox], until: float) -> list[float]:
    """For each job, the longest time without a call that carries it."""
    carried: dict[str, list[float]] = {job.job_id: [0.0] for job in jobs}
    for at, parts in zip(line.times, line.calls, strict=True):
        for part in parts:
            if part.job_id in carried:
                carried[part.job_id].append(at)
    return [max(b - a for a, b in itertools.pairwise([*times, until])) for times in carried.values()]


@flown
async def test_idle_jobs_are_carried_every_half_second() -> None:
    """600 silent jobs: each is in a call at least every 0.5 s, without events, from its very beginning."""
    line = Line(takes=0.002)
    async with Desk(line) as desk:
        idle = [desk.outbox(f"idle{number}") for number in range(600)]
        await asyncio.sleep(10)
        assert max(longest_silences(line, idle, 10.0)) <= BEAT
        assert all(part.events == () and part.kind == "" for parts in line.calls for part in parts)
        assert len(line.calls) < 10 / HEARTBEAT * 5, "beats come together, not one by one"


@flown
async def test_idle_jobs_are_carried_beside_as_many_busy_ones_as_fit() -> None:
    """When every call is full of other jobs' chunks, the silent ones still get theirs every 0.5 s."""
    line = Line(takes=0.005)
    async with Desk(line) as desk:
        idle = [desk.outbox(f"idle{number}") for number in range(100)]
        busy = [desk.outbox(f"busy{number}") for number in range(3 * MAX_JOBS)]
        for _ in range(200):
            for outbox in busy:
                desk.say(outbox, "x")
            await asyncio.sleep(0.01)
        assert sum(len(parts) == MAX_JOBS for parts in line.calls) > 0.9 * len(line.calls), "the calls were full"
        assert max(longest_silences(line, idle, 2.0)) <= BEAT
        assert max(longest_silences(line, busy, 2.0)) <= BEAT
        assert all(len(parts) <= MAX_JOBS for parts in line.calls)


@flown
async def test_ended_and_stopped_jobs_have_no_heartbeat() -> None:
    """Nothing is written for a job that has its end, or that belongs to somebody else."""
    line = Line()
    async with Desk(line) as desk:
        ended, stopped, living = (desk.outbox(name) for name in ("ended", "stopped", "living"))
        ended.finish(compact("completed", finish_reasons={}), Ending("completed"))
        desk.writer.notify(ended)
        line.replies["stopped"] = ("fenced", 0, "")
        desk.say(stopped, "too late")
        await turns()
        assert desk.stops == [("stopped", "fenced")]
        assert (ended.ended, stopped.stopped) == (True, "fenced")
        before = len(line.calls)
        await asyncio.sleep(5)
        assert {part.job_id for parts in line.calls[before:] for part in parts} == {living.job_id}
        assert len(line.calls) - before >= 5 / BEAT


# Failures ----------------------------------------------------------------------------------------------------------


@flown
async def test_a_frozen_frame_is_sent_again_unchanged() -> None:
    """However often the line fails and whatever comes meanwhile, the retry is the same call; the rest comes after."""
    line = Line(failures=[True, False, True, True, False])
    async with Desk(line) as desk:
        outbox = desk.outbox("j")
        desk.say(outbox, "frozen")
        for number in range(30):
            await asyncio.sleep(0.05)
            desk.say(outbox, f" {number}")
        await outbox.settled()
        assert len({tuple(part.events for part in parts) for parts in line.calls[:6]}) == 1
        assert line.calls[0][0].events == (b'"frozen"',)
        assert text_of(line.logs["j"]) == "frozen" + "".join(f" {number}" for number in range(30))


WORDS = st.lists(
    st.tuples(st.integers(0, 3), st.text(max_size=20) | st.just("long " * 8_000), st.sampled_from([0, 0.001, 0.2])),
    max_size=25,
)


def test_no_text_is_lost_and_none_doubled(say: Callable[[str], None]) -> None:
    """Any text, at any time, over a line that fails in any order, with the call taken or not: each log is the text."""
    trials = 0

    @settings(max_examples=500, deadline=None)
    @given(words=WORDS, failures=st.lists(st.booleans(), max_size=8), takes=st.sampled_from([0.0, 0.003, 0.3]))
    def trial(words: list[tuple[int, str, float]], failures: list[bool], takes: float) -> None:
        nonlocal trials
        trials += 1
        leaping(carry(words, Line(takes=takes, failures=failures)))

    trial()
    say(f"{trials} trials of texts over a failing line")


async def carry(words: Sequence[tuple[int, str, float]], line: Line) -> None:
    async with Desk(line) as desk:
        outboxes = [desk.outbox(f"j{number}") for number in range(4)]
        for job, text, pause in words:
            desk.say(outboxes[job], text)
            await asyncio.sleep(pause)
        for outbox in outboxes:
            outbox.finish(compact("completed", finish_reasons={}), Ending("completed"))
            desk.writer.notify(outbox)
            await outbox.settled()
    for job, outbox in enumerate(outboxes):
        *chunks, end = line.logs[outbox.job_id]
        assert text_of(chunks) == "".join(text for asked, text, _ in words if asked == job)
        assert end == compact("completed", finish_reasons={})
        assert (outbox.ended, outbox.seq) == (True, len(chunks) + 1)
    for number in line.failed:
        assert line.calls[number + 1] == line.calls[number], "what failed comes again before anything else"


@flown
async def test_after_a_gap_the_same_events_come_again_with_the_same_seqs() -> None:
    """The server lost events it had acknowledged: it gets them again, byte for byte, and then what it refused."""
    line = Line()
    async with Desk(line) as desk:
        outbox = desk.outbox("j")
        for number in range(20):
            desk.say(outbox, f"word {number} ")
            await outbox.settled()
        whole = list(line.logs["j"])
        for lost in (1, 7, 20):
            del line.logs["j"][-lost:]
            outbox.usage = b'{"completion_tokens":%d}' % lost
            desk.say(outbox, f"after {lost} ")
            whole.append(compact_text(f"after {lost} "))
            await outbox.settled()
            assert line.logs["j"] == whole
            again = line.calls[-1][0]
            assert again.seqs == range(len(whole) - lost, len(whole) + 1)
            assert again.extras == (b'{"completion_tokens":%d}' % lost,), "the usage is not lost with the frame"
        assert desk.stops == []


@flown
async def test_a_gap_is_mended_for_an_outbox_that_is_carried_no_more() -> None:
    """A relay that begins a new attempt waits for silence: what the server lost meanwhile must be written first."""
    line = Line()
    async with Desk(line) as desk:
        outbox = desk.outbox("j")
        for word in ("one ", "two "):
            desk.say(outbox, word)
            await outbox.settled()
        whole = list(line.logs["j"])
        line.held = True
        desk.writer.notify(outbox)  # a heartbeat
        await turns()
        desk.writer.remove(outbox)
        del line.logs["j"][-1:]
        line.held = False
        await line.answer()
        await outbox.settled()
        assert line.logs["j"] == whole


@flown
async def test_a_loss_beyond_what_is_kept_ends_the_job_as_log_lost() -> None:
    """More than what is kept is gone: the job fails, says so in the log that is there, and its relay is told."""
    line = Line()
    async with Desk(line) as desk:
        outbox = desk.outbox("j")
        for number in range(10):
            desk.say(outbox, str(number) * 10_000)
            await outbox.settled()
        del line.logs["j"][-((KEPT + KEPT_SLACK) // 10_002) - 1 :]
        left = list(line.logs["j"])
        desk.say(outbox, "never written")
        await outbox.settled()
        assert desk.stops == [("j", "log_lost")]
        *kept, end = line.logs["j"]
        assert kept == left
        assert msgspec.json.decode(end)["error"]["code"] == "log_lost"
        assert line.calls[-1][0].extras[1] == "failed"
        assert outbox.ended


@flown
async def test_settled_waits_for_the_heartbeat_in_flight() -> None:
    """A new attempt must not begin beside a heartbeat of the old one, which would be answered `fenced`."""
    line = Line(held=True)
    async with Desk(line) as desk:
        outbox = desk.outbox("j")
        released = await line.waiting.get()
        assert line.calls[-1][0].events == ()
        settled = asyncio.create_task(outbox.settled())
        await turns()
        assert not settled.done()
        released.set_result(None)
        await settled


@flown
async def test_a_full_outbox_makes_room_as_it_is_written() -> None:
    """256 KB wait while Redis is away: the reader is held; it goes on once a call is through."""
    line = Line(held=True)
    async with Desk(line) as desk:
        outbox = desk.outbox("j")
        while not outbox.full:
            desk.say(outbox, "x" * 8_000)
        room = asyncio.create_task(outbox.room())
        await turns()
        assert not room.done()
        await line.answer()
        await room
        line.held = False
        await line.answer()
        await outbox.settled()
