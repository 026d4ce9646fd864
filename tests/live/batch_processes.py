"""Batches as people run them: `python -m producer batch` beside workers and a scripted upstream."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.live.producer_processes import ROOT
from tests.upstream import DEFAULT_CHUNKS, expected_text, good_answer, seed_of
from tests.worker_process import PATIENCE, environment, wait_until
from tests.world import World


def row(number: int, **body: Any) -> dict[str, Any]:
    """A row whose answer is known: the scripted upstream writes what the prompt's seed says."""
    messages = [{"role": "user", "content": f"prompt {number}"}]
    return {
        "custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions",
        "body": {"model": "scripted", "messages": messages, **body},
    }  # fmt: skip


def map_rows(count: int) -> list[dict[str, Any]]:
    return [row(number) for number in range(count)]


def paced(world: World, seconds: float) -> None:
    """Every chunk takes its time."""
    world.upstream.on(lambda request: good_answer(request, pace_seconds=seconds))


def paid(world: World) -> Counter[str]:
    """Requests the upstream got, by prompt."""
    return Counter(str(exchange.request.prompt) for exchange in world.upstream.journal)


def write(path: Path, rows: Sequence[Any]) -> Path:
    """An input; a row that is text stands as it is."""
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_answers(lines: Sequence[dict[str, Any]], count: int) -> None:
    """Every row exactly once, and each with the whole text of its own prompt."""
    assert sorted(int(line["custom_id"].removeprefix("row-")) for line in lines) == list(range(count))
    for line in lines:
        assert line["error"] is None, line
        text = line["response"]["body"]["choices"][0]["message"]["content"]
        prompt = f"prompt {line['custom_id'].removeprefix('row-')}"
        assert text == expected_text(DEFAULT_CHUNKS, seed_of(prompt)), line["custom_id"]


class BatchProcess:
    """One producer at work on one output."""

    def __init__(self, environ: dict[str, str], source: Path | str, out: Path, *options: str, **how: Any) -> None:
        self.out = out
        command = [sys.executable, "-m", "producer", "batch", str(source), "--out", str(out), *options]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(environ), stderr=subprocess.PIPE, text=True, **how
        )

    def written(self) -> int:
        """Whole lines in the output so far."""
        with contextlib.suppress(FileNotFoundError):
            return self.out.read_bytes().count(b"\n")
        return 0

    def wait_for(self, count: int) -> None:
        """Until so many lines are there."""
        wait_until(lambda: self.written() >= count or self.process.poll() is not None, f"{count} lines")

    def end(self, within: float = PATIENCE) -> tuple[int, str]:
        """Its exit status and what it said."""
        _, said = self.process.communicate(timeout=within)
        return self.process.returncode, said

    def summary(self, within: float = PATIENCE) -> dict[str, Any]:
        """The last JSON line it said, with its exit status."""
        status, said = self.end(within)
        found: dict[str, Any] = json.loads([line for line in said.splitlines() if line.startswith("{")][-1])
        return {**found, "status": status}


@contextlib.contextmanager
def batch(environ: dict[str, str], source: Path | str, out: Path, *options: str, **how: Any) -> Iterator[BatchProcess]:
    """A producer that does not outlive the block."""
    made = BatchProcess(environ, source, out, *options, **how)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()
        made.process.communicate()
