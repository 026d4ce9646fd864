"""What must hold after a schedule. The oracle of all suites, and what only somebody can know who saw everything."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

from millstream.events import AnyEvent, Failed, Started
from tests.oracle import answers, check_at_rest, check_consumers, check_log, timeless

from .loop import EPOCH
from .people import Heard
from .schedule import Schedule
from .server import clock
from .upstream import Request
from .weather import DEADLY

PROMPT = 1.0
"""Virtual seconds after an event's writing within which a consumer with a good connection has it."""

CLOSED = 1.0
"""Virtual seconds within which a worker closes the stream of a job that was ended or taken."""

_PIECE = re.compile(r"([A-Za-z0-9]+)/(\d+)/(\d+);")
_ENDS = {"stop": "completed", "length": "incomplete"}
_CODES = frozenset({
    "attempts_exhausted", "expired", "http_503", "http_429", "invalid_request_error", "stream_broken",
    "stream_truncated", "first_token_timeout", "idle_timeout", "total_timeout",
})  # fmt: skip


def judge(schedule: Schedule) -> int:
    """Add what is wrong to the schedule's complaints; the number of events that were compared."""
    with clock(schedule.loop.wall):
        return _judge(schedule)


def _judge(schedule: Schedule) -> int:
    checked = 0
    for job in schedule.weather.jobs:
        _noting(schedule, job.job_id, lambda job_id=job.job_id: _check_job(schedule, job_id))  # type: ignore[misc]
        checked += sum(len(each.events) for each in schedule.people.heard if each.job_id == job.job_id)
    _noting(schedule, "at rest", lambda: check_at_rest(schedule.client))
    _noting(schedule, "upstream", lambda: _check_upstream(schedule))
    return checked


def _noting(schedule: Schedule, what: str, check: Callable[[], object]) -> None:
    try:
        check()
    except Exception as error:  # noqa: BLE001 - a broken state must not keep the others from being looked at
        schedule.complain(f"{what}: {type(error).__name__}: {error}")


def _check_job(schedule: Schedule, job_id: str) -> None:
    assert job_id in schedule.people.accepted, f"{job_id}: never accepted"
    if not schedule.client.redis.exists(schedule.keys.state(job_id)):
        _check_missing(schedule, job_id)
        return
    log = check_log(schedule.client, job_id)
    end = log[-1]
    for attempt, texts in answers(log).items():
        worker = next(each.worker for each in log if isinstance(each, Started) and each.attempt == attempt)
        last = _check_text(schedule, job_id, worker, texts)
        if attempt == end.attempt and end.type in ("completed", "incomplete"):
            assert last is not None, f"{job_id}: {end.type} without an answer"
            assert last.sent == last.pieces, f"{job_id}: {end.type}, but {last}"
            assert last.finished, f"{job_id}: {end.type}, but {last}"
            assert _ENDS[last.ending] == end.type, f"{job_id}: {end.type}, but the answer ended by {last.ending}"
    _check_end(schedule, job_id, end)
    _check_consumers(schedule, job_id, log)
    if schedule.weather.harmless:
        lost = [each.seq for each in log if isinstance(each, Started) and each.reason == "worker_lost"]
        assert not lost, f"{job_id}: nothing was lost, and {lost} say that a worker was"


def _check_missing(schedule: Schedule, job_id: str) -> None:
    if job_id in schedule.fate.forgotten:
        return
    lost = schedule.fate.before_loss is not None and schedule.fate.lost_since <= schedule.people.accepted[job_id]
    assert lost, f"{job_id}: accepted at {schedule.people.accepted[job_id]:.3f}, and gone"


def _check_text(schedule: Schedule, job_id: str, worker: str, texts: Sequence[str]) -> Request | None:
    """Each stretch is the beginning of one answer, whole pieces in order; the last one's request."""
    before, request = "", None
    for number, text in enumerate(texts):
        if not text:  # an answer of no piece at all, or none yet
            empty = (each for each in reversed(schedule.model.of(job_id)) if each.finished and not each.pieces)
            request = next((each for each in empty if (str(each.asker), each.prefix) == (worker, before)), None)
        pieces = [(job, int(request), int(place)) for job, request, place in _PIECE.findall(text)]
        assert "".join(f"{job}/{request}/{place};" for job, request, place in pieces) == text, f"{job_id}: {text[:300]}"
        if pieces:
            known = schedule.model.of(job_id)
            request = known[pieces[0][1]]
            assert text == request.text(len(pieces)), f"{job_id}: not the beginning of one answer: {text[:300]}"
            assert len(pieces) <= request.sent, f"{job_id}: {len(pieces)} pieces of {request}"
            assert str(request.asker) == worker, f"{job_id}: {request} was asked by another than {worker}"
            assert request.prefix == before, f"{job_id}: went on from {request.prefix!r}, shown was {before!r}"
            whole = number == len(texts) - 1 or len(pieces) == request.sent
            assert whole, f"{job_id}: a seam after {len(pieces)} of {request}"
        before += text
    return request


