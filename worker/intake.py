"""Takes deliveries from the lanes, as many as there are free slots, and turns them into claimed jobs.

    queue ──take──> intermediate list ──read──> entry ──(ticket)──> claim──> relay
                                          │        │           └ busy, closed, unknown: the delivery is done with
                                          │        └ no ticket now: it waits in its meter's line, which holds no slot
                                          └ poison: put aside with its reason

Where a limit is set, the ticket comes before the claim, and from the first of the line, whoever put it there.

While idle it waits with `BLMOVE queue queue LEFT LEFT`, which moves the head onto itself: it blocks until there is
something and takes nothing, so that nothing can be lost in a reply, however the wait ends.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import redis.exceptions
import structlog

from millstream import calls
from millstream.async_client import AsyncClient
from millstream.calls import Call, Claim
from millstream.errors import RedisUnavailable, SpecError
from millstream.job import Spec, parse
from millstream.redis_door import translated

from .clerk import Clerk
from .ending import end
from .limiter import Grant
from .rq_worker import Entry, PoisonError, StreamWorker
from .tickets import Leave, Tickets
from .turns import COSTLY

BATCH: Final = 50
PEEK: Final = 2.0
"""Seconds one blocking wait lasts, below the socket's timeout."""

SUSPENDED: Final = 0.5
"""Seconds between looks while RQ is suspended."""

AWAY_FIRST: Final = 0.05
AWAY: Final = 0.5
"""Seconds between looks while Redis is away: soon at first, since what was claimed has a lease that runs; doubling."""

log = structlog.get_logger()

Begin = Callable[[Entry, Spec | SpecError, str, Claim, Leave], None]
T = TypeVar("T")


