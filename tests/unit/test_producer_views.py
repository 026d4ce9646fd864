"""How followed jobs are shown: events in, what was written out. No Redis."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

import pytest

from millstream.events import Chunk, Completed, Event, Failed, Incomplete, Retrying, Started
from producer import views
from producer.standard import Standard
from tests.unit.producer_typed import standard, written

HOSTILE = "\x1b[2J\x1b]52;c;aGk=\x07\x1b]8;;http://x\x07y\u202egnp\x9b31m\rZ"
SHOWN = r"\x1b[2J\x1b]52;c;aGk=\x07\x1b]8;;http://x\x07y\u202egnp\x9b31m\x0dZ"
STYLE = re.compile(r"\x1b\[[0-9;]*m")  # colours are ours: the only escape that may reach a terminal


class Log:
    """Events of one job, numbered as they are made."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.attempt = 0

    def start(self, reason: str | None = None) -> Log:
        self.attempt += 1
        return self._add(Started, reason=reason)

    def text(self, *pieces: str, index: int = 0) -> Log:
        for piece in pieces:
            self._add(Chunk, delta={"content": piece}, index=index)
        return self

    def delta(self, **delta: object) -> Log:
        return self._add(Chunk, delta=delta)

    def add(self, kind: Callable[..., Event], **fields: object) -> Log:
        return self._add(kind, **fields)

    def end(self) -> Log:
        return self._add(Completed, finish_reasons={0: "stop"})

    def _add(self, kind: Callable[..., Event], **fields: object) -> Log:
        self.events.append(kind(seq=len(self.events) + 1, attempt=self.attempt, at=1.5, **fields))
        return self


def show(events: Sequence[tuple[str, Event]], *, terminal: bool = False, live: bool = False) -> tuple[str, str]:
    """stdout and stderr after these events."""
    streams = standard(terminal=terminal)
    feed(streams, events, live=live)
    return written(streams)


def feed(streams: Standard, events: Sequence[tuple[str, Event]], *, live: bool = False, as_json: bool = False) -> None:
    ids = list(dict.fromkeys(job_id for job_id, _ in events))
    with views.choose(streams, ids, live=live, as_json=as_json) as view:
        for job_id, event in events:
            view.feed(job_id, event)


def of(log: Log, job_id: str = "a") -> list[tuple[str, Event]]:
    return [(job_id, event) for event in log.events]


def interleaved(**logs: Log) -> list[tuple[str, Event]]:
    """The logs' events in turns."""
    turns = max(len(log.events) for log in logs.values())
    return [(job, log.events[i]) for i in range(turns) for job, log in logs.items() if i < len(log.events)]


RESTARTED = Log().start().text("void ", "te").start("worker_lost").text("Hel", "lo").end()


# A pipe ----------------------------------------------------------------------------------------------


def test_a_pipe_gets_the_final_text_once_after_the_end() -> None:
    """Nothing before it, nothing void, no byte of ours."""
    assert show(of(RESTARTED)[:-1])[0] == ""
    assert show(of(RESTARTED)) == ("Hello", "attempt 2 · worker_lost\n")


def test_a_pipe_gets_the_text_as_the_model_wrote_it() -> None:
    """Whoever reads a pipe reads data: nothing is escaped, no newline is added."""
    for text in (HOSTILE, "a\r\nb\x00\n", "👩‍👩‍👧\u2028", " "):
        assert show(of(Log().start().text(*text).end()))[0] == text
        assert show(of(Log().start().text(*text).end()), live=True)[0] == text


def test_a_pipe_gets_several_texts_in_the_order_they_were_asked_for() -> None:
    """Below headers as head(1) writes them, whichever ended first."""
    late, early = Log().start().text("l", "ate\n").end(), Log().start().text("early").end()
    assert show(interleaved(x=late, y=early))[0] == "==> x <==\nlate\n==> y <==\nearly\n"


def test_a_pipe_gets_choice_0_and_is_told_once_that_there_are_others() -> None:
    """On stderr, in a pipe with and without --live."""
    log = Log().start().text("one").text("two", "three", index=1).text("four", index=2).end()
    for live in (False, True):
        out, err = show(of(log), live=live)
        assert out == "one"
        assert err.count("several choices") == 1


