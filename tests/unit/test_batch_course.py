"""What a batch does next: every row once, whatever ends when, whatever is lost, wherever the producer dies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.batch import window as window_module
from millstream.batch.answer import Answer
from millstream.batch.course import STEP, waits_for
from millstream.batch.row import Reader
from millstream.batch.source import Objects
from millstream.batch.window import MAX_LOST
from millstream.errors import RedisUnavailable
from tests.unit.batch_model import Model, Run

Rows = list[dict[str, Any]]


def rows(count: int) -> Rows:
    return [
        {"custom_id": f"r{i}", "body": {"model": "m", "messages": [{"role": "user", "content": f"row {i}"}]}}
        for i in range(count)
    ]


def source(given_rows: Iterable[dict[str, Any]], done: Iterable[str] = ()) -> Objects:
    """The rows that are not done yet, as a producer that starts again gives them."""
    return Objects([row for row in given_rows if row["custom_id"] not in set(done)], Reader("b"))


def run_to_the_end(
    model: Model, given_rows: Rows, window: int = 3, *, end: bool = True, **options: Any
) -> list[Answer]:
    """All answers, while the world ends every open job at once."""

    def around() -> bool:
        for job in model.open if end else []:
            model.end(job)
        return False

    return [answer for some in Run(model, source(given_rows), window, **options).lists(around) for answer in some]


def test_every_row_is_answered_and_nothing_is_left() -> None:
    """Each answer is its own job's, and Redis has forgotten them all."""
    model = Model()
    answers = run_to_the_end(model, rows(10))
    assert sorted(str(answer.custom_id) for answer in answers) == sorted(f"r{i}" for i in range(10))
    assert all(answer.text == f"answer of {answer.job_id}" for answer in answers)
    assert model.jobs == {}


