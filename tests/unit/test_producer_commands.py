"""The commands on a fake Redis: what they print and how they end."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable

import pytest

from millstream import Client
from millstream.meters import Limits, Meter, Place, acquire, learn
from millstream.testing import ScriptedChannel, fake_client
from producer.__main__ import main
from tests.contract.consumers import PATIENCE, wait_until
from tests.unit.producer_typed import standard, typed, written


class Desk:
    """A client and the worker's part, with jobs that have ended in every way."""

    def __init__(self) -> None:
        self.client = fake_client()
        self.channel = ScriptedChannel(self.client)

    def job(self, job_id: str, *pieces: str) -> str:
        self.client.submit("Hi", id=job_id, model="m", metadata={"a": "b\t\x1b[2J"})
        self.channel.start(job_id)
        for piece in pieces:
            self.channel.chunk(job_id, piece)
        return job_id

    def ended(self, status: str, job_id: str | None = None) -> str:
        job_id = self.job(job_id or status, "par", "tial")
        endings: dict[str, Callable[[str], object]] = {
            "completed": self.channel.complete,
            "incomplete": self.channel.stop_short,
            "failed": self.channel.fail,
            "cancelled": self.client.cancel,
        }
        endings[status](job_id)
        return job_id


@pytest.fixture
def desk() -> Desk:
    return Desk()


ENDINGS = [("completed", 0), ("failed", 1), ("incomplete", 3), ("cancelled", 4)]


@pytest.mark.parametrize(("ending", "status"), ENDINGS)
def test_follow_and_result_write_the_text_and_end_as_the_job_did(desk: Desk, ending: str, status: int) -> None:
    """The text there is, whatever the ending; the exit status says what it is worth."""
    desk.ended(ending)
    for argv in (["follow", ending], ["follow", ending, "--live"], ["result", ending]):
        found = typed(desk.client, *argv)
        assert (found.status, found.out) == (status, "partial")
        assert (ending in found.err) is (status != 0)