def test_endings_are_said_on_stderr() -> None:
    """In one line each, whatever an upstream sent; completed needs no words."""
    failed = Log().start().text("par").add(Failed, error={"code": "boom", "message": f"<p>\n{HOSTILE}"})
    on_one_line = SHOWN.replace(r"\x0d", " ")
    assert show(of(failed)) == ("par", f"failed: boom: <p> {on_one_line}\n")
    short = Log().start().text("par").add(Incomplete, finish_reasons={0: "length"})
    assert show(of(short)) == ("par", "incomplete: the model stopped early (length)\n")
    assert show(of(Log().start().text("x").end()))[1] == ""


def test_waits_are_said_on_stderr() -> None:
    """With the reason."""
    log = Log().start().add(Retrying, error={"code": "rate_limited", "message": "slow"}, delay=2.5).end()
    for terminal in (False, True):
        assert "waits 2.5 s, then asks again (rate_limited: slow)" in show(of(log), terminal=terminal)[1]


def test_what_a_text_cannot_show_is_said_on_stderr() -> None:
    """An answer of tool calls is not silently empty; those of a void attempt are void."""
    calls = [{"index": 0, "function": {"name": "f", "arguments": "{}"}}]
    assert "tool_calls" in show(of(Log().start().delta(tool_calls=calls).end()))[1]
    assert "tool_calls" not in show(of(Log().start().delta(tool_calls=calls).start("lost").text("x").end()))[1]


# A pipe, --live ----------------------------------------------------------------------------------------------


def test_live_writes_as_it_comes_and_reports_a_restart_on_stderr() -> None:
    """What was written cannot be taken back; the new text begins on a new line."""
    out, err = show(of(RESTARTED), live=True)
    assert out == "void te\nHello"
    assert err == "attempt 2 · worker_lost; the text so far is void and begins anew\n"
    assert show(of(RESTARTED)[:3], live=True)[0] == "void te"


def test_live_says_of_a_restart_before_any_text_that_nothing_is_void() -> None:
    """A restart that nobody saw needs no new line."""
    out, err = show(of(Log().start().start("worker_lost").text("x").end()), live=True)
    assert (out, err) == ("x", "attempt 2 · worker_lost\n")
    again = Log().start().text("void").start("worker_lost").start("worker_lost").text("x").end()
    assert show(of(again), live=True)[1].splitlines()[1:] == ["attempt 3 · worker_lost"]


def test_live_names_the_job_whenever_another_goes_on() -> None:
    """As tail(1) does with several files."""
    a, b = Log().start().text("1", "2\n").end(), Log().start().text("3").end()
    assert show(interleaved(a=a, b=b), live=True)[0] == "==> a <==\n1\n==> b <==\n3\n==> a <==\n2\n"


# JSON ----------------------------------------------------------------------------------------------