def test_large_rows_make_the_window_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are taken a few at a time: 250 of 4 MB would be a gigabyte before anybody counts."""
    monkeypatch.setattr(window_module, "MAX_OPEN_BYTES", 2_000)
    model, most = Model(), 0

    def around() -> bool:
        nonlocal most
        most = max(most, len(list(model.open)))
        for job in model.open:
            model.end(job)
        return False

    answers = [each for some in Run(model, source(rows(200)), 250).lists(around) for each in some]
    assert len(answers) == 200
    assert STEP <= most <= 2 * STEP + 10, most


@pytest.mark.parametrize("window", [1, 2, 7])
def test_redis_never_holds_more_than_the_window(window: int) -> None:
    """Ended jobs count until they are dropped."""
    model = Model()
    run_to_the_end(model, rows(20), window)
    assert model.most == window


def test_no_row_is_read_before_there_is_room_for_it() -> None:
    """The input may be larger than memory."""
    read: list[str] = []
    model = Model()

    def lazily() -> Iterable[dict[str, Any]]:
        for row in rows(100):
            read.append(row["custom_id"])
            yield row

    lists = Run(model, Objects(lazily(), Reader("b")), 4).lists()
    for _ in range(5):
        next(lists)
    assert len(read) == 4


@pytest.mark.parametrize("full", [True, "nearly"])
def test_a_full_server_is_waited_out(full: bool | str) -> None:
    """Refused rows stay; what runs ends, and makes room."""
    model = Model()
    run = Run(model, source(rows(6)), 2)
    troubles = []

    def around() -> bool:
        troubles.append(run.course.trouble)
        model.full = full if 1001 < model.now < 1010 else False
        for job in model.open:
            model.end(job)
        return False

    answers = [answer for some in run.lists(around) for answer in some]
    assert len(answers) == 6
    assert any("Redis" in trouble and "full" in trouble for trouble in troubles)
    during = troubles[next(at for at, trouble in enumerate(troubles) if trouble) :]
    assert not any(during[during.index("") :]), "it says so all the time, not now and then"
    assert max(model.asked.values()) == 1


def test_a_server_that_is_away_at_the_beginning_is_an_error() -> None:
    """Nobody wants to wait for a wrong address."""
    with pytest.raises(RedisUnavailable):
        list(Run(Model(), source(rows(1)), 1).lists(lambda: True))


@pytest.mark.parametrize(
    ("wait", "words"),
    [
        (None, ""), (b'{"what":"upstream","upstream":"up"}', "upstream up"), (b"?", "something"),
        (b'{"what":"limit","upstream":"up","model":"m","because":"tokens"}', "limit up (tokens)"),
    ],
)  # fmt: skip
def test_what_rows_wait_for_is_counted_by_a_few_words(wait: bytes | None, words: str) -> None:
    """Which upstream, and which of its limits: what one can do about it differs."""
    assert waits_for(wait) == words


def test_a_refusal_that_waiting_does_not_mend_is_an_error() -> None:
    """A missing right, say: found in the middle, it is raised."""
    model = Model()
    steps = Run(model, source(rows(1)), 1).course.steps()
    next(steps)
    steps.send([[]])
    with pytest.raises(RedisUnavailable, match="rights"):  # noqa: PT012 - the one that is raised is the last
        while True:
            steps.throw(RedisUnavailable("no rights"))


def test_a_job_that_vanished_is_asked_again_but_not_for_ever() -> None:
    """Its retention ended while nobody looked: it is paid again; where that never helps, the row fails."""
    model = Model()

    def around() -> bool:
        model.jobs.clear()
        return False

    [answer] = [answer for some in Run(model, source(rows(1)), 1).lists(around) for answer in some]
    assert (answer.status, (answer.error or {})["code"]) == ("failed", "expired")
    assert model.asked.total() == MAX_LOST


def test_endings_that_fell_off_the_feed_are_found_by_looking() -> None:
    """The feed is capped: with 20 endings at once it holds the last few."""
    model = Model()
    run = Run(model, source(rows(20)), 20)

    def around() -> bool:
        for job in model.open if len(model.jobs) == 20 else []:
            model.end(job)
        return False

    assert len([answer for some in run.lists(around) for answer in some]) == 20
    assert max(model.asked.values()) == 1


def test_a_stopped_batch_ends_with_what_is_open() -> None:
    """No more rows are taken, and those that were taken are answered."""
    model = Model()
    run = Run(model, source(rows(10)), 3)
    answers: list[Answer] = []
    for some in run.lists():
        answers += some
        if len(model.jobs) == 3:
            run.course.stop()
            for job in model.open:
                model.end(job)
    assert len(answers) == 3
    assert model.jobs == {}


def test_a_stopped_batch_submits_nothing_more() -> None:
    """Rows that a full server refused until then are left for another run."""
    model = Model()
    run = Run(model, source(rows(6)), 3)
    model.full = True
    lists = run.lists()
    for _ in range(4):
        assert next(lists) == []
    run.course.stop()
    model.full = False
    assert [some for some in lists if some] == []
    assert model.asked.total() == 0


def test_a_cancelled_batch_accounts_for_every_row() -> None:
    """What was answered is an answer; what was open or never submitted is cancelled."""
    model = Model()
    lists = Run(model, source(rows(6)), 4).lists()
    while len(model.jobs) < 4:
        next(lists)
    model.end(model.open[0])
    answers = run_to_the_end(model, rows(6), end=False, cancel=True)
    assert Counter(answer.status for answer in answers) == {"completed": 1, "cancelled": 5}
    assert {(answer.error or {})["code"] for answer in answers if not answer.answered} == {"batch_cancelled"}
    assert (model.jobs, model.asked.total()) == ({}, 4)


@pytest.mark.parametrize("again", [False, True])
def test_a_failed_job_of_an_earlier_run_is_the_answer_unless_asked_again(again: bool) -> None:
    """`again` makes another job of the row, since the failed one has its id."""
    model = Model()
    lists = Run(model, source(rows(1)), 1).lists()
    while not model.jobs:
        next(lists)
    model.end(model.open[0], "failed")
    [answer] = run_to_the_end(model, rows(1), again=again)
    assert answer.status == ("completed" if again else "failed")
    assert model.asked.total() == 1 + again


@given(data=st.data(), count=st.integers(0, 12), window=st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_every_row_once_whatever_happens(data: st.DataObject, count: int, window: int) -> None:
    """Any order of endings, outages that lose replies, kills at any ask, with the last answers written or not.

    Every row is in the output exactly once, and no row was paid twice: nothing expires in this world.
    """
    model = Model()
    output: list[str] = []
    for _ in range(20):
        with suppress(_Killed):
            for some in Run(model, source(rows(count), output), window).lists(_Life(model, data).around):
                output += [str(answer.custom_id) for answer in some]
            break
    else:  # a last life without misfortune
        left = [row for row in rows(count) if row["custom_id"] not in output]
        output += [str(answer.custom_id) for answer in run_to_the_end(model, left)]
    assert Counter(output) == Counter(f"r{i}" for i in range(count))
    assert all(times == 1 for times in model.asked.values())
    assert model.open == []


class _Killed(Exception):  # noqa: N818 - not an error, a fate
    pass


class _Life:
    """The world around one producer: jobs end, replies are lost, and it may be killed."""

    def __init__(self, model: Model, data: st.DataObject) -> None:
        self._model, self._data = model, data
        self._asks = 0

    def around(self) -> bool:
        self._asks += 1
        what = self._data.draw(st.sampled_from(["nothing", "end", "end all", "lose", "kill"]), "what happens")
        if self._asks > 40 or what == "end all":  # hypothesis bores of a world in which nothing ends
            for job in self._model.open:
                self._model.end(job)
        elif what == "end" and self._model.open:
            self._model.end(self._data.draw(st.sampled_from(self._model.open), "which"))
        if what == "kill":  # before the reply comes; or, with answers that were handed over, before they are written
            raise _Killed
        return what == "lose" and self._asks > 2