@pytest.mark.parametrize("command", ["follow", "result"])
def test_whoever_waits_for_a_worker_is_told_so(desk: Desk, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that nobody takes is said to wait, once; one that was taken, or has ended, is waited for in silence."""
    monkeypatch.setattr("producer.unclaimed.QUIET", 0.0)
    desk.client.submit("Hi", id="waits", model="m")
    streams = standard()
    command_ran = threading.Thread(target=main, args=((command, "waits"), lambda: desk.client, streams), daemon=True)
    command_ran.start()
    wait_until(lambda: "does one run" in written(streams)[1], "the word")
    desk.channel.start("waits")
    desk.channel.complete("waits")
    command_ran.join(PATIENCE)
    assert not command_ran.is_alive()
    assert written(streams)[1].count("no worker has taken the job") == 1
    desk.ended("completed")
    assert typed(desk.client, command, "completed").err == ""


def test_follow_of_several_ends_as_the_worst(desk: Desk) -> None:
    """Each id counts once, however often it is named."""
    ids = [desk.ended(ending) for ending, _ in ENDINGS]
    found = typed(desk.client, "follow", *ids, ids[0], "--json")
    assert found.status == 1
    assert [json.loads(line)["job"] for line in found.out.splitlines()].count(ids[0]) == 4


def test_follow_after_a_seq_leaves_out_what_was_seen(desk: Desk) -> None:
    """Also when that was everything: the exit status is the job's all the same."""
    desk.ended("failed")
    rest = typed(desk.client, "follow", "failed", "--json", "--after", "3")
    assert (rest.status, [json.loads(line)["type"] for line in rest.out.splitlines()]) == (1, ["failed"])
    assert (typed(desk.client, "follow", "failed", "--json", "--after", "4").status) == 1


def test_follow_past_the_log_says_that_it_was_rewound(desk: Desk) -> None:
    """A cursor beyond the end means that Redis lost something."""
    desk.ended("completed")
    found = typed(desk.client, "follow", "completed", "--after", "9")
    assert (found.status, found.out) == (1, "")
    assert "does not reach" in found.err


def test_an_unknown_id_among_several_ends_the_command_before_it_begins(desk: Desk) -> None:
    """A typing error shows at once, not after the others have ended."""
    desk.job("open")
    found = typed(desk.client, "follow", "open", "nobody")
    assert (found.status, found.out) == (2, "")
    assert "'nobody'" in found.err


@pytest.mark.parametrize("command", ["follow", "status", "result", "cancel", "forget"])
def test_an_unknown_id_ends_with_2(desk: Desk, command: str) -> None:
    """In one line on stderr."""
    found = typed(desk.client, command, "nobody")
    assert (found.status, found.out, found.err.count("\n")) == (2, "", 1)


def test_result_json_is_the_whole_answer(desk: Desk) -> None:
    """The fields of the interface, the completion being OpenAI's."""
    desk.job("j", "Hel", "lo")
    desk.channel.complete("j", completion_tokens=2)
    found = typed(desk.client, "result", "j", "--json")
    answer = json.loads(found.out)
    assert list(answer) == ["id", "status", "text", "completion", "usage", "attempts", "error"]
    assert (answer["text"], answer["usage"], answer["attempts"]) == ("Hello", {"completion_tokens": 2}, 1)
    assert answer["completion"]["choices"][0]["message"]["content"] == "Hello"


def test_result_json_carries_the_error_and_the_exit_status_says_failed(desk: Desk) -> None:
    """Nothing is lost by asking for JSON."""
    desk.ended("failed")
    found = typed(desk.client, "result", "failed", "--json")
    assert (found.status, json.loads(found.out)["error"]) == (1, {"code": "upstream_error", "message": "scripted"})


def test_result_on_a_terminal_is_inert_and_ends_its_line(desk: Desk) -> None:
    """In a pipe it is the text, byte for byte."""
    desk.job("j", "a\x1b[2Jb")
    desk.channel.complete("j")
    assert typed(desk.client, "result", "j", terminal=True).out == "a\\x1b[2Jb\n"
    assert typed(desk.client, "result", "j").out == "a\x1b[2Jb"


def test_result_gives_up_with_124_when_its_time_is_over(desk: Desk) -> None:
    """The job goes on, and the line says so."""
    desk.job("j", "x")
    found = typed(desk.client, "result", "j", "--timeout", "0.05")
    assert (found.status, found.out) == (124, "")
    assert "it goes on" in found.err
    assert desk.client.status("j").status == "in_progress"


def test_cancel_prints_the_status_that_holds(desk: Desk) -> None:
    """The first ending wins; to come late is no error, but it is said."""
    desk.job("j")
    assert typed(desk.client, "cancel", "j").out == "cancelled\n"
    desk.ended("completed")
    late = typed(desk.client, "cancel", "completed")
    assert (late.status, late.out) == (0, "completed\n")
    assert "had ended before" in late.err


def test_forget_lets_an_ended_job_go_and_refuses_an_open_one(desk: Desk) -> None:
    """An open job is cancelled first."""
    desk.ended("completed")
    desk.job("open")
    assert typed(desk.client, "forget", "completed").status == 0
    assert desk.client.redis.ttl(desk.client.keys.log("completed")) <= 60
    refused = typed(desk.client, "forget", "open")
    assert (refused.status, "cancel it first" in refused.err) == (2, True)


def test_status_in_a_pipe_is_one_tab_separated_line_for_each_thing(desk: Desk) -> None:
    """What would end a cell is escaped."""
    desk.ended("failed")
    found = typed(desk.client, "status", "failed")
    rows = dict(line.split("\t") for line in found.out.splitlines())
    assert (rows["id"], rows["status"], rows["seq"]) == ("failed", "failed", "4")
    assert rows["error"] == "upstream_error: scripted"
    assert rows["created_at"].endswith("Z")


def test_status_json_is_everything_and_inert_on_a_terminal(desk: Desk) -> None:
    """Metadata is anybody's text."""
    desk.ended("completed")
    for terminal in (False, True):
        found = typed(desk.client, "status", "completed", "--json", terminal=terminal)
        assert json.loads(found.out)["metadata"] == {"a": "b\t\x1b[2J"}
        assert found.out[:-1].isprintable()
    shown = typed(desk.client, "status", "completed", terminal=True).out
    assert all(line.isprintable() for line in shown.splitlines())


def test_status_on_a_terminal_says_in_words_what_a_job_waits_for(desk: Desk) -> None:
    """Until when is a time of day there, not a number; in a pipe and with --json it stays what it is."""
    desk.job("j")
    wait = {"what": "limit", "upstream": "up", "model": "m/1", "because": "tokens"}
    fields = {"wait": json.dumps(wait), "until": "1795746532560"}
    desk.client.redis.hset(desk.client.keys.state("j"), mapping=fields)
    (shown,) = [line for line in typed(desk.client, "status", "j", terminal=True).out.splitlines() if "wait" in line]
    assert re.fullmatch(r"wait +limit up m/1 \(tokens\), until about 2026-11-2\d \d\d:\d\d:52", shown)
    assert json.loads(typed(desk.client, "status", "j", "--json").out)["wait"] == {**wait, "until": 1795746532.56}


def test_list_in_a_pipe_is_tsv_and_with_json_one_object_a_line(desk: Desk) -> None:
    """Open jobs first, then the newest ended."""
    desk.ended("completed", "old")
    desk.ended("failed", "new")
    desk.job("open")
    rows = [line.split("\t") for line in typed(desk.client, "list").out.splitlines()]
    assert [row[:4] for row in rows] == [
        ["open", "in_progress", "interactive", "m"],
        ["new", "failed", "interactive", "m"],
        ["old", "completed", "interactive", "m"],
    ]
    lines = [json.loads(line) for line in typed(desk.client, "list", "--json").out.splitlines()]
    assert [line["id"] for line in lines] == ["open", "new", "old"]


def test_list_keeps_one_state_and_says_when_there_are_more(desk: Desk) -> None:
    """A cut is never silent."""
    for i in range(3):
        desk.ended("failed", f"f{i}")
    desk.ended("completed")
    found = typed(desk.client, "list", "--state", "failed", "--limit", "2")
    assert [line.split("\t")[0] for line in found.out.splitlines()] == ["f2", "f1"]
    assert found.err == "there are more jobs; --limit N shows more than 2\n"
    assert typed(desk.client, "list", "--state", "failed", "--limit", "3").err == ""


def test_limits_shows_each_meter(desk: Desk) -> None:
    """What is in use of each limit, who waits, when the next is due, until when it cools: in all three forms."""
    assert "no limits" in typed(desk.client, "limits", terminal=True).err
    assert typed(desk.client, "limits").out == typed(desk.client, "limits", "--json").out == ""
    keys, meter = desk.client.keys, Meter("up", "m/1", Limits(requests=100, streams=1))
    places = [Place(f"j{i}-00000000", f"j{i}", "batch", i, 10, 90) for i in range(3)]
    desk.client.run(
        acquire(
            keys, meter, places, lease=15, asker="w", number=1, want=9, lanes=("batch",), intermediate=("i", "b")
        )
    )  # fmt: skip
    desk.client.run(learn(keys, meter, cool=60))
    (line,) = [json.loads(line) for line in typed(desk.client, "limits", "--json").out.splitlines()]
    assert (line["upstream"], line["model"]) == ("up", "m/1")
    assert line["requests"] == {"used": 1, "limit": 100}
    assert line["tokens"] == {"used": 100, "limit": None}
    assert line["streams"] == {"used": 1, "limit": 1}
    assert line["waiting"] == {"interactive": 0, "batch": 2}
    assert line["next_at"] == line["cooling_until"]
    row = typed(desk.client, "limits").out.rstrip("\n").split("\t")
    assert row[:7] == ["up", "m/1", "1/100", "100/-", "1/1", "0", "2"]
    assert row[7].endswith("Z")
    head, below = typed(desk.client, "limits", terminal=True, width=140).out.splitlines()
    for word in ("waiting", "cooling until"):
        assert word in head
    assert below.split()[:7] == ["up", "m/1", "1/100", "100/-", "1/1", "0", "2"]
    narrow = typed(desk.client, "limits", terminal=True, width=60).out.splitlines()
    assert narrow[1:3] == ["model          m/1", "requests       1/100"]


def test_list_on_a_terminal_is_a_table(desk: Desk) -> None:
    """With a head; of no jobs it says so."""
    assert typed(desk.client, "list", terminal=True).err == "no jobs\n"
    desk.ended("completed", "j")
    out = typed(desk.client, "list", terminal=True, width=100).out
    head, row = out.splitlines()
    assert head.split() == ["id", "status", "lane", "model", "attempt", "seq", "created"]
    assert row.split()[:3] == ["j", "completed", "interactive"]


@pytest.mark.parametrize(
    ("width", "head"),
    [
        (140, "id status lane model attempt seq created"), (100, "id status model attempt seq created"),
        (79, "id status model created"), (40, "id status"),
    ],
)  # fmt: skip
def test_list_on_a_narrow_terminal_leaves_columns_out(desk: Desk, width: int, head: str) -> None:
    """An id is there to be copied: it stands in one piece on its job's one line."""
    job_id = "e7a4439825e5e3d139394753e49dae89"
    desk.client.submit("Hi", id=job_id, model="smollm2-135m")
    found = typed(desk.client, "list", terminal=True, width=width).out.splitlines()
    assert found[0].split() == head.split()
    assert [line.split()[0] for line in found[1:]] == [job_id]


def test_submit_follow_streams_the_text_and_gives_the_id_on_stderr(desk: Desk) -> None:
    """A job that was there already is followed from its beginning."""
    desk.client.submit("Hi", id="j", model="m")
    desk.channel.start("j")
    desk.channel.chunk("j", "Hello")
    desk.channel.complete("j")
    found = typed(desk.client, "submit", "Hi", "--id", "j", "--model", "m", "--follow")
    assert (found.status, found.out, found.err.splitlines()[-1]) == (0, "Hello", "j")
    events = typed(desk.client, "submit", "Hi", "--id", "j", "--model", "m", "--follow", "--json").out.splitlines()
    assert [json.loads(line)["type"] for line in events] == ["started", "chunk", "completed"]


def test_an_id_with_another_spec_ends_with_2(desk: Desk) -> None:
    """The same id is the same job or none."""
    typed(desk.client, "submit", "Hi", "--id", "j")
    found = typed(desk.client, "submit", "Ho", "--id", "j")
    assert (found.status, found.out) == (2, "")
    assert "different spec" in found.err


class _Interrupted(Client):
    """A client whose user presses Ctrl-C while it follows."""

    def follow_many(self, *_: object, **__: object) -> object:  # type: ignore[override]
        raise KeyboardInterrupt


def test_ctrl_c_stops_the_following_and_says_how_to_cancel(desk: Desk) -> None:
    """130; the job goes on."""
    desk.job("j", "x")
    client = _Interrupted(connection=desk.client.redis, script_header=False)
    found = typed(client, "follow", "j")
    assert (found.status, found.out) == (130, "")
    assert found.err.endswith("goes on. To cancel it: millstream cancel j\n")
    assert desk.client.status("j").status == "in_progress"


@pytest.mark.parametrize(
    ("variable", "value"), [("REDIS_URL", "http://x"), ("REDIS_URL", "redis://:pa/ss@h:1/0"), ("MILLSTREAM_LEASE", "x")]
)
def test_a_setting_that_cannot_be_ends_with_2_and_names_it(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No piece of a password is shown."""
    monkeypatch.setenv(variable, value)
    streams = standard()
    assert main(["list"], None, streams) == 2
    out, err = written(streams)
    assert (out, err.count("\n"), variable in err, "ss@" in err) == ("", 1, True, False)