def _check_end(schedule: Schedule, job_id: str, end: AnyEvent) -> None:
    lossy = schedule.fate.before_loss is not None
    if isinstance(end, Failed):
        code = end.error["code"]
        allowed = _CODES | ({"log_lost"} if lossy else set())
        assert code in allowed, f"{job_id}: failed with {code}"
    asked = job_id in schedule.people.cancels or job_id in schedule.fate.stopped_by_rq
    if end.type == "cancelled":
        assert asked, f"{job_id}: cancelled by nobody"
    answered = schedule.people.cancels.get(job_id, [])
    if "JobNotFound" in answered:
        assert lossy or job_id in schedule.fate.forgotten, f"{job_id}: not found by a cancel, and it is there"
    elif answered and not lossy:
        assert set(answered) == {end.type}, f"{job_id}: cancel was answered {answered}, it ended {end.type}"


def _check_consumers(schedule: Schedule, job_id: str, log: Sequence[AnyEvent]) -> None:
    truth = timeless(log)
    may_be_gone = schedule.fate.before_loss is not None or job_id in schedule.fate.forgotten
    for heard in (each for each in schedule.people.heard if each.job_id == job_id):
        seen = timeless(heard.events)
        if heard.resumed and schedule.fate.before_loss is not None:
            continue
        if not heard.lost and not _saw_the_lost_end(schedule, heard):
            check_consumers([seen], truth)
            _check_promptness(schedule, heard)
            continue
        told = heard.lost in ("", "RedisUnavailable") or may_be_gone or heard.who == "reader-all"
        assert told, f"{heard.who} of {job_id} was told {heard.lost}, and nothing was lost"
        histories = [truth]
        if schedule.fate.before_loss is not None:
            histories.append(timeless(schedule.fate.before_loss[job_id]))
        whole = any(seen == history[: len(seen)] for history in histories)
        assert whole, f"{heard.who} of {job_id} was told {heard.lost!r} and shown a mixture: {heard.events}"


def _check_promptness(schedule: Schedule, heard: Heard) -> None:
    if not (schedule.weather.clear and heard.steady):
        return
    for event, came in zip(heard.events, heard.times, strict=True):
        late = came - max(event.at - EPOCH, heard.began)
        assert late < PROMPT, f"{heard.who} of {heard.job_id} got event {event.seq} {late:.3f} s late"


def _saw_the_lost_end(schedule: Schedule, heard: Heard) -> bool:
    """Whether the consumer had everything before the server lost it: nobody can tell it afterwards."""
    if schedule.fate.before_loss is None:
        return False
    before = timeless(schedule.fate.before_loss[heard.job_id])
    return bool(before) and before[-1].terminal and timeless(heard.events) == before


def _check_upstream(schedule: Schedule) -> None:
    for job_id, requests in schedule.model.requests.items():
        still = [request for request in requests if request.open]
        assert not still, f"{job_id}: never closed: {still}"
        if schedule.weather.hearing and not schedule.weather.kinds & DEADLY:
            for earlier, later in itertools.pairwise(requests):
                overlap = earlier.closed_at - later.begun_at
                assert overlap <= 0, f"{job_id}: two upstream streams at once for {overlap:.3f} s: {earlier}, {later}"
        if schedule.weather.hearing:
            for request in requests:
                _check_closing(schedule, request)


def _check_closing(schedule: Schedule, request: Request) -> None:
    """A worker that can hear learns within a second that the job is no longer its own, and closes the stream."""
    worker = next(each for each in schedule.workers if each.actor is request.asker)
    for at in schedule.watch.taken.get(request.job_id, ()):
        since = next((until for began, until in worker.stops if began <= at <= until), at)
        awake = not any(began < since + CLOSED for began, _ in worker.stops if began > at)
        if request.begun_at < at and awake:
            late = request.closed_at - since
            assert late <= CLOSED, f"{request.job_id}: {request} went on for {late:.3f} s after it was not its own"
