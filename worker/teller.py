"""What this process tells Redis of its tickets, in batches and by one task, so that no stream waits for it.

What an upstream said goes first: until it is known, others ask an upstream that wants to be left alone.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import structlog

from millstream import meters
from millstream.calls import Call
from millstream.errors import RedisUnavailable
from millstream.keys import Keys
from millstream.meters import Settlement

from .line import KeysBrokenError

AWAY: Final = 0.5
"""Seconds between tries while Redis is away."""

BATCH: Final = 500
"""Settlements in one call."""

log = structlog.get_logger()


class Teller:
    """`moves`: is told that a line may move on, and in how many seconds; `broken`: that a meter's keys are not ours."""

    def __init__(
        self, run: Callable[[Call[Any]], Awaitable[Any]], keys: Keys, *, lease: float,
        moves: Callable[[str, float], None], broken: Callable[[str, KeysBrokenError], None],
    ) -> None:  # fmt: skip
        self._run, self._keys, self._lease = run, keys, lease
        self._moves, self._broken = moves, broken
        self._held: dict[str, set[str]] = defaultdict(set)  # by meter: tickets to renew
        self._learned: deque[tuple[str, Call[float]]] = deque()
        self._settled: dict[str, list[Settlement]] = {}
        self._work = asyncio.Event()

    def hold(self, name: str, tickets: Iterable[str]) -> None:
        """Renew these tickets of a meter until they are settled or let go of."""
        self._held[name].update(tickets)

    def let_go(self, name: str, ticket: str) -> None:
        """Renew it no more."""
        self._held[name].discard(ticket)

    def settle(self, name: str, settlement: Settlement) -> None:
        """Settle a ticket, soon."""
        self.let_go(name, settlement.ticket)
        self._settled.setdefault(name, []).append(settlement)
        self._work.set()

    def learn(self, name: str, call: Call[float]) -> None:
        """Pass on what an upstream said, at once."""
        self._learned.append((name, call))
        self._work.set()

    async def run(self) -> None:
        """Until cancelled: settle, renew and pass on."""
        renew_at = self._now() + self._lease / 3
        while True:
            try:
                async with asyncio.timeout_at(renew_at):
                    await self._work.wait()
            except TimeoutError:
                pass
            try:
                await self.flush()
                if self._now() >= renew_at:
                    await self._renew()
                    renew_at = self._now() + self._lease / 3
            except RedisUnavailable as error:
                log.warning("limits.wait", reason=str(error))
                await asyncio.sleep(AWAY)

    async def flush(self) -> None:
        """Send what there is to pass on and to settle. Raises RedisUnavailable; what is left is kept."""
        self._work.clear()
        try:
            while self._learned or self._settled:
                if self._learned:
                    await self._pass_on(*self._learned[0])
                    self._learned.popleft()
                else:
                    await self._settle_some(*next(iter(self._settled.items())))
        except RedisUnavailable:
            self._work.set()
            raise

    async def _pass_on(self, name: str, call: Call[float]) -> None:
        try:
            await self._run(call)
        except KeysBrokenError as error:
            self._broken(name, error)

    async def _settle_some(self, name: str, settlements: list[Settlement]) -> None:
        some = settlements[:BATCH]
        try:
            again: float | None = await self._run(meters.settle(self._keys, name, some))
        except KeysBrokenError as error:  # it cannot be told; others can
            self._broken(name, error)
            again, some = None, list(settlements)
        del settlements[: len(some)]
        if not settlements:
            del self._settled[name]
        if again is not None:
            self._moves(name, again)

    async def _renew(self) -> None:
        for name, tickets in list(self._held.items()):
            if not tickets:
                del self._held[name]
                continue
            try:
                lost = await self._run(meters.renew(self._keys, name, sorted(tickets), lease=self._lease))
            except KeysBrokenError as error:
                self._broken(name, error)
                continue
            if lost:
                log.warning("limits.tickets_had_run_out", meter=name, tickets=lost)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
