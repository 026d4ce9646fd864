"""`python -m producer` on a terminal of its own: nothing a model wrote may drive it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from millstream.testing import ScriptedChannel
from tests.live.producer_processes import Room, Screen, wait_until
from tests.valkey import Valkey

HOSTILE = "\x1b[2J\x1b]52;c;aGk=\x07\x1b]8;;http://x\x07link\x1b]8;;\x07\u202egnp.exe\u2066\x9b31m\rover\x00\x7f"
SHOWN = r"\x1b[2J\x1b]52;c;aGk=\x07\x1b]8;;http://x\x07link\x1b]8;;\x07\u202egnp.exe\u2066\x9b31m\x0dover\x00\x7f"
STYLE = re.compile(r"\x1b\[[0-9;]*m")
DRAWING = re.compile(r"\x1b\[(\?25[lh]|\d*[AK])|\r(?!\n)")  # of a board: cursor off and on, up, erase line


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


def hostile_job(room: Room, channel: ScriptedChannel, job_id: str) -> None:
    room.client.submit("Hi", id=job_id, metadata={"who": HOSTILE})
    channel.start(job_id)
    channel.chunk(job_id, "void " + HOSTILE)
    channel.restart(job_id, reason=HOSTILE)
    channel.delta(job_id, reasoning=HOSTILE)
    channel.chunk(job_id, HOSTILE)
    channel.chunk(job_id, HOSTILE, index=1)
    channel.retrying(job_id, code=HOSTILE)
    channel.fail(job_id, HOSTILE, "<html>\n" + HOSTILE)


def is_inert(raw: str) -> bool:
    return all(line.isprintable() for line in STYLE.sub("", raw).replace("\r\n", "\n").split("\n"))


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["follow", "a"], 1), (["follow", "a", "--live"], 1), (["follow", "a", "--json"], 1), (["result", "a"], 1),
        (["result", "a", "--json"], 1), (["status", "a"], 0), (["status", "a", "--json"], 0), (["list", "--json"], 0),
        (["list"], 0),
    ],
    ids=str,
)  # fmt: skip
def test_no_command_lets_a_model_drive_the_terminal(
    room: Room, channel: ScriptedChannel, argv: list[str], status: int
) -> None:
    """Only colours reach it: no clearing, no clipboard, no links, no overwriting, no reversed text."""
    hostile_job(room, channel, "a")
    with Screen(room, *argv) as screen:
        raw = screen.to_the_end()
        assert screen.process.returncode == status
    assert is_inert(raw), ascii(raw)
    if argv[0] in ("follow", "result") and "--json" not in argv:
        assert SHOWN in raw


def test_a_board_of_several_jobs_is_inert_too_and_gives_the_cursor_back(room: Room, channel: ScriptedChannel) -> None:
    """It moves the cursor itself, by its own few sequences alone."""
    for job_id in ("a", "b"):
        hostile_job(room, channel, job_id)
    room.client.submit("Hi", id="c")
    with Screen(room, "follow", "a", "b", "c") as screen:
        room.followed("c")
        channel.start("c")
        channel.chunk("c", HOSTILE)
        wait_until(lambda: r"│ \x1b[2J\x1b]52;c;aGk=\x07" in STYLE.sub("", screen.raw))  # while it runs, in its frame
        channel.complete("c")
        raw = screen.to_the_end()
        assert screen.process.returncode == 1
    assert is_inert(DRAWING.sub("", raw)), ascii(raw)
    assert raw.count(SHOWN) >= 3  # in the sections of those that ended
    assert "c · completed" in raw
    assert raw.rfind("\x1b[?25h") > raw.rfind("\x1b[?25l") >= 0


def test_text_appears_as_it_comes_and_a_restart_is_a_rule(room: Room, channel: ScriptedChannel) -> None:
    """The screen is never a line behind the model."""
    room.client.submit("Hi", id="j")
    channel.start("j")
    with Screen(room, "follow", "j") as screen:
        channel.chunk("j", "Hel")
        wait_until(lambda: screen.raw == "Hel")
        channel.restart("j", reason="worker_lost")
        channel.chunk("j", "Hello")
        wait_until(lambda: screen.raw.endswith("Hello"))
        first, rule, text = STYLE.sub("", screen.raw).split("\r\n")
        assert (first, text) == ("Hel", "Hello")
        assert re.fullmatch("─+ attempt 2 · worker_lost ─+", rule)
        channel.complete("j")
        assert screen.to_the_end().endswith("Hello\r\n")
        assert screen.process.returncode == 0


@pytest.mark.parametrize("ids", [["j"], ["j", "k"]], ids=["one", "several"])
def test_ctrl_c_leaves_the_text_and_a_usable_terminal(room: Room, channel: ScriptedChannel, ids: list[str]) -> None:
    """130, the cursor visible, and the way to cancel."""
    for job_id in ids:
        room.client.submit("Hi", id=job_id)
        channel.start(job_id)
        channel.chunk(job_id, "Hello")
    with Screen(room, "follow", *ids) as screen:
        room.followed("j")
        screen.press(b"\x03")
        raw = screen.to_the_end()
        assert screen.process.returncode == 130
    assert re.search(r"Hello(\^C)?\r\n", raw)  # the terminal echoes what is pressed
    assert "producer cancel" in raw
    assert raw.rfind("\x1b[?25h") >= raw.rfind("\x1b[?25l")
    assert room.client.status("j").status == "in_progress"
