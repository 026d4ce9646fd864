"""The asyncio face of the library: the same methods as `Client`, as coroutines and async iterators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from types import TracebackType
from typing import Any, Self

import redis.asyncio
from redis.asyncio.client import PubSub
from redis.exceptions import NoScriptError

from . import calls, job, meters, reading, status
from .batch.answer import Answer
from .batch.course import FEED, WINDOW, Course, Hand, Listen, Pipe, Sleep, Take
from .batch.row import Reader
from .batch.source import AsyncObjects
from .batch.source import AsyncSource as Source
from .batch.source import GivenAsyncRows as GivenRows
from .calls import Call, T
from .errors import JobNotFound, RedisUnavailable
from .events import Event
from .face import Face
from .keys import text_of
from .meters import Gauge
from .outage import RECONNECT, Outage
from .reading import LISTEN, Following, Reading
from .redis_door import COMMAND_TIMEOUT, PIPELINE, connect_async, translated
from .result import Ended, Job, Narrator, OnContent, OnRestart, Result, endings, outcome, raise_for_end
from .status import Status
from .transcript import Transcript


class AsyncClient(Face):
    """Submit jobs, follow them, read their results. One client serves many tasks of one loop; close it when done."""

    @staticmethod
    def _connect(url: str) -> Any:
        return connect_async(url)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connections back."""
        await self.redis.aclose()

    # Asking ------------------------------------------------------------------------------------------------------

    async def submit(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        id: str | None = None,
        **asked: Any,
    ) -> Job:
        """Accept a job: once this returns, the job survives kill -9 of every process.

        `asked`: `model`, what a job may ask for (`lane, timeout, max_attempts, expires, retention, on_break, metadata`;
        times in seconds) and OpenAI parameters. Raises SpecError, JobExists (known id, other spec), RedisUnavailable.
        """
        job_id, call = self._submission({**asked, "prompt": prompt, "messages": messages, "id": id})
        return Job(id=job_id, created=await self.run(call))

    async def submit_many(self, requests: Iterable[Mapping[str, Any]]) -> Sequence[Job]:
        """Accept many jobs in few round trips; each request holds the arguments of `submit`.

        All are checked before the first is sent. Raises what `submit` raises; a retry with the same ids doubles none.
        """
        ids, wanted = self._submissions(requests)
        return [Job(id=job_id, created=new) for job_id, new in zip(ids, await self.run_many(wanted), strict=True)]

    async def cancel(self, job_id: str) -> str:
        """End a job in whatever state; returns the status it has now: the first terminal event wins.

        Raises JobNotFound, RedisUnavailable.
        """
        return await self.run(calls.cancel(self.keys, job.check_id(job_id)))

    async def forget(self, job_id: str) -> None:
        """Let Redis drop an ended job in a minute; who still reads it can finish.

        Raises JobNotFound, MillstreamError for a job that has not ended, RedisUnavailable.
        """
        await self.run(calls.forget(self.keys, job.check_id(job_id)))

    # A batch -----------------------------------------------------------------------------------------------------

    async def batch(
        self, rows: GivenRows, *, window: int = WINDOW, lane: str = "batch", batch_id: str | None = None
    ) -> AsyncGenerator[Answer]:
        """Ask many rows, each in the format of the OpenAI Batch API; yield each Answer as its row ends, in any order.

        `rows` is read lazily, so that at most `window` jobs are open. A row that cannot be asked is an Answer too. What
        was yielded is dropped from Redis when you come back for more. Given the same `batch_id`, the same rows are the
        same jobs: those that were open or not yet yielded are picked up again. Raises RedisUnavailable at its
        beginning; later outages are waited out.
        """
        reader = Reader(batch_id or job.new_id(), lane=lane)
        source = AsyncObjects(rows, reader)
        async with aclosing(source), aclosing(self.run_batch(self.course(window), source)) as lists:
            async for answers in lists:
                for answer in answers:
                    yield answer

    async def run_batch(self, course: Course, source: Source) -> AsyncGenerator[list[Answer]]:
        """Answers as they come, in lists; an empty list at least every second. Coming back for more says: kept."""
        steps = course.steps()
        reply: Any = None
        while True:
            try:
                ask = steps.throw(reply) if isinstance(reply, RedisUnavailable) else steps.send(reply)
            except StopIteration:
                return
            reply = None
            if isinstance(ask, Hand):
                yield ask.answers
            elif isinstance(ask, Take):
                reply = await source.take(ask.most)
            elif isinstance(ask, Sleep):
                await asyncio.sleep(ask.seconds)
            else:
                reply = await self._reply(ask)

    async def _reply(self, ask: Pipe | Listen) -> Any:
        try:
            with translated(self._url):
                if isinstance(ask, Pipe):
                    pipe = self.redis.pipeline(transaction=False)
                    ask.fill(pipe)
                    return await pipe.execute(raise_on_error=False)
                found = await self.redis.xread({ask.key: ask.cursor}, count=FEED, block=ask.milliseconds)
                return found[0][1] if found else []
        except RedisUnavailable as error:
            return error

    # Looking -----------------------------------------------------------------------------------------------------

    async def status(self, job_id: str) -> Status:
        """The job's state now. Raises JobNotFound."""
        found = await self._statuses([job.check_id(job_id)])
        if not found:
            raise JobNotFound(job_id)
        return found[0]

    async def list(self, state: str | None = None, *, limit: int = 100) -> Sequence[Status]:
        """Open jobs, then ended ones with the newest first, at most `limit`. `state` keeps those of one status; of the
        ended ones the newest 10 x `limit` are looked at. Raises RedisUnavailable.
        """
        with translated(self._url):
            members = await self.redis.zrange(self.keys.open, 0, -1)
            feed = await self.redis.xrevrange(self.keys.ended, count=10 * limit)
        names = [*members, *(fields.get(b"id", b"") for _, fields in feed)]
        ids = dict.fromkeys(job.ids_among(names))
        found: list[Status] = []
        for start in range(0, len(ids), 500):
            found += [
                each for each in await self._statuses(list(ids)[start : start + 500]) if state in (None, each.status)
            ]
            if len(found) >= limit:
                break
        return found[:limit]

    async def limits(self) -> Sequence[Gauge]:
        """The meters of all upstreams and models that workers limit or were limited by, as they are now."""
        with translated(self._url):
            names = [text_of(each) for each in await self.redis.zrange(self.keys.meters, 0, -1)]
        found = await self.run_many([meters.look(self.keys, name) for name in sorted(names)])
        return [each for each in found if each is not None]

    async def follow(self, job_id: str, after: int = 0) -> AsyncGenerator[Event]:
        """Every event with a seq above `after`, in order, each once, up to the terminal one.

        Resumes by itself over any disconnect. Raises JobNotFound, JobExpired, LogRewound, RedisUnavailable.
        """
        async with aclosing(self.follow_many([job_id], after)) as events:
            async for _, event in events:
                yield event

    async def follow_many(self, job_ids: Iterable[str], after: int = 0) -> AsyncGenerator[tuple[str, Event]]:
        """The events of several jobs as (job id, event), over one subscription, until all have ended."""
        async with aclosing(self._follow(Following(map(job.check_id, job_ids), after, clock=self._clock))) as events:
            async for event in events:
                yield event

    async def stream(
        self, job_id: str, on_content: OnContent | None = None, on_restart: OnRestart | None = None, after: int = 0
    ) -> str:
        """Call `on_content(text)` with every piece as it comes, and return the whole final text.

        `on_restart(attempt, reason)` comes before new text when the text so far is void. With `after`, the text begins
        above that seq. Raises JobFailed, JobCancelled, and what `follow` raises.
        """
        narrator = Narrator(on_content, on_restart, shown=after > 0)
        async with aclosing(self.follow(job_id, after)) as events:  # a callback may raise
            async for event in events:
                narrator.feed(event)
        raise_for_end(job_id, narrator.transcript)
        return narrator.transcript.text

    async def result(self, job_id: str, timeout: float | None = None) -> Result:
        """Wait for the end, at most `timeout` seconds, and return the answer; `completed` and `incomplete` alike.

        Raises JobFailed, JobCancelled, ResultTimeout (a TimeoutError), and what `follow` raises.
        """
        found = await self.outcome(job_id, timeout)
        raise_for_end(job_id, found[1])
        return found[0]

    async def outcome(self, job_id: str, timeout: float | None = None) -> tuple[Result, Transcript]:
        """As `result`, for any ending: nothing is raised for a failed or cancelled job."""
        transcript = Transcript()
        following = Following([job.check_id(job_id)], clock=self._clock)
        async for _, event in self._follow(following, timeout):
            transcript.feed(event)
        return outcome(job_id, transcript), transcript

    async def ended(self, after: str | None = None) -> AsyncGenerator[Ended]:
        """Every job as it ends, for ever: from now on, or after a cursor an earlier entry gave ("0" = all kept).

        Outlasts a server that goes away for OUTAGE seconds, then raises RedisUnavailable. The feed keeps about the last
        100,000 endings: who was away for longer misses some without a sign, and looks at its jobs by `status`.
        """
        cursor, outage = after, Outage(self._clock)
        while True:
            try:
                with translated(self._url):
                    if cursor is None:
                        newest = await self.redis.xrevrange(self.keys.ended, count=1)
                        cursor = newest[0][0].decode() if newest else "0"
                        outage.answered()
                    found = await self.redis.xread({self.keys.ended: cursor}, count=1000, block=int(LISTEN * 1000))
            except RedisUnavailable as error:
                outage.outlast(error)
                await asyncio.sleep(RECONNECT)
                continue
            outage.answered()
            for each in endings(found):
                cursor = each.cursor
                yield each

    # The shell around the decisions ------------------------------------------------------------------------------

    async def run(self, call: Call[T]) -> T:
        """Run one script call; retried on a lost reply, which every script allows."""
        script = call.load(header=self._header)
        with translated(self._url):
            try:
                reply = await self.redis.evalsha(script.sha, len(call.keys), *call.keys, *call.args)
            except NoScriptError:
                reply = await self.redis.eval(script.text, len(call.keys), *call.keys, *call.args)
        return call.decode(reply)

    async def run_many(self, wanted: Sequence[Call[T]]) -> Sequence[T]:
        """Run calls in pipelines of PIPELINE; raises what the first of them raises that fails."""
        values: list[T] = []
        for start in range(0, len(wanted), PIPELINE):
            values += await self._run_some(wanted[start : start + PIPELINE])
        return values

    async def _run_some(self, wanted: Sequence[Call[T]]) -> Sequence[T]:
        with translated(self._url):
            replies = await self._ask_many(wanted)
            if any(isinstance(reply, NoScriptError) for reply in replies):
                for script in {call.load(header=self._header) for call in wanted}:
                    await self.redis.script_load(script.text)
                replies = await self._ask_many(wanted)  # those that had run say so again
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
        return [call.decode(reply) for call, reply in zip(wanted, replies, strict=True)]

    async def _ask_many(self, wanted: Sequence[Call[Any]]) -> Sequence[Any]:
        pipe = self.redis.pipeline(transaction=False)
        for call in wanted:
            pipe.evalsha(call.load(header=self._header).sha, len(call.keys), *call.keys, *call.args)
        replies: Sequence[Any] = await pipe.execute(raise_on_error=False)
        return replies

    async def _statuses(self, job_ids: Sequence[str]) -> Sequence[Status]:
        with translated(self._url):
            pipe = self.redis.pipeline(transaction=False)
            for job_id in job_ids:
                pipe.hgetall(self.keys.state(job_id))
                pipe.get(self.keys.spec(job_id))
            replies = await pipe.execute(raise_on_error=False)
            for reply in replies:
                if isinstance(reply, redis.exceptions.RedisError) and "WRONGTYPE" not in str(reply):
                    raise reply
        return status.from_replies(job_ids, replies)

    async def _page(self, at: Reading) -> reading.Page:
        with translated(self._url):
            pipe = self.redis.pipeline(transaction=True)
            pipe.xrange(self.keys.log(at.job_id), min=f"{max(1, at.cursor)}-0", count=reading.PAGE)
            pipe.hmget(self.keys.state(at.job_id), reading.STATE_FIELDS)
            if at.begun:
                pipe.xrange(self.keys.log(at.job_id), min=f"{at.begun}-0", count=1)
            replies = await pipe.execute()
        return reading.page(*replies)

    async def _follow(self, following: Following, timeout: float | None = None) -> AsyncGenerator[tuple[str, Event]]:
        until = None if timeout is None else self._clock() + timeout
        while due := following.due():  # what has ended already needs no subscription
            for each in following.read(due[0], await self._page(due[0])):
                yield each
        outage = Outage(self._clock, until)
        outage.answered()
        while following.open:
            try:
                async with self._subscribed(following.open) as pubsub:
                    following.reconnected()
                    while following.open and not following.deaf:
                        batch = await self._next(pubsub, following, until)
                        outage.answered()
                        for each in batch:
                            yield each
            except RedisUnavailable as error:
                outage.outlast(error)
                await asyncio.sleep(RECONNECT)

    async def _next(self, pubsub: PubSub, following: Following, until: float | None) -> Sequence[tuple[str, Event]]:
        if due := following.due():
            return following.read(due[0], await self._page(due[0]))
        wait = following.patience(LISTEN, until)
        with translated(self._url):
            message = await pubsub.get_message(timeout=wait)
        return following.take(message, self.keys.job_of)

    @asynccontextmanager
    async def _subscribed(self, job_ids: Sequence[str]) -> AsyncIterator[PubSub]:
        async with self.redis.pubsub() as pubsub:
            with translated(self._url):
                await pubsub.subscribe(*map(self.keys.chunks, job_ids))
                for _ in job_ids:  # the log may be read only after the server has acknowledged each
                    if await pubsub.get_message(timeout=COMMAND_TIMEOUT) is None:
                        raise redis.exceptions.TimeoutError("no acknowledgement of a subscription")
            yield pubsub
