"""Consumers of both kinds behind one face: a thread that follows jobs and keeps what it saw."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Final

from millstream import AsyncClient, Client, Event

PATIENCE: Final = 30.0
"""Seconds a test waits for what must happen soon; only a failing test waits this long."""


def wait_until(holds: Callable[[], object], what: str = "the condition") -> None:
    """Poll until it holds; AssertionError after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come about in {PATIENCE:g} s"
        time.sleep(0.001)


class Stop(Exception):  # noqa: N818 - it ends a consumer, nothing is wrong
    """Raised inside a consumer to have it end where it stands."""


class Consumer:
    """Follows in a thread of its own, with a client of its own. `events` by job grows as they come."""

    def __init__(
        self,
        make: Callable[[], Client | AsyncClient],
        job_ids: Sequence[str],
        after: int = 0,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.events: dict[str, list[Event]] = {job_id: [] for job_id in job_ids}
        self.error: BaseException | None = None
        self._make, self._ids, self._after, self._on_event = make, job_ids, after, on_event
        self._stop = False
        self._thread = threading.Thread(target=self._run, name=f"consumer of {job_ids[0]}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            client = self._make()
            if isinstance(client, AsyncClient):
                asyncio.run(self._follow_async(client))
            else:
                with client:
                    for job_id, event in client.follow_many(self._ids, self._after):
                        self._take(job_id, event)
        except Stop:
            pass
        except BaseException as error:  # noqa: BLE001 - it is raised where the test waits
            self.error = error

    async def _follow_async(self, client: AsyncClient) -> None:
        async with client, aclosing(client.follow_many(self._ids, self._after)) as found:
            async for job_id, event in found:
                self._take(job_id, event)

    def _take(self, job_id: str, event: Event) -> None:
        self.events[job_id].append(event)
        self._on_event(event)
        if self._stop:
            raise Stop

    def stop(self) -> None:
        """End at the next event, wherever it stands."""
        self._stop = True

    def seen(self, seq: int, job_id: str | None = None) -> bool:
        """Whether it has seen this event; raises what ended it before."""
        if self.error:
            raise self.error
        events = self.events[job_id or self._ids[0]]
        return bool(events) and events[-1].seq >= seq

    def wait_for(self, seq: int, job_id: str | None = None) -> None:
        wait_until(lambda: self.seen(seq, job_id), f"event {seq}")

    def join(self, within: float = PATIENCE) -> dict[str, list[Event]]:
        """Wait for its end and return what it saw."""
        self._thread.join(within)
        assert not self._thread.is_alive(), f"it still follows; seen: { {k: len(v) for k, v in self.events.items()} }"
        if self.error:
            raise self.error
        return self.events


def join_all(consumers: Iterable[Consumer]) -> list[dict[str, list[Event]]]:
    """What each of them saw."""
    return [consumer.join() for consumer in consumers]
