"""`python -m bench.batch`: a batch from file to file, beside one asyncio process of the usual kind, on the same stub.

Product: `python -m producer batch` with one worker; the worker is alone on its core, the producer, Valkey and the stub
share the other. Parallel: bench/parallel.py is alone on the worker's core and reads whole answers, as it is used, where
the product reads streams. Both outputs are checked: every row once, every text whole.

With `--kills N` the producer and the worker are killed N times each (SIGKILL), spread over the rows, and started again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from local.errors import LocalError

from . import proc
from .systems import environment
from .toolchain import BenchError, build_stub
from .world import World, world

PAUSE: Final = 0.1
CHUNKS: Final = 10
"""Content chunks of an answer: short, so that what a row costs beside its tokens shows."""


@dataclass(frozen=True)
class Batch:
    """One run. Memory in MB, CPU in ms a row; `redis_mb` is what Valkey took beyond its empty state, at its peak.

    Of processes that were killed the CPU counts until then, as it was last looked at.
    """

    system: str
    rows: int
    seconds: float
    producer_mb: float
    producer_ms: float
    worker_ms: float
    redis_ms: float
    redis_mb: float

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds


def main() -> int:
    """Exit status: 0 measured; 1 an output was wrong; 2 cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m bench.batch", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--window", type=int, default=1000)
    parser.add_argument("--parallel-rows", type=int, help="rows for the process beside it (default: the same)")
    parser.add_argument("--only", choices=("product", "parallel"))
    parser.add_argument("--kills", type=int, default=0, help="how often the producer and the worker are killed each")
    arguments = parser.parse_args()
    try:
        build_stub()
        found = []
        if arguments.only != "parallel":
            found.append(product(arguments.rows, arguments.window, arguments.kills))
        if arguments.only != "product":
            found.append(parallel(arguments.parallel_rows or arguments.rows))
    except (BenchError, LocalError) as error:
        print(error, file=sys.stderr)
        return 1 if "output" in str(error) else 2
    print(table(found, arguments.window))
    return 0


class Pair:
    """A worker and a producer at work on one output; either may be killed and started again."""

    def __init__(self, here: World, source: Path, out: Path, window: int) -> None:
        self._here, self._out = here, out
        self._commands = {
            "worker": ([sys.executable, "-m", "worker"], here.core),
            "producer": (
                [sys.executable, "-m", "producer", "batch", str(source), "--out", str(out), "--window", str(window)],
                here.helper_core,
            ),
        }
        self._alive: dict[str, subprocess.Popen[str]] = {}
        self._cpu: dict[tuple[str, int], int] = {}  # us, by name and process
        self.peak_mb = 0.0

    def start(self, name: str) -> None:
        command, core = self._commands[name]
        self._alive[name] = self._here.processes.start(name, command, core=core, env=environment(self._here))

    def kill(self, name: str) -> None:
        """SIGKILL, then the same command again."""
        self.look()
        process = self._alive[name]
        process.kill()
        process.wait()
        self._here.processes.end(process)
        self.start(name)

    def look(self) -> None:
        """Note what they have taken until now."""
        for name, process in self._alive.items():
            taken = self._cpu.get((name, process.pid), 0)
            self._cpu[name, process.pid] = max(taken, proc.cpu_us([process.pid]))
            if name == "producer":
                self.peak_mb = max(self.peak_mb, peak_mb(process.pid))

    def cpu_us(self, name: str) -> int:
        """Of all that had this name."""
        return sum(taken for (each, _), taken in self._cpu.items() if each == name)

    def written(self) -> int:
        """Bytes of output so far."""
        return self._out.stat().st_size if self._out.exists() else 0

    def done(self) -> bool:
        """Whether the producer has ended. Raises BenchError when it was not done."""
        producer = self._alive["producer"]
        if producer.poll():
            tail = self._here.processes.tail("producer")
            raise BenchError(f"the batch ended with {producer.returncode}:\n{tail}")
        return producer.returncode is not None


