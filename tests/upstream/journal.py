"""What the server saw: every request, how far its answer came and how it ended, and a way to wait for any of it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from .request import Request

Outcome = Literal[
    "open", "finished", "client_closed", "reset_by_script", "closed_by_script", "server_stopped", "failed"
]
T = TypeVar("T")
PATIENCE = 30.0
"""Seconds a test waits for what must happen soon; only a failing test waits this long."""
Predicate = Callable[["Journal"], T | Literal[False] | None]


@dataclass(eq=False)
class Exchange:
    """One request and its answer. Times are seconds of time.monotonic, one clock for all processes of a Linux machine.

    `bytes_sent` (head and framing included) and `chunks_sent` (events that are chunks) count what the kernel has
    taken. `outcome` is "failed" if the test's own script raised, then `error` has it. `ended_at` is when the answer
    ended, whichever way; `closed_at` when the connection went, None while it lives or carries a later request.
    A client elsewhere may have the last byte a moment before the journal says so: wait for what you assert.
    """

    number: int
    connection: int
    request: Request
    status: int | None = None
    outcome: Outcome = "open"
    bytes_sent: int = 0
    chunks_sent: int = 0
    waiting_for: str | None = None
    ended_at: float | None = None
    closed_at: float | None = None
    error: BaseException | None = None

    def summary(self) -> dict[str, Any]:
        """All of it but the request's headers and body, which may hold secrets, as JSON has it."""
        shown = ("number", "connection", "status", "outcome", "bytes_sent", "chunks_sent", "waiting_for")
        asked = {"path": self.request.path, "model": self.request.model, "prompt": self.request.prompt}
        times = {"arrived_at": self.request.arrived_at, "ended_at": self.ended_at, "closed_at": self.closed_at}
        return {name: getattr(self, name) for name in shown} | asked | times


class Journal:
    """The exchanges in order of arrival. Written by the server's loop, read and waited on from any thread or loop."""

    def __init__(self, keep: int | None = None) -> None:
        """`keep` bounds how many exchanges are remembered, the oldest going first; None keeps all."""
        self._lock = threading.RLock()
        self._exchanges: deque[Exchange] = deque(maxlen=keep)
        self._watchers: list[Callable[[], None]] = []
        self._loop_thread: int | None = None
        self.total = 0
        self.open_streams = 0
        self.max_open_streams = 0

    def __len__(self) -> int:
        """How many exchanges are remembered."""
        return len(self._exchanges)

    def __iter__(self) -> Iterator[Exchange]:
        """The exchanges remembered at this moment."""
        with self._lock:
            return iter(list(self._exchanges))

    def __getitem__(self, at: int) -> Exchange:
        """The exchange at this place among those remembered, 0 the oldest, -1 the newest."""
        with self._lock:
            return self._exchanges[at]

    def requests_for(self, prompt: str) -> list[Exchange]:
        """The exchanges whose last user message is exactly this."""
        return [exchange for exchange in self if exchange.request.prompt == prompt]

    def waiting_for(self, gate: str) -> list[Exchange]:
        """The exchanges whose script is held at this gate now."""
        return [exchange for exchange in self if exchange.waiting_for == gate]

    def wait_for(self, predicate: Predicate[T], timeout: float = PATIENCE) -> T:
        """The predicate's first truthy answer; it is asked at once, then on the server's thread at every change.

        An IndexError of the predicate means not yet, so that it may say `journal[0]` before anyone has asked. For
        synchronous tests, whose server has its own thread. Raises TimeoutError with the journal in its message.
        """
        if threading.get_ident() == self._loop_thread:
            raise RuntimeError("wait_for would stop the very loop it waits on: use `await wait_for_async`")
        with self._watching(predicate) as answer:
            try:
                return answer.result(timeout)
            except TimeoutError:
                raise TimeoutError(self._told(timeout)) from None

    async def wait_for_async(self, predicate: Predicate[T], timeout: float = PATIENCE) -> T:
        """`wait_for` for a test with a loop, whether the server runs on the same one or in a thread."""
        with self._watching(predicate) as answer:
            try:
                return await asyncio.wait_for(asyncio.wrap_future(answer), timeout)
            except TimeoutError:
                raise TimeoutError(self._told(timeout)) from None

    @contextmanager
    def _watching(self, predicate: Predicate[T]) -> Iterator[concurrent.futures.Future[T]]:
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()
        answer.set_running_or_notify_cancel()  # a waiter that gives up must not cancel it under the server's hands

        def ask() -> None:
            if answer.done():
                return
            try:
                found = predicate(self)
            except IndexError:
                return
            except Exception as error:  # noqa: BLE001 - the predicate is the test's; its error belongs to the waiter
                answer.set_exception(error)
            else:
                if found:
                    answer.set_result(found)

        with self._lock:
            self._watchers.append(ask)
            ask()
        try:
            yield answer
        finally:
            with self._lock:
                self._watchers.remove(ask)

    def _told(self, timeout: float) -> str:
        entries = "\n".join(f"  {exchange.summary()}" for exchange in list(self)[-50:])
        return f"not so within {timeout} s; {self.open_streams} open, the newest of {self.total}:\n{entries}"

    def bind(self) -> None:
        """Says that this thread runs the server's loop."""
        self._loop_thread = threading.get_ident()

    def begin(self, connection: int, request: Request) -> Exchange:
        """A request has arrived."""
        with self._lock:
            self.total += 1
            exchange = Exchange(self.total, connection, request)
            self._exchanges.append(exchange)
            self.open_streams += 1
            self.max_open_streams = max(self.max_open_streams, self.open_streams)
            self.changed()
        return exchange

    def end(self, exchange: Exchange, outcome: Outcome, error: BaseException | None = None) -> None:
        """Its answer has ended like this; the first to say so is right."""
        with self._lock:
            if exchange.outcome == "open":
                exchange.outcome, exchange.error, exchange.ended_at = outcome, error, time.monotonic()
                self.open_streams -= 1
                self.changed()

    def changed(self) -> None:
        """Asks every waiting predicate again. Costs nothing while nobody waits, so it may follow every write."""
        if self._watchers:
            with self._lock:
                for ask in list(self._watchers):
                    ask()