class Intake:
    """The way in. `begin` is called for each job that was claimed."""

    def __init__(
        self, client: AsyncClient, worker: StreamWorker, clerk: Clerk, slots: int, begin: Begin,
        tickets: Tickets,
    ) -> None:  # fmt: skip
        self._client = client
        self._worker = worker
        self._clerk = clerk
        self._begin = begin
        self._tickets = tickets
        self._free = slots
        self._freed = asyncio.Event()
        self._away = 0.0  # seconds until the next look, 0.0 while Redis answers
        self._stopping = asyncio.Event()
        self._peeks: dict[str, asyncio.Task[bool]] = {}

    def stop(self) -> None:
        """Take nothing more; `run` returns once what it has taken is turned in."""
        self._stopping.set()
        self._freed.set()

    def free(self) -> None:
        """A slot is free again."""
        self._free += 1
        self._freed.set()

    async def run(self, *, burst: bool) -> None:
        """Until `stop`; with `burst` until the lanes are empty."""
        stop = asyncio.create_task(self._stopping.wait())
        try:
            while not self._stopping.is_set():
                self._freed.clear()
                if self._free <= 0:
                    await self._freed.wait()
                    continue
                try:
                    taken = await self._client.run(self._worker.take(min(self._free, BATCH)))
                    self._away = 0.0
                    if taken:
                        await self._turn_in(taken)
                    if taken is not None and await self._serve_lines():
                        continue
                    if not taken:
                        if burst and taken is not None and not self._tickets.lines:
                            return
                        await self._wait(stop, suspended=taken is None)
                except RedisUnavailable as error:
                    await self._while_away(error)
        finally:
            await end((stop, *self._peeks.values()))  # one that went on would connect again after the client's close

    async def _wait(self, stop: asyncio.Task[Any], *, suspended: bool) -> None:
        if suspended:
            await asyncio.sleep(SUSPENDED)
            return
        for key in self._worker.queue_keys():
            if key not in self._peeks:
                self._peeks[key] = asyncio.create_task(self._peek(key))
        moves = asyncio.create_task(self._tickets.moves())
        try:
            waits = [stop, moves, *self._peeks.values()]
            done, _ = await asyncio.wait(waits, timeout=self._tickets.patience(), return_when=asyncio.FIRST_COMPLETED)
        finally:
            moves.cancel()
        self._peeks = {key: peek for key, peek in self._peeks.items() if peek not in done}
        for failure in [each.exception() for each in done if each is not moves]:
            if failure is not None:
                raise failure

    async def _peek(self, key: str) -> bool:
        try:
            return await self._client.redis.blmove(key, key, PEEK, "LEFT", "LEFT") is not None
        except redis.exceptions.RedisError as error:
            raise RedisUnavailable(str(error)) from error

    async def _insist(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until Redis answers: letting go of what was taken or claimed would cost it an attempt, or minutes."""
        while True:
            try:
                return await ask()
            except RedisUnavailable as error:
                if self._stopping.is_set():
                    raise
                await self._while_away(error)

    async def _while_away(self, error: RedisUnavailable) -> None:
        if not self._away:
            log.warning("intake.redis_away", reason=str(error))
        self._away = min(2 * self._away or AWAY_FIRST, AWAY)
        await asyncio.sleep(self._away)

    async def _turn_in(
        self,
        taken: Sequence[tuple[int | None, str]],
        grants: Mapping[str, Grant] | None = None,
        *,
        want: int | None = None,
    ) -> None:
        """Deliveries become running jobs; `grants`: the tickets of those that come from a line.

        `want`: how many tickets are taken at most, None: as many as there are free slots.
        """
        entries = await self._insist(lambda: self._read(taken))
        leaves: dict[str, Leave] = dict(grants or {})
        if entries:
            # Before the claim: to parse many large specs takes seconds, in which nobody would renew the leases.
            specs = await self._insist(lambda: self._specs(entries))
            if grants is None:
                admitted = await self._tickets.admit(entries, specs, self._free if want is None else want, self._insist)
                entries, leaves = admitted.begin, admitted.leaves
                for others in admitted.others:
                    await self._turn_in([(None, delivery) for delivery in others], others)
                await self._count_anew(admitted.anew)
                for entry in admitted.put_off:
                    self._clerk.ended(entry, "error")
            await self._claim_all(entries, specs, leaves)
        for leave in leaves.values():  # of deliveries that are gone from under it
            self._tickets.give_back(leave)

    async def _claim_all(
        self, entries: Sequence[Entry], specs: Mapping[str, Spec | SpecError], leaves: dict[str, Leave]
    ) -> None:
        if not entries:
            return
        tokens = [secrets.token_hex(8) for _ in entries]
        keys, lease = self._client.keys, self._client.settings.lease
        wanted = [calls.claim(keys, each.job_id, token, lease) for each, token in zip(entries, tokens, strict=True)]
        claims = await self._insist(lambda: self._claim(wanted))
        for entry, token, claim in zip(entries, tokens, claims, strict=True):
            leave = leaves.pop(entry.rq_job.id, None)
            if claim.outcome == "claimed":
                self._free -= 1
                self._clerk.started(entry)
                self._begin(entry, specs[entry.rq_job.id], token, claim, leave)
            else:
                self._tickets.give_back(leave)
                log.info("intake.nothing_to_do", job=entry.job_id, because=claim.outcome, status=claim.status)
                self._clerk.ended(entry, claim.status or claim.outcome)

    async def _serve_lines(self) -> bool:
        """Begin jobs whose turn in a line has come, own or others'. Whether there were any."""
        served = False
        async for grants, anew in self._tickets.due(lambda: min(self._free, BATCH), self._insist):
            served = True
            await self._turn_in([(None, delivery) for delivery in grants], grants)
            await self._count_anew(anew)
        return served

    async def _count_anew(self, deliveries: Sequence[str]) -> None:
        """A limit was lowered while these were in line: they fail as too large, or join the line once more."""
        if deliveries:
            await self._turn_in([(None, delivery) for delivery in deliveries], want=0)

    # Reading -----------------------------------------------------------------------------------------------------

    async def _read(self, taken: Sequence[tuple[int | None, str]]) -> list[Entry]:
        pipe = self._client.redis.pipeline(transaction=False)
        for _, rq_id in taken:
            pipe.hgetall(self._worker.job_key(rq_id))
        try:
            hashes = await pipe.execute(raise_on_error=False)
        except redis.exceptions.RedisError as error:
            raise RedisUnavailable(str(error)) from error
        entries = []
        for (queue_number, rq_id), fields in zip(taken, hashes, strict=True):
            try:
                entries.append(self._read_one(queue_number, rq_id, fields))
            except PoisonError as poison:
                log.warning("intake.put_aside", rq_job=rq_id[:100], reason=str(poison))
                keep = isinstance(fields, dict) and bool(fields)
                with translated(self._client.settings.redis_url):
                    await self._clerk.do(self._worker.put_aside, queue_number or 0, rq_id, str(poison), keep)
        return entries

    def _read_one(self, queue_number: int | None, rq_id: str, fields: Any) -> Entry:
        if isinstance(fields, redis.exceptions.RedisError):
            if "WRONGTYPE" not in str(fields):
                raise RedisUnavailable(str(fields)) from fields
            raise PoisonError("its hash is of another type")
        try:
            number = self._worker.queue_of(fields) if queue_number is None else queue_number
            return self._worker.read(number, rq_id, fields)
        except (ValueError, TypeError) as error:  # RQ's own refusal of an id
            raise PoisonError(str(error)[:200]) from None

    async def _claim(self, wanted: Sequence[Call[Claim]]) -> Sequence[Claim]:
        """All at once; one by one when a job's keys are of another type, since that one's error is not the others'."""
        try:
            return await self._client.run_many(wanted)
        except RedisUnavailable as error:
            if not _broken_keys(error):
                raise
        claims = []
        for call in wanted:
            try:
                claims.append(await self._client.run(call))
            except RedisUnavailable as error:
                if not _broken_keys(error):
                    raise
                claims.append(Claim("error"))
        return claims

    async def _specs(self, entries: Sequence[Entry]) -> dict[str, Spec | SpecError]:
        """Specs by delivery. On the way: when the jobs were submitted, and what Redis knows of limits."""
        keys = self._client.keys
        pipe = self._client.redis.pipeline(transaction=False)
        self._tickets.ask(pipe)
        for entry in entries:
            pipe.get(keys.spec(entry.job_id))
            pipe.hget(keys.state(entry.job_id), "created")
        try:
            replies = await pipe.execute(raise_on_error=False)
        except redis.exceptions.RedisError as error:
            raise RedisUnavailable(str(error)) from error
        for reply in replies:
            if isinstance(reply, redis.exceptions.RedisError) and "WRONGTYPE" not in str(reply):
                raise RedisUnavailable(str(reply)) from reply
        self._tickets.note(replies[:3])
        specs = {}
        bodies, created = replies[3::2], replies[4::2]
        for number, (entry, body, at) in enumerate(zip(entries, bodies, created, strict=True)):
            # Jobs of one millisecond keep the order of their lane.
            entry.since = (float(at) if isinstance(at, bytes) and at.isdigit() else 0.0) + number / 1000
            specs[entry.rq_job.id] = _spec(body)
            if isinstance(body, bytes) and len(body) >= COSTLY:
                await asyncio.sleep(0)  # parsing takes up to 70 ms, and there are others on the loop
        return specs


def _broken_keys(error: RedisUnavailable) -> bool:
    """Whether a script ended with an error of its own, rather than the server being in no state to run it."""
    return type(error.__cause__) is redis.exceptions.ResponseError and "user_script" in str(error.__cause__)


def _spec(body: Any) -> Spec | SpecError:
    if not isinstance(body, bytes):
        return SpecError("the spec is missing: its key was deleted or expired; submit the job again")
    try:
        return parse(body)
    except SpecError as error:
        return error
