"""`python -m producer` as a process on pipes, on a real server, with a scripted worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from millstream.job import MAX_SPEC_BYTES
from millstream.testing import ScriptedChannel
from tests.live.producer_processes import ROOT, Room, is_silent, read_until
from tests.valkey import Valkey


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey.start() as server:
        yield server


@pytest.fixture
def room(valkey: Valkey) -> Iterator[Room]:
    room = Room(valkey.url)
    with room.client:
        yield room


@pytest.fixture
def channel(room: Room) -> ScriptedChannel:
    return ScriptedChannel(room.client)


def begun(room: Room, channel: ScriptedChannel, job_id: str = "j") -> str:
    room.client.submit("Hi", id=job_id)
    channel.start(job_id)
    return job_id


def one_line(err: bytes) -> str:
    text = err.decode()
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    assert text[:-1].isprintable()
    return text


def test_submit_prints_an_id_that_can_be_used(room: Room) -> None:
    """stdout holds the id and a newline, and the job is there."""
    done = room.run("submit", "-", stdin="Grüße".encode())
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"\n")
    assert room.client.status(done.stdout.decode().strip()).status == "queued"


def test_follow_writes_nothing_before_the_end_and_then_the_final_text(room: Room, channel: ScriptedChannel) -> None:
    """A pipe gets the text once, without what a restart made void."""
    begun(room, channel)
    with room.running("follow", "j") as process:
        room.followed("j")
        channel.chunk("j", "void")
        channel.restart("j", reason="worker_lost")
        channel.chunk("j", "Hel")
        channel.retrying("j")
        assert b"attempt 2" in read_until(process.stderr, b"(rate_limited: scripted)\n")
        assert is_silent(process.stdout)
        channel.chunk("j", "lo")
        channel.complete("j")
        assert process.communicate(timeout=20) == (b"Hello", b"")
    assert process.returncode == 0


def test_follow_live_writes_each_piece_at_once(room: Room, channel: ScriptedChannel) -> None:
    """And reports a restart on stderr."""
    begun(room, channel)
    with room.running("follow", "j", "--live") as process:
        for piece in ("Hel", "lo"):
            channel.chunk("j", piece)
            assert read_until(process.stdout, piece.encode()) == piece.encode()
        channel.restart("j", reason="worker_lost")
        assert b"attempt 2" in read_until(process.stderr, b"anew\n")
        channel.chunk("j", "Hi")
        channel.stop_short("j")
        out, err = process.communicate(timeout=20)
    assert (out, process.returncode) == (b"\nHi", 3)
    assert "length" in one_line(err)


def test_follow_json_gives_the_events_of_the_log(room: Room, channel: ScriptedChannel) -> None:
    """Live and from the log the lines are the same."""
    begun(room, channel)
    with room.running("follow", "j", "--json") as process:
        room.followed("j")
        channel.chunk("j", "Hel\x9b\u202elo")
        channel.complete("j", total_tokens=3)
        live, err = process.communicate(timeout=20)
    assert err == b""
    late = room.run("follow", "j", "--json")
    assert live == late.stdout
    assert [json.loads(line)["type"] for line in live.splitlines()] == ["started", "chunk", "completed"]


@pytest.mark.parametrize("locale", [{"LANG": "C", "LC_ALL": "POSIX"}, {"PYTHONIOENCODING": "ascii"}], ids=str)
def test_a_pipe_carries_the_bytes_of_the_text_in_any_locale(
    room: Room, channel: ScriptedChannel, locale: dict[str, str]
) -> None:
    """What goes through a pipe is data, in UTF-8."""
    text = "Grüße 👩‍👩‍👧\x00\x1b[2J\r\n\u202e\x9b end\r"
    begun(room, channel)
    channel.chunk("j", text)
    channel.complete("j")
    for command in (["follow", "j"], ["follow", "j", "--live"], ["result", "j"]):
        assert room.run(*command, env=locale).stdout == text.encode()


def test_ctrl_c_stops_the_following_and_not_the_job(room: Room, channel: ScriptedChannel) -> None:
    """130, and a line that says how to cancel it."""
    begun(room, channel)
    for command in (["follow", "j"], ["result", "j"]):
        with room.running(*command) as process:
            room.followed("j")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (130, b"")
        assert "python -m producer cancel j" in one_line(err)
        assert room.client.status("j").status == "in_progress"


def test_a_reader_that_has_gone_ends_the_following_quietly(room: Room, channel: ScriptedChannel) -> None:
    """As with any program of a pipeline: nothing on stderr, 128 + SIGPIPE."""
    begun(room, channel)
    with room.running("follow", "j", "--live") as process:
        assert process.stdout
        channel.chunk("j", "Hel")
        read_until(process.stdout, b"Hel")
        process.stdout.close()
        channel.chunk("j", "lo")
        assert process.stderr
        assert process.stderr.read() == b""
        assert process.wait(20) == 141


@pytest.mark.parametrize("argv", [["--help"], ["submit", "--help"], ["list", "--json"]], ids=" ".join)
def test_a_reader_that_never_was_is_no_reason_for_a_traceback(room: Room, argv: list[str]) -> None:
    """Help and lists too go to pipes that others close."""
    room.client.submit("Hi")
    reader, writer = os.pipe()
    os.close(reader)
    done = room.run(*argv, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_behind_stdout_is_said_in_one_line(room: Room) -> None:
    """The id may be lost, so the status is not 0."""
    with Path("/dev/full").open("wb") as full:
        done = room.run("submit", "Hi", stdout=full)
    assert done.returncode == 1
    assert "No space left" in one_line(done.stderr)


def test_closed_standard_streams_are_no_reason_for_a_traceback(room: Room) -> None:
    """`<&- >&- 2>&-` in a shell."""
    command = f'"{sys.executable}" -m producer "$@" <&- >&- 2>&-'
    for argv, status in ((["submit", "Hi"], 0), (["submit", "-"], 2), (["status", "nobody"], 2), (["list"], 0)):
        shell = ["sh", "-c", command, "sh", *argv]
        assert subprocess.run(shell, cwd=ROOT, env=room.environment(), check=False).returncode == status


def test_result_waits_no_longer_than_its_timeout(room: Room, channel: ScriptedChannel) -> None:
    """124, and the job goes on."""
    begun(room, channel)
    done = room.run("result", "j", "--timeout", "0.3")
    assert (done.returncode, done.stdout) == (124, b"")
    assert "0.3 s" in one_line(done.stderr)


def test_a_timeout_runs_on_while_redis_is_away() -> None:
    """A follower outlasts an outage of minutes, but not a timeout its caller gave; then it says that Redis is away."""
    with Valkey.start() as server:
        room = Room(server.url)
        begun(room, ScriptedChannel(room.client))
        with room.running("result", "j", "--timeout", "3") as process:
            room.followed("j")
            server.kill()
            out, err = process.communicate(timeout=20)
        room.client.close()
    assert (process.returncode, out) == (5, b"")
    *before, last = err.decode().splitlines()
    assert "cannot be reached" in last
    assert all("goes on when it is back" in line for line in before)  # the follower's notice, when tries ended in time


@pytest.mark.parametrize("argv", [["list"], ["submit", "Hi"], ["follow", "j"], ["result", "j"]], ids=" ".join)
def test_a_refused_connection_is_said_within_four_seconds(room: Room, argv: list[str]) -> None:
    """Beyond what a process that is served needs at the same time, and without the password."""
    began = time.monotonic()
    room.run("list")
    served = time.monotonic() - began
    room.url = "redis://:canary@127.0.0.1:1/0"
    began = time.monotonic()
    done = room.run(*argv)
    assert time.monotonic() - began < 4 + served
    assert (done.returncode, done.stdout) == (5, b"")
    line = one_line(done.stderr)
    assert "127.0.0.1:1 cannot be reached" in line
    assert "canary" not in line


def test_a_wrong_password_is_said_at_once_and_not_shown(room: Room) -> None:
    """With what to look at."""
    room.client.redis.execute_command("ACL", "SETUSER", room.prefix, "on", ">right", "~*", "&*", "+@all")
    address = room.url.removeprefix("redis://")
    room.url = f"redis://{room.prefix}:canary@{address}"
    done = room.run("list")
    assert (done.returncode, done.stdout) == (5, b"")
    line = one_line(done.stderr)
    assert "refused the password; check REDIS_URL" in line
    assert "canary" not in line
    room.url = f"redis://{room.prefix}:right@{address}"
    assert room.run("list").returncode == 0


@pytest.mark.parametrize(
    ("body", "says"),
    [(b"\xff\xfe", "not UTF-8"), (b"", "empty"), (b"x" * (MAX_SPEC_BYTES + 1), "more than 4,194,304 bytes")],
    ids=["latin", "empty", "huge"],
)
def test_what_is_piped_in_and_cannot_be_is_refused_in_one_line(room: Room, body: bytes, says: str) -> None:
    """And nothing is submitted."""
    done = room.run("submit", "-", stdin=body)
    assert (done.returncode, done.stdout) == (2, b"")
    assert says in one_line(done.stderr)
    assert room.client.list() == []


def test_an_endless_stdin_is_refused_after_what_a_job_may_hold(room: Room) -> None:
    """It is not read to the end, which may never come."""
    with Path("/dev/zero").open("rb") as endless, room.start("submit", "-", stdin=endless) as process:
        _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "more than 4,194,304 bytes" in one_line(err)


def test_bytes_of_the_command_line_that_are_no_utf8_are_refused(room: Room) -> None:
    """They reach Python as lone surrogates, which no JSON can carry."""
    command = [sys.executable.encode(), b"-m", b"producer", b"submit", b"caf\xe9"]
    done = subprocess.run(command, cwd=ROOT, env=room.environment(), capture_output=True, check=False)
    assert done.returncode == 2
    assert "not UTF-8" in one_line(done.stderr)


def test_help_needs_neither_redis_nor_rq_nor_rich(room: Room) -> None:
    """Start-up is fast: what takes long to import is imported by who needs it."""
    program = "import sys; from producer.__main__ import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=room.environment(), capture_output=True, check=True
    )
    imported = set(done.stdout.decode().splitlines()[-1].split())
    assert "millstream.settings" in imported
    assert not imported & {"redis", "rq", "rich", "asyncio", "openai"}
