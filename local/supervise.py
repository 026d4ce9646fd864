"""Starts the parts in order, starts again what dies, and stops them in the reverse order."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, TextIO, TypeVar

from . import parts
from .errors import FolderTaken, LocalError
from .plan import Plan

Say = Callable[[str], None]

_FIRST_DELAY: Final = 0.5  # seconds before a dead part is started again; doubles with every death
_LONGEST_DELAY: Final = 10.0
_STEADY: Final = 30.0  # seconds of life after which the delays begin anew

PartT = TypeVar("PartT", bound=parts.Part)


class Stack:
    """Redis, the model where none is given, and one worker. `environ` is what a client on it needs."""

    def __init__(self, plan: Plan, data: Path, *, port: int | None, worker_command: Sequence[str], say: Say) -> None:
        """`data` holds the server's files and every part's log. `port` is the one Valkey tries first."""
        self._plan, self._data, self._port, self._say = plan, data, port, say
        self._worker_command = worker_command
        self._keepers: list[_Keeper] = []
        self.redis_url = ""
        self.model_url: str | None = None
        self.environ: dict[str, str] = {}
        self.worker: parts.Worker | None = None

    def start(self) -> None:
        """Everything, ready on return. Raises LocalError at the first part that cannot; `stop` is then still due."""
        # Redis first and the worker last, because each needs those before it to be ready.
        if self._plan.redis_url:
            parts.check_redis(self._plan.redis_url)
            self.redis_url = self._plan.redis_url
        else:
            self.redis_url = self._started(parts.Server(self._data, self._port)).url
        if self._plan.local_model:
            self.model_url = self._started(parts.Model(self._data / "model.log")).url
        self.environ = self._plan.for_worker(self.redis_url, self.model_url)
        self.worker = self._started(parts.Worker(self._data / "worker.log", self._worker_command, self.environ))

    def tend(self) -> None:
        """One look at every part; what has died is started again when its delay is over. Call it often."""
        for keeper in self._keepers:
            keeper.tend(time.monotonic())

    def stop(self, drain: float | None = None) -> None:
        """Everything, in order. The worker gets `drain` seconds to finish its streams, None: its own grace period."""
        # The worker before all others: to finish its streams it needs the model, and Redis to write them to. Redis
        # after the model, because until the last process is gone something may be written.
        if self.worker is not None and self.worker.alive:
            self.worker.stop(drain)
        for keeper in reversed(self._keepers):
            keeper.part.stop()

    def _started(self, part: PartT) -> PartT:
        self._say(f"starting {part.name} ...")
        self._keepers.append(_Keeper(part, self._say))  # before its start, so that `stop` finds what is half started
        part.start()
        return part


class _Keeper:
    """Keeps one part alive."""

    def __init__(self, part: parts.Part, say: Say) -> None:
        self.part = part
        self._say = say
        self._delay = _FIRST_DELAY
        self._since = time.monotonic()
        self._due: float | None = None

    def tend(self, now: float) -> None:
        if self._due is not None:
            if now >= self._due:
                self._start_again()
        elif not self.part.alive:
            if now - self._since > _STEADY:
                self._delay = _FIRST_DELAY
            self._plan_start(f"{self.part.name} has died ({self.part.how_it_ended()})", now)

    def _plan_start(self, why: str, now: float) -> None:
        self._say(f"{why}; it is started again in {self._delay:g} s")
        self._due = now + self._delay
        self._delay = min(2 * self._delay, _LONGEST_DELAY)

    def _start_again(self) -> None:
        self._due = None
        try:
            self.part.start()
        except LocalError as error:
            self._plan_start(str(error).partition("\n")[0], time.monotonic())
        else:
            self._since = time.monotonic()
            self._say(f"{self.part.name} runs again")


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and a closed terminal (SIGHUP) raise KeyboardInterrupt, as Ctrl-C does. What was ignored stays so."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before: Mapping[signal.Signals, object] = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # `nohup` means it
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type] # what getsignal gave


@contextlib.contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Hold the folder for this process: two servers on one append-only file would ruin it.

    Raises FolderTaken, and LocalError where it cannot be made or written to.
    """
    with _lock_file(folder) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise FolderTaken(
                f"{folder} is in use by process {owner}: end that `local up`, or choose another folder with --data"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _lock_file(folder: Path) -> TextIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / "lock").open("a+")
    except OSError as error:
        raise LocalError(f"{folder} cannot be used ({error.strerror}): choose another folder with --data") from None
