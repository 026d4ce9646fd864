"""The scripted upstream in a process of its own, for more streams than a test can serve beside itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from local import guard


class Upstream:
    """`python -m tests.upstream` behind its standard input and output."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.base_url = self._line()

    def ask(self, command: str) -> Any:
        """The answer to a command, parsed."""
        return json.loads(self._said(command))

    def open_gate(self, gate: str) -> None:
        """Lets every script that waits for this gate go on."""
        assert self._said(f"open {gate}") == f"opened {gate}"

    def open_streams(self) -> int:
        return int(self.ask("count")["open"])

    def exchange(self, prompt: str) -> dict[str, Any]:
        """The one request with this prompt."""
        [found] = [each for each in self.ask("journal") if each["prompt"] == prompt]
        return dict(found)

    def _said(self, command: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def an_upstream() -> Iterator[Upstream]:
    """An upstream that takes no time of this process, nor of its interpreter's lock."""
    command = [sys.executable, "-m", "tests.upstream", "--require-key", "--commands"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=guard.ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Upstream(process)
        finally:
            process.kill()
