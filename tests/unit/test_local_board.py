"""What the demo shows, from events alone."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from local.board import PlainLines, Row, outcome, panels
from millstream.events import AnyEvent, Chunk, Completed, Failed, Retrying, Started


def started(seq: int, attempt: int = 1, **fields: Any) -> Started:
    return Started(seq=seq, attempt=attempt, at=100.0, **fields)


def chunk(seq: int, text: str, at: float = 100.0, attempt: int = 1, n: int = 1) -> Chunk:
    return Chunk(seq=seq, attempt=attempt, at=at, delta={"content": text}, n=n)


def fed(*events: AnyEvent) -> Row:
    row = Row("job", "A prompt")
    for event in events:
        row.feed(event, elapsed=2.5)
    return row


def drawn(*rows: Row, width: int = 90) -> str:
    console = Console(file=io.StringIO(), width=width, height=20, force_terminal=False)
    with console.capture() as captured:
        console.print(panels(rows, console))
    return captured.get()


def test_the_rate_counts_upstream_chunks_between_the_first_and_the_newest() -> None:
    """Merged chunks count as many; the time before the first token does not count."""
    row = fed(started(1), chunk(2, "a", at=200.0), chunk(3, "bcd", at=201.0, n=6))
    assert (row.events, row.tokens, row.rate) == (2, 7, 6.0)


def test_a_new_attempt_begins_the_row_anew() -> None:
    """Text and counts of the earlier attempt are void."""
    row = fed(started(1), chunk(2, "lost"), started(3, attempt=2, reason="worker_lost"), chunk(4, "kept", attempt=2))
    assert (row.transcript.text, row.events, row.tokens) == ("kept", 1, 1)


def test_a_row_says_what_its_job_is_doing() -> None:
    """The status follows the events, and the terminal one ends the row with its time."""
    row = Row("job", "A prompt")
    seen = [row.status]
    for event in (started(1), Retrying(seq=2, attempt=1, at=1.0, delay=3.2, error={"code": "down"}), chunk(3, "x")):
        row.feed(event, elapsed=1.0)
        seen.append(row.status)
    row.feed(Completed(seq=4, attempt=1, at=2.0), elapsed=2.5)
    assert seen == ["queued", "in_progress", "asks again in 3 s (down)", "in_progress"]
    assert (row.status, row.ended, row.seconds) == ("completed", True, 2.5)


def test_panels_stand_side_by_side_and_show_the_newest_text() -> None:
    """Each row has its column; of a long text the end is shown."""
    long = fed(started(1), *(chunk(seq, f"line {seq}\n") for seq in range(2, 60)))
    other = fed(started(1), chunk(2, "the other one"))
    picture = drawn(long, other)
    assert "line 59" in picture
    assert "line 2 " not in picture
    assert "the other one" in next(line for line in picture.splitlines() if "line" in line)
    assert max(map(len, picture.splitlines())) <= 90


def test_a_panel_too_narrow_for_status_and_rate_keeps_the_status_whole() -> None:
    """Half a word says nothing: three panels on 80 columns have room for one of the two."""
    rows = [fed(started(1), chunk(2, "a", at=200.0), chunk(3, "b", at=201.0, n=20)) for _ in range(3)]
    assert drawn(*rows, width=120).count("in_progress · 20 tokens/s") == 3
    narrow = drawn(*rows, width=80)
    assert (narrow.count("in_progress"), narrow.count("·"), narrow.count("…")) == (3, 0, 0)


def printed(row: Row) -> str:
    return "\n".join(PlainLines("[1]").feed(chunk(2, row.transcript.text + "\n")))


@pytest.mark.parametrize("show", [drawn, printed])
def test_control_characters_in_an_answer_are_shown_not_obeyed(show: Any) -> None:
    """An answer cannot move the cursor, set the clipboard or speak rich's markup."""
    picture = show(fed(started(1), chunk(2, "\x1b]52;c;aGk=\x07[red]markup[/red]")))
    assert "\x1b" not in picture
    assert "\x07" not in picture
    assert "\\x1b]52;c;aGk=\\x07[red]markup[/red]" in picture


def test_plain_lines_come_whole_and_labelled() -> None:
    """A line is printed when it is complete or full; the rest with the end. Together they are the text's words."""
    lines = PlainLines("[2]")
    out = [line for text in ("Hel", "lo\n\nsec", "ond ", "word " * 40) for line in lines.feed(chunk(2, text))]
    assert out[0] == "[2] Hello"
    assert all(line.startswith("[2] ") and len(line) <= 92 for line in out)
    out += lines.feed(Completed(seq=9, attempt=1, at=1.0))
    assert " ".join(line.removeprefix("[2] ") for line in out).split() == ["Hello", "second", *["word"] * 40]


def test_plain_lines_say_when_the_text_above_is_void() -> None:
    """A new attempt is announced, and the unfinished line of the old one is dropped."""
    lines = PlainLines("[1]")
    assert lines.feed(chunk(2, "half a li")) == []
    assert lines.feed(started(3, attempt=2, reason="worker_lost")) == [
        "[1] -- starts again (worker_lost): the text above is void --"
    ]
    assert lines.feed(chunk(4, "whole\n", attempt=2)) == ["[1] whole"]


def test_plain_lines_say_why_nothing_comes() -> None:
    """An upstream that is down is named while the demo waits for it."""
    error = {"code": "connect_failed", "message": "no\x1bbody listens"}
    asked_again = Retrying(seq=2, attempt=1, at=1.0, delay=3.2, error=error)
    assert PlainLines("[1]").feed(asked_again) == ["[1] -- asks again in 3 s: no\\x1bbody listens --"]


def test_the_outcome_says_whether_what_was_seen_is_what_was_kept() -> None:
    """One line per job with its counts; a difference cannot be overlooked, and an error is named."""
    whole = fed(started(1), chunk(2, "four"), Completed(seq=3, attempt=1, at=1.0))
    line = " ".join(outcome(1, whole, same_as_log=True).split())
    assert line == "[1] completed 1 chunks 4 characters 2.5 s as in the log"
    assert "NOT as in the log" in outcome(1, whole, same_as_log=False)
    error = {"code": "upstream_error", "message": "no\x1b such model"}
    assert outcome(1, fed(Failed(seq=1, attempt=1, at=1.0, error=error)), same_as_log=True).endswith(
        "upstream_error: no\\x1b such model"
    )
