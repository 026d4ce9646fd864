"""What the bench reads off texts, seqs and /proc."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench import proc, stamps
from bench.histogram import Histogram
from bench.processes import Processes
from bench.subscriber import Tally
from bench.toolchain import BenchError
from tests.worker_process import wait_until

CHANNEL = b"millstream:{a}:chunks"


def event(kind: str, seq: int, content: str | None = None) -> bytes:
    more = {} if content is None else {"index": 0, "delta": {"content": content}, "n": 1}
    return json.dumps({"v": 1, "seq": seq, "attempt": 1, "type": kind, "at": 1.5, **more}).encode()


def test_a_merged_text_gives_the_age_of_each_of_its_chunks() -> None:
    """However many chunks an event carries, every one of them is timed."""
    at = 1_000_000
    text = "".join(stamps.encode(at - age) for age in (0, 1, 61, 62, 3843, 3844, 99_999))

    assert stamps.ages(text, at) == [0, 1, 61, 62, 3843, 3844, 99_999]


def test_ages_survive_the_wrap_of_the_clock() -> None:
    """A stamp made just before the wrap and read just after it is young, not two minutes old."""
    assert stamps.ages(stamps.encode(stamps.WRAP - 5), 7) == [12]


@pytest.mark.parametrize("text", ["abc", "abcde", "ab d", "äbcd"])
def test_a_text_that_is_no_row_of_stamps_is_refused(text: str) -> None:
    """A chunk that was cut or altered on the way is noticed, never averaged in."""
    with pytest.raises(ValueError, match="stamps"):
        stamps.ages(text, 0)


@pytest.mark.parametrize("q", [0.01, 0.5, 0.99, 1.0])
def test_a_quantile_is_never_too_small_and_at_most_two_percent_too_large(q: float) -> None:
    """The histogram's error is bounded at every size of value."""
    source = random.Random(7)
    values = [int(10 ** source.uniform(0, 7)) for _ in range(5000)]
    histogram = Histogram()
    histogram.add_all(values)
    exact = sorted(values)[math.ceil(q * len(values)) - 1]

    assert exact <= histogram.quantile(q) <= exact * 1.02


def test_an_empty_histogram_answers_zero() -> None:
    """No chunk, no latency."""
    assert Histogram().quantile(0.99) == 0


def test_the_subscriber_counts_chunks_inside_merged_events_and_sees_the_end() -> None:
    """Chunks, events and ends are three different counts."""
    tally, at = Tally(), 500
    tally.message(CHANNEL, event("started", 1), at)
    tally.message(CHANNEL, event("chunk", 2, stamps.encode(400)), at)
    tally.message(CHANNEL, event("chunk", 3, stamps.encode(480) + stamps.encode(490)), at)
    tally.message(CHANNEL, event("completed", 4), at)

    report = tally.report()
    assert (report["chunks"], report["events"], report["ended"], report["completed"]) == (3, 4, 1, 1)
    assert (report["p50_us"], report["max_us"]) == (20 * 10, 100 * 10)
    assert (report["gaps"], report["duplicates"], report["odd"]) == (0, 0, 0)


def test_the_subscriber_notices_a_gap_a_duplicate_and_an_altered_text() -> None:
    """Each kind of wrong is counted as itself, and a duplicate's chunks are not counted again."""
    tally = Tally()
    for message in (
        event("started", 1),
        event("chunk", 2, "0000"),
        event("chunk", 2, "0000"),
        event("chunk", 4, "000"),
    ):
        tally.message(CHANNEL, message, 0)

    report = tally.report()
    assert (report["gaps"], report["duplicates"], report["odd"], report["chunks"]) == (1, 1, 1, 1)


def test_a_job_that_begins_late_has_a_gap() -> None:
    """Seq 1 missing is as wrong as any other."""
    tally = Tally()
    tally.message(CHANNEL, event("chunk", 2, "0000"), 0)

    assert tally.report()["gaps"] == 1


def test_the_baselines_messages_have_no_seq_to_miss() -> None:
    """The naive baseline gives no guarantee; its chunks are timed all the same."""
    tally = Tally()
    for _ in range(2):
        tally.message(b"naive:{a}:chunks", json.dumps({"type": "chunk", "content": "0000"}).encode(), 3)

    report = tally.report()
    assert (report["chunks"], report["gaps"], report["duplicates"], report["max_us"]) == (2, 0, 0, 30)


def test_beginning_anew_forgets_latencies_but_no_seq() -> None:
    """A gap between two marks is a gap."""
    tally = Tally()
    tally.message(CHANNEL, event("started", 1), 0)
    tally.begin()
    tally.message(CHANNEL, event("chunk", 3, "0000"), 0)

    assert (tally.report()["events"], tally.report()["gaps"]) == (1, 1)


def test_the_cpu_time_of_another_process_is_read_exactly() -> None:
    """What is read from outside is what the process itself says, to less than a tick of /proc."""
    code = "import time; sum(range(2_000_000)); print(time.process_time_ns() // 1000, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        said = int(process.stdout.readline())
        read = proc.cpu_us([process.pid])
        process.stdin.close()

    assert said <= read < said + 9_000


def test_a_family_is_found_counted_and_weighed() -> None:
    """Children of children belong to the process under test."""
    child = "print(1, flush=True); input()"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        family = proc.tree([process.pid])
        together, alone = proc.memory_kb(family), proc.memory_kb([process.pid])
        process.stdin.close()

    assert len(family) == 2
    assert family[0] == process.pid
    assert together[0] > alone[0] >= alone[1] > 0


def test_leaving_ends_even_what_a_killed_process_left_behind(tmp_path: Path) -> None:
    """A work-horse whose worker was killed is an orphan; the bench reaps it."""
    # The child leaves the group and ignores SIGTERM, as an RQ work-horse in mid-stream would hold on.
    child = (
        "import os, signal, time; os.setsid(); signal.signal(15, signal.SIG_IGN);"
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    with Processes(tmp_path) as processes:
        process = processes.start("parent", [sys.executable, "-c", parent], talk=True)
        assert process.stdout
        orphan = int(process.stdout.readline())
        process.kill()
        process.wait()
        assert Path(f"/proc/{orphan}").exists()

    assert not Path(f"/proc/{orphan}").exists()


def test_a_process_that_was_there_before_is_left_alone(tmp_path: Path) -> None:
    """The bench ends what it started and nothing else."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        assert stranger.stdin
        with Processes(tmp_path) as processes:
            processes.start("own", [sys.executable, "-c", "import time; time.sleep(60)"])
        assert stranger.poll() is None
        stranger.stdin.close()


def test_ending_a_process_ends_its_children_too(tmp_path: Path) -> None:
    """No child survives its parent's end, whoever would adopt it."""
    parent = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(p.pid, flush=True); p.wait()"
    )
    with Processes(tmp_path) as processes:
        process = processes.start("parent", [sys.executable, "-c", parent], talk=True)
        assert process.stdout
        child = int(process.stdout.readline())
        processes.end(process)
        wait_until(
            lambda: child not in proc.descendants(os.getpid()) or _state(child) in ("", "Z"), "the child has ended"
        )

    assert not Path(f"/proc/{child}").exists()


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_a_wait_ends_as_soon_as_a_process_has_died(tmp_path: Path) -> None:
    """The answer would never come; what the process said last is the explanation."""
    with Processes(tmp_path) as processes:
        processes.start("worker", [sys.executable, "-c", "raise SystemExit('no such model')"])
        with pytest.raises(BenchError, match="worker ended with status 1:\nno such model"):
            processes.wait_until("what will never be", lambda: False, seconds=30)
