"""One writer per process carries all jobs' events to the log, many jobs in one script call.

A chunk goes out at once when the line is idle. While a call is in flight everything else merges in the outboxes, and
the next call takes it all: load makes events bigger, not latency longer. `flush` (seconds) sets the least time between
calls by hand; without it the pause grows with the rate of what the jobs have to say, up to MAX_PAUSE.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import structlog

from millstream.calls import Call, Frame, append
from millstream.errors import RedisUnavailable
from millstream.keys import Keys

from .outbox import MAX_FRAME, Outbox

MAX_CALL: Final = 256 * 1024
"""Bytes of events in one call (the script must not keep the server from others)."""

MAX_JOBS: Final = 256
"""Jobs in one call."""

MAX_PAUSE: Final = 0.005
PAUSE_PER_RATE: Final = 2e-6
"""The pause by load: 2 us for each message a second, so that from 2,500 a second on (50 streams of 50) it is 5 ms, and
a few streams do not wait at all. A pause of 5 ms halves the cost of a chunk at 50 streams and adds 3 ms of latency."""

SHORT: Final = 0.0005
"""A pause below this is none: the loop's own turn is about as long."""

RATE_MEMORY: Final = 0.25
"""Seconds over which the rate of messages is averaged."""

HEARTBEAT: Final = 0.4
"""Seconds without a write after which a job is carried without events: it renews the lease and learns of a cancel. With
the call itself and one that is in its way, each job is carried at least every 0.5 s."""

RETRY_DELAYS: Final = (0.05, 0.1, 0.2, 0.5, 1.0)

log = structlog.get_logger()

Run = Callable[[Call[Any]], Awaitable[Any]]


class Writer:
    """Sends what the outboxes hold, forever, whatever Redis does."""

    def __init__(self, run: Run, keys: Keys, lease: float, flush: float | None) -> None:
        self._run = run
        self._keys = keys
        self._lease = lease
        self._flush = flush
        self._outboxes: set[Outbox] = set()
        self._dirty: dict[Outbox, None] = {}  # in the order of their turns
        self._wake = asyncio.Event()
        self._heartbeat = min(HEARTBEAT, lease / 4)
        self._next_beat = 0.0
        self._begun = 0.0  # the last call, by the loop's clock: a pause includes the call itself
        self._noted = 0.0
        self._rate = 0.0  # messages a second

    def add(self, outbox: Outbox) -> None:
        """Carry this outbox from now on."""
        outbox.written_at = asyncio.get_running_loop().time()
        self._outboxes.add(outbox)

    def remove(self, outbox: Outbox) -> None:
        """No longer."""
        self._outboxes.discard(outbox)
        self._dirty.pop(outbox, None)

    def notify(self, outbox: Outbox) -> None:
        """The outbox has something to send."""
        self._dirty[outbox] = None
        self._wake.set()

    def heartbeats(self) -> list[Frame]:
        """A heartbeat for each job that is carried now. Made of nothing that changes: another thread may ask."""
        living = [each for each in list(self._outboxes) if not (each.ended or each.stopped)]
        return [each.heartbeat() for each in living]

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._turn(loop)
            self._begun = loop.time()
            batch = self._gather(self._begun)
            if not batch:
                continue
            self._note_rate(sum(1 for _, frame in batch if frame.events), self._begun)
            replies = await self._send([frame for _, frame in batch])
            now = loop.time()
            for (outbox, _), (code, seq, message) in zip(batch, replies, strict=True):
                if code == "error":
                    log.error("writer.refused", job=outbox.job_id, reason=message[:200])
                outbox.written_at = now
                outbox.answered(code, seq)
                # Also when it is carried no more: what the server lost while its relay waits for silence comes again.
                if outbox.waiting and (outbox in self._outboxes or code == "gap"):
                    self.notify(outbox)

    async def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait until a call is due: something waits and the pause is over, or a heartbeat."""
        if not self._dirty:
            self._wake.clear()
            try:
                async with asyncio.timeout_at(self._next_beat):
                    await self._wake.wait()
            except TimeoutError:
                return
        if (left := self._begun + self._pause() - loop.time()) > 0:
            await asyncio.sleep(left)

    def _pause(self) -> float:
        if self._flush is not None:
            return self._flush
        pause = min(MAX_PAUSE, self._rate * PAUSE_PER_RATE)
        return pause if pause >= SHORT else 0.0

    def _note_rate(self, messages: int, now: float) -> None:
        """An exponential average over time: calls are not evenly spaced."""
        passed = max(1e-6, now - self._noted)
        kept = math.exp(-passed / RATE_MEMORY)
        self._rate = self._rate * kept + (1 - kept) * messages / passed
        self._noted = now

    def _gather(self, now: float) -> Sequence[tuple[Outbox, Frame]]:
        # The silent come first: however much the others have to say, leases are renewed and cancels noticed in time.
        batch = [(outbox, outbox.freeze()) for outbox in self._silent(now)]
        size = 0
        while self._dirty and size + MAX_FRAME <= MAX_CALL and len(batch) < MAX_JOBS:
            outbox = next(iter(self._dirty))
            del self._dirty[outbox]
            frame = outbox.freeze()
            size += sum(map(len, frame.events))
            batch.append((outbox, frame))
        return batch

    def _silent(self, now: float) -> Sequence[Outbox]:
        """Whose heartbeat is due, the longest silent first; whoever is halfway there comes along, to save calls."""
        if now < self._next_beat:
            return []
        living = (each for each in self._outboxes if not (each.ended or each.stopped or each in self._dirty))
        silent = sorted(living, key=lambda each: each.written_at)
        most = MAX_JOBS // 2 if self._dirty else MAX_JOBS
        due = [each for each in silent[:most] if each.written_at + self._heartbeat / 2 <= now]
        left = silent[len(due) :]
        self._next_beat = (left[0].written_at if left else now) + self._heartbeat
        return due

    async def _send(self, frames: Sequence[Frame]) -> Sequence[tuple[str, int, str]]:
        """Ask until there is an answer; the frames stay as they are."""
        call = append(self._keys, self._lease, frames)
        failures = 0
        while True:
            try:
                replies: Sequence[tuple[str, int, str]] = await self._run(call)
            except RedisUnavailable as error:
                if failures == 0:
                    log.warning("redis.away", reason=str(error))
                await asyncio.sleep(RETRY_DELAYS[min(failures, len(RETRY_DELAYS) - 1)])
                failures += 1
            else:
                if failures:
                    log.info("redis.back", tries=failures)
                return replies
