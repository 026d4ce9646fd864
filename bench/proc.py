"""What /proc says of processes: whose children they are, their CPU time and memory; and where they may run."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name: [0] is the state, [1] the parent; see proc_pid_stat(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, parents before their children, without `pid` itself."""
    children: dict[int, list[int]] = {}
    for name in (entry.name for entry in Path("/proc").iterdir()):
        if name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                children.setdefault(int(_stat(int(name))[1]), []).append(int(name))
    found = list(children.get(pid, ()))
    for parent in found:  # grows while it is read
        found += children.get(parent, ())
    return found


def tree(pids: Iterable[int]) -> list[int]:
    """These processes and all below them."""
    return [member for pid in pids for member in (pid, *descendants(pid))]


def pin(pids: Iterable[int], core: int) -> None:
    """Lets every thread of these processes, and what they start from now on, run on `core` alone."""
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread.name), {core})


def cpu_us(pids: Iterable[int]) -> int:
    """User and system time of these processes and of the children they have reaped, us.

    A process's own time is read from its CPU clock, exact to the nanosecond; /proc/PID/stat, which has the same figure
    in ticks of 10 ms, is read for the reaped children only.
    """
    total = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, OSError):
            # The id of another process's CPU clock, as clock_getcpuclockid(3) computes it: CPUCLOCK_SCHED is 2.
            own = time.clock_gettime_ns((~pid << 3) | 2) // 1000
            fields = _stat(pid)
            total += own + (int(fields[13]) + int(fields[14])) * 1_000_000 // _TICKS
    return total


def memory_kb(pids: Iterable[int]) -> tuple[int, int]:
    """RSS and PSS of these processes together, KB. Shared pages count fully in RSS, by their share in PSS."""
    rss = pss = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                name, _, value = line.partition(":")
                if name == "Rss":
                    rss += int(value.split()[0])
                elif name == "Pss":
                    pss += int(value.split()[0])
    return rss, pss


def busy_us(cores: Iterable[int]) -> int:
    """Time these cores have spent on anything but idling since the machine started, us, to 10 ms."""
    names = {f"cpu{core}" for core in cores}
    busy = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name in names:
            values = [int(tick) for tick in ticks[:8]]  # user nice system idle iowait irq softirq steal
            busy += sum(values) - values[3] - values[4]
    return busy * 1_000_000 // _TICKS


def cores() -> tuple[int, int]:
    """The core for stub, Redis and subscriber, and the core for the process under test; one and the same if need be."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[1] if len(usable) > 1 else usable[0]