def test_json_is_one_event_a_line_as_on_the_channel() -> None:
    """With several jobs each line names its own."""
    one, several = standard(), standard()
    feed(one, of(RESTARTED), as_json=True)
    lines = [json.loads(line) for line in written(one)[0].splitlines()]
    assert lines[1] == {"v": 1, "seq": 2, "attempt": 1, "type": "chunk", "at": 1.5, "index": 0, "n": 1,
                        "delta": {"content": "void "}}  # fmt: skip
    assert [line["seq"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert "job" not in lines[0]
    feed(several, interleaved(a=RESTARTED, b=RESTARTED), as_json=True)
    assert [json.loads(line)["job"] for line in written(several)[0].splitlines()[:4]] == ["a", "b", "a", "b"]


def test_json_on_a_terminal_is_inert_and_still_the_same_json() -> None:
    """JSON may hold DEL, C1 and bidi controls unescaped."""
    piped, shown = standard(), standard(terminal=True)
    log = Log().start().text(HOSTILE + "\x7f").end()
    feed(piped, of(log), as_json=True)
    feed(shown, of(log), as_json=True)
    piped_out, shown_out = written(piped)[0], written(shown)[0]
    assert "\u202e" in piped_out
    assert all(each.isprintable() for each in shown_out.splitlines())
    assert [json.loads(line) for line in shown_out.splitlines()] == [
        json.loads(line) for line in piped_out.splitlines()
    ]


# A terminal ----------------------------------------------------------------------------------------------


def plain(out: str) -> str:
    return STYLE.sub("", out)


def test_a_terminal_marks_a_restart_with_a_rule_and_begins_the_text_anew() -> None:
    """The rule stands alone on its line and says why."""
    lines = plain(show(of(RESTARTED), terminal=True)[0]).splitlines()
    assert (lines[0], lines[2:]) == ("void te", ["Hello"])
    assert re.fullmatch("─+ attempt 2 · worker_lost ─+", lines[1])


def test_a_terminal_shows_text_as_it_comes() -> None:
    """Each piece is written when its event is fed, not at the next newline."""
    streams = standard(terminal=True)
    with views.choose(streams, ["a"], live=False, as_json=False) as view:
        for event, so_far in zip(Log().start().text("Hel", "lo").events, ("", "Hel", "Hello"), strict=True):
            view.feed("a", event)
            assert written(streams)[0] == so_far


@pytest.mark.parametrize("jobs", [1, 2])
def test_hostile_output_never_drives_a_terminal(jobs: int) -> None:
    """Text, reasoning, a restart's reason and an error are shown, not obeyed, for one job and for several."""
    log = Log().start().text(HOSTILE).start(HOSTILE).delta(reasoning=HOSTILE).text(HOSTILE).text(HOSTILE, index=1)
    log.add(Failed, error={"code": HOSTILE, "message": HOSTILE})
    out, err = show(interleaved(**dict.fromkeys("ab"[:jobs], log)), terminal=True)
    ours = re.compile(r"\x1b\[\?25[lh]|\x1b\[\d*[AK]|\x1b\[2K|\r(?=\x1b|$)") if jobs > 1 else re.compile(r"(?!)")
    for line in ours.sub("", plain(out)).splitlines() + err.splitlines():
        assert line.isprintable(), ascii(line)
    assert SHOWN in "".join(plain(out).split("\n"))


def test_a_carriage_return_and_newline_split_over_chunks_are_a_newline() -> None:
    """A lone carriage return is shown, wherever the chunks were cut."""
    assert show(of(Log().start().text("a\r", "\nb\r", "c\r").end()), terminal=True)[0] == "a\nb\\x0dc\\x0d\n"


def test_a_terminal_shows_the_other_choices_below_rules_after_the_end() -> None:
    """Those of a void attempt are void; the first one streams meanwhile."""
    log = Log().start().text("void", index=1).start("lost").text("one").text("two", index=1).text("three", index=2)
    out = plain(show(of(log.text("!").end()), terminal=True)[0])
    assert re.fullmatch("─+ attempt 2 · lost ─+\none!\n─+ choice 1 ─+\ntwo\n─+ choice 2 ─+\nthree\n", out)


def test_a_terminal_is_left_at_the_beginning_of_a_line() -> None:
    """Also when the following ends early, since an error message or the shell's prompt comes next."""
    assert show(of(Log().start().text("Hel")), terminal=True)[0] == "Hel\n"
    assert show(of(Log().start().text("Hel\n").end()), terminal=True)[0] == "Hel\n"


def left_on_screen(out: str) -> list[str]:
    """The lines a terminal of any height is left with: newlines, carriage returns, cursor up and erase line obeyed."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[?\d]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", out):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith(("\x1b", "\r")):
            lines[row] += part
    return lines


def test_a_board_leaves_the_whole_text_of_every_job() -> None:
    """What has ended as a section under its name, then those that still ran; void text is gone."""
    running = Log().start().text("begun\n" * 50)
    out = plain(show(interleaved(done=RESTARTED, running=running), terminal=True)[0])
    lines = [line for line in left_on_screen(out) if line]
    assert re.fullmatch("done · completed \\(attempt 2\\) ─+", lines[0])
    assert lines[1] == "Hello"
    assert re.fullmatch("running · in_progress ─+", lines[2])
    assert lines[3:] == ["begun"] * 50
