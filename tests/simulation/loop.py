"""One asyncio loop for a whole deployment: virtual time, and processes that can be stopped, killed and interleaved.

Every callback belongs to the actor in whose context it was made. Within an actor callbacks run in the order asyncio
promises; between actors the seed decides, as the kernel would. When nobody has anything to do, time leaps to the next
timer. A stopped actor's callbacks wait, a killed one's are never run: not even its `finally`s, as with kill -9.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from contextvars import Context, ContextVar
from typing import Any, TypeVar, TypeVarTuple

Ts = TypeVarTuple("Ts")
T = TypeVar("T")

EPOCH = 1_800_000_000.0
"""The server's wall clock when virtual time begins: a date, so that nothing depends on today's."""


class Actor:
    """A process: workers, clients and the server are one each."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.stopped = False
        self.ready: deque[asyncio.Handle] = deque()
        self.signals: dict[int, Callable[[], object]] = {}
        self.context = Context()
        self.context.run(ACTOR.set, self)

    def __repr__(self) -> str:
        return self.name


ACTOR: ContextVar[Actor] = ContextVar("actor")


class OutOfTimeError(AssertionError):
    """Nothing ended, or nothing can happen any more."""


class Task(asyncio.Task[Any]):
    """Numbered, so that a set of tasks has the same order in every run of a seed."""

    numbers = itertools.count()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.number = next(Task.numbers)
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self.number


class VirtualLoop(asyncio.BaseEventLoop):
    """Drives all actors. `connect` is what create_connection does; whatever else asyncio offers is not here."""

    def __init__(self, rng: random.Random, until: float) -> None:
        super().__init__()
        self._rng = rng
        self._now = 0.0
        self.leap = 0.0
        self._until = until
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._count = itertools.count()
        self._runnable: list[Actor] = []
        self.world = Actor("world")
        self.connect: Callable[[Any, str], Any] | None = None
        self.tasks: list[Task] = []
        self.faults: list[dict[str, Any]] = []
        self.set_task_factory(self._make_task)
        self.set_exception_handler(lambda _loop, context: self.faults.append(context))

    def _make_task(self, loop: Any, coro: Any, **kwargs: Any) -> Task:
        task = Task(coro, loop=loop, **kwargs)
        self.tasks.append(task)
        return task

    def time(self) -> float:
        return self._now

    def wall(self) -> float:
        """The server's clock, which is set now and then."""
        return EPOCH + self._now + self.leap

    # Scheduling --------------------------------------------------------------------------------------------------

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        if not self.is_closed():
            self._enqueue(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._count), timer))
        return timer

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def _enqueue(self, handle: asyncio.Handle) -> None:
        actor = handle._context.get(ACTOR, self.world)  # type: ignore[attr-defined]
        if actor.dead:
            return
        if not actor.ready and not actor.stopped:
            self._runnable.append(actor)
        actor.ready.append(handle)

    def _run_once(self) -> None:
        runnable, chance = self._runnable, self._rng.random
        while not self._stopping:  # type: ignore[attr-defined]
            if not runnable:
                self._leap()
                continue
            place = int(chance() * len(runnable))
            actor = runnable[place]
            handle = actor.ready.popleft()
            if not actor.ready:
                del runnable[place]
            if not handle._cancelled:
                handle._run()

    def _leap(self) -> None:
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not timers:
            raise OutOfTimeError("nobody waits for anything that could still happen")
        self._now = max(self._now, timers[0][0])
        if self._now > self._until:
            raise OutOfTimeError(f"not at rest after {self._until:g} virtual seconds")
        while timers and timers[0][0] <= self._now:
            _, _, timer = heapq.heappop(timers)
            if not timer._cancelled:
                self._enqueue(timer)

    def close(self) -> None:
        self._timers.clear()
        self._runnable.clear()
        super().close()

    # What is done to actors --------------------------------------------------------------------------------------

    def stop_actor(self, actor: Actor) -> None:
        """SIGSTOP: its callbacks wait, while the world goes on."""
        actor.stopped = True
        if actor in self._runnable:
            self._runnable.remove(actor)

    def go_on(self, actor: Actor) -> None:
        """SIGCONT."""
        actor.stopped = False
        if actor.ready and not actor.dead and actor not in self._runnable:
            self._runnable.append(actor)

    def kill(self, actor: Actor) -> None:
        """Kill -9: nothing of it runs any more."""
        actor.dead = True
        actor.ready.clear()
        if actor in self._runnable:
            self._runnable.remove(actor)

    def spawn(self, actor: Actor, coroutine: Any, name: str = "") -> asyncio.Task[Any]:
        """Run a coroutine as (a part of) this actor."""
        return self.create_task(coroutine, name=name or actor.name, context=actor.context)

    def signal(self, actor: Actor, number: int) -> bool:
        """Deliver a signal, once the actor can run. False where nobody handles it: then it is deadly."""
        callback = actor.signals.get(number)
        if callback is not None:
            self.call_soon(callback, context=actor.context)
        return callback is not None

    # What asyncio's users expect of a loop -----------------------------------------------------------------------

    def add_signal_handler(self, sig: int, callback: Callable[[*Ts], object], *args: *Ts) -> None:
        ACTOR.get().signals[sig] = lambda: callback(*args)

    def run_in_executor(self, executor: Any, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """A thread's work, done at once at some moment soon."""
        answer: asyncio.Future[T] = self.create_future()

        def work() -> None:
            if answer.done():
                return
            try:
                answer.set_result(func(*args))
            except Exception as error:  # noqa: BLE001 - as concurrent.futures does
                answer.set_exception(error)

        self.call_later(0.001 * self._rng.random(), work)
        return answer

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any) -> Any:
        assert self.connect is not None
        return await self.connect(protocol_factory, host)

    def _process_events(self, event_list: Any) -> None:
        raise NotImplementedError

    def _asyncgen_finalizer_hook(self, agen: Any) -> None:
        """Nobody finishes a generator for a process that is gone."""
        if not self.is_closed() and not ACTOR.get(self.world).dead:
            super()._asyncgen_finalizer_hook(agen)  # type: ignore[misc]