def product(rows: int, window: int, kills: int = 0) -> Batch:
    with world() as here:
        source, out = _input(here, rows, "rate=0"), here.processes.folder / "out.jsonl"
        pair = Pair(here, source, out, window)
        pair.start("worker")
        here.processes.wait_until("the worker to register", lambda: here.valkey.client.scard("rq:workers"), seconds=60)
        empty, redis_cpu = here.valkey.info()["used_memory"], here.valkey.cpu_us()
        pair.look()
        started = pair.cpu_us("worker")
        began = time.monotonic()
        pair.start("producer")
        peak = empty
        # A line takes about 540 bytes: enough to spread the kills, which need no exact place.
        due = [("producer", "worker")[at % 2] for at in range(2 * kills)]
        every = 540 * rows // (2 * kills + 1)
        while not pair.done():
            peak = max(peak, here.valkey.info()["used_memory"])
            pair.look()
            if due and pair.written() > every * (2 * kills + 1 - len(due)):
                pair.kill(due.pop(0))
            time.sleep(PAUSE)
        seconds = time.monotonic() - began
        if due:
            raise BenchError(f"the output was whole before {len(due)} of {2 * kills} kills: take more rows")
        _check(out, rows, lambda line: (line["custom_id"], line["response"]["body"]["choices"][0]))
        return Batch(
            "millstream batch" + f", {kills} + {kills} kills" * bool(kills), rows, seconds, pair.peak_mb,
            pair.cpu_us("producer") / rows / 1000, (pair.cpu_us("worker") - started) / rows / 1000,
            (here.valkey.cpu_us() - redis_cpu) / rows / 1000, (peak - empty) / 1e6,
        )  # fmt: skip


def parallel(rows: int) -> Batch:
    with world() as here:
        source, out = _input(here, rows, "whole=1"), here.processes.folder / "out.jsonl"
        command = [sys.executable, "-m", "bench.parallel", str(source), str(out), "200"]
        began = time.monotonic()
        process = here.processes.start("parallel", command, core=here.core, env=environment(here))
        cpu, memory = 0, 0.0
        while process.poll() is None:
            cpu, memory = max(cpu, proc.cpu_us([process.pid])), max(memory, peak_mb(process.pid))
            time.sleep(PAUSE)
        seconds = time.monotonic() - began
        if process.returncode:
            raise BenchError(f"bench.parallel ended with {process.returncode}:\n{here.processes.tail('parallel')}")
        _check(out, rows, lambda line: (line[2], line[1]["choices"][0]))
        return Batch("one asyncio process", rows, seconds, memory, cpu / rows / 1000, 0.0, 0.0, 0.0)


def _input(here: World, rows: int, shape: str) -> Path:
    path = here.processes.folder / "in.jsonl"
    with path.open("w") as file:
        for number in range(rows):
            prompt = f"Write one sentence about mill number {number}, its river and its miller."
            system = {"role": "system", "content": "You are a helpful assistant."}
            messages = [system, {"role": "user", "content": prompt}]
            body = {"model": f"stub:{shape},chunks={CHUNKS}", "messages": messages, "max_tokens": 1000}
            row = {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(row) + "\n")
    return path


def _check(out: Path, rows: int, read: Callable[[Any], tuple[str, Any]]) -> None:
    """Raises BenchError unless every row is there once with its whole text."""
    seen = bytearray(rows)
    with out.open() as file:
        for line in file:
            name, choice = read(json.loads(line))
            seen[int(name.removeprefix("request-"))] += 1
            if choice["finish_reason"] != "stop" or len(choice["message"]["content"]) != 4 * CHUNKS:
                raise BenchError(f"the output is wrong: {line[:500]}")
    if seen != b"\x01" * rows:
        raise BenchError(f"the output has {sum(seen)} lines for {rows} rows, {seen.count(0)} rows are missing")


def peak_mb(pid: int) -> float:
    """The most memory a process had resident so far, by the kernel's account; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in status.splitlines() if line.startswith("VmHWM:")), 0.0)


def table(found: list[Batch], window: int) -> str:
    """Markdown."""
    lines = [
        "| | rows | rows/s | producer: peak MB | CPU ms a row: producer | worker | Valkey | Valkey's memory, peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        memory = f"{each.redis_mb:.1f} MB ({each.redis_mb * 1000 / window:.1f} KB x window)" if each.redis_mb else "-"
        lines.append(
            f"| {each.system} | {each.rows:,} | {each.rows_per_second:,.0f} | {each.producer_mb:.0f} "
            f"| {each.producer_ms:.2f} | {each.worker_ms:.2f} | {each.redis_ms:.2f} | {memory} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
