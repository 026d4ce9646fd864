"""The worker's own lines: whatever is in a field, it is shown."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SAY = """
import structlog
from worker.log import configure
configure({style!r})
structlog.get_logger().warning("intake.put_aside", rq_job="\\x1b]0;pwn\\x07\\x1b[2J", number=7)
"""


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_field_cannot_drive_the_terminal(style: str) -> None:
    """The name of a queue entry is anybody's: in neither form a control character gets through."""
    done = subprocess.run(
        [sys.executable, "-c", SAY.format(style=style)], capture_output=True, check=True, timeout=60
    )  # fmt: skip
    said = done.stderr.decode()
    assert all(char.isprintable() or char == "\n" for char in said)
    if style == "json":
        assert json.loads(said)["rq_job"] == "\x1b]0;pwn\x07\x1b[2J"
    else:
        assert "\\x1b]0;pwn\\x07\\x1b[2J" in said
