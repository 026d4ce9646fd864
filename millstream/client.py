"""The library's two faces on Redis, the blocking one here: a thin shell around calls.py and reading.py."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import redis
from redis.client import PubSub
from redis.exceptions import NoScriptError

from . import calls, job, meters, reading, status
from .batch.answer import Answer
from .batch.course import FEED, WINDOW, Course, Hand, Listen, Pipe, Sleep, Take
from .batch.row import Reader
from .batch.source import GivenRows, Objects, Source
from .calls import Call, T
from .errors import JobNotFound, RedisUnavailable
from .events import Event
from .face import Face
from .keys import text_of
from .meters import Gauge
from .outage import RECONNECT, Outage
from .reading import LISTEN, Following, Reading
from .redis_door import COMMAND_TIMEOUT, PIPELINE, connect, translated
from .result import Ended, Job, Narrator, OnContent, OnRestart, Result, endings, outcome, raise_for_end
from .status import Status
from .transcript import Transcript


class Client(Face):
    """Submit jobs, follow them, read their results. One client may be shared by threads; close it when done."""

    @staticmethod
    def _connect(url: str) -> Any:
        return connect(url)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self.redis.close()

    # Asking ------------------------------------------------------------------------------------------------------

    def submit(
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
        return Job(id=job_id, created=self.run(call))

    def submit_many(self, requests: Iterable[Mapping[str, Any]]) -> Sequence[Job]:
        """Accept many jobs in few round trips; each request holds the arguments of `submit`.

        All are checked before the first is sent. Raises what `submit` raises; a retry with the same ids doubles none.
        """
        ids, wanted = self._submissions(requests)
        return [Job(id=job_id, created=new) for job_id, new in zip(ids, self.run_many(wanted), strict=True)]

    def cancel(self, job_id: str) -> str:
        """End a job in whatever state; returns the status it has now: the first terminal event wins.

        Raises JobNotFound, RedisUnavailable.
        """
        return self.run(calls.cancel(self.keys, job.check_id(job_id)))

    def forget(self, job_id: str) -> None:
        """Let Redis drop an ended job in a minute; who still reads it can finish.

        Raises JobNotFound, MillstreamError for a job that has not ended, RedisUnavailable.
        """
        self.run(calls.forget(self.keys, job.check_id(job_id)))

    # A batch -----------------------------------------------------------------------------------------------------

    def batch(
        self, rows: GivenRows, *, window: int = WINDOW, lane: str = "batch", batch_id: str | None = None
    ) -> Generator[Answer, None, None]:
        """Ask many rows, each in the format of the OpenAI Batch API; yield each Answer as its row ends, in any order.

        `rows` is read lazily, so that at most `window` jobs are open. A row that cannot be asked is an Answer too. What
        was yielded is dropped from Redis when you come back for more. Given the same `batch_id`, the same rows are the
        same jobs: those that were open or not yet yielded are picked up again. Raises RedisUnavailable at its
        beginning; later outages are waited out.
        """
        reader = Reader(batch_id or job.new_id(), lane=lane)
        for answers in self.run_batch(self.course(window), Objects(rows, reader)):
            yield from answers

    def run_batch(self, course: Course, source: Source) -> Iterator[list[Answer]]:
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
                reply = source.take(ask.most)
            elif isinstance(ask, Sleep):
                time.sleep(ask.seconds)
            else:
                reply = self._reply(ask)

    def _reply(self, ask: Pipe | Listen) -> Any:
        try:
            with translated(self._url):
                if isinstance(ask, Pipe):
                    pipe = self.redis.pipeline(transaction=False)
                    ask.fill(pipe)
                    return pipe.execute(raise_on_error=False)
                found = self.redis.xread({ask.key: ask.cursor}, count=FEED, block=ask.milliseconds)
                return found[0][1] if found else []
        except RedisUnavailable as error:
            return error

    # Looking -----------------------------------------------------------------------------------------------------

    def status(self, job_id: str) -> Status:
        """The job's state now. Raises JobNotFound."""
        found = self._statuses([job.check_id(job_id)])
        if not found:
            raise JobNotFound(job_id)
        return found[0]

    def list(self, state: str | None = None, *, limit: int = 100) -> Sequence[Status]:
        """Open jobs, then ended ones with the newest first, at most `limit`. `state` keeps those of one status; of the
        ended ones the newest 10 x `limit` are looked at. Raises RedisUnavailable.
        """
        with translated(self._url):
            members = self.redis.zrange(self.keys.open, 0, -1)
            feed = self.redis.xrevrange(self.keys.ended, count=10 * limit)
        names = [*members, *(fields.get(b"id", b"") for _, fields in feed)]
        ids = dict.fromkeys(job.ids_among(names))
        found: list[Status] = []
        for start in range(0, len(ids), 500):
            found += [each for each in self._statuses(list(ids)[start : start + 500]) if state in (None, each.status)]
            if len(found) >= limit:
                break
        return found[:limit]

    def limits(self) -> Sequence[Gauge]:
        """The meters of all upstreams and models that workers limit or were limited by, as they are now."""
        with translated(self._url):
            names = [text_of(each) for each in self.redis.zrange(self.keys.meters, 0, -1)]
        found = self.run_many([meters.look(self.keys, name) for name in sorted(names)])
        return [each for each in found if each is not None]

    def follow(self, job_id: str, after: int = 0) -> Iterator[Event]:
        """Every event with a seq above `after`, in order, each once, up to the terminal one.

        Resumes by itself over any disconnect. Raises JobNotFound, JobExpired, LogRewound, RedisUnavailable.
        """
        for _, event in self.follow_many([job_id], after):
            yield event

    def follow_many(self, job_ids: Iterable[str], after: int = 0) -> Iterator[tuple[str, Event]]:
        """The events of several jobs as (job id, event), over one subscription, until all have ended."""
        yield from self._follow(Following(map(job.check_id, job_ids), after, clock=self._clock))

    def stream(
        self, job_id: str, on_content: OnContent | None = None, on_restart: OnRestart | None = None, after: int = 0
    ) -> str:
        """Call `on_content(text)` with every piece as it comes, and return the whole final text.

        `on_restart(attempt, reason)` comes before new text when the text so far is void. With `after`, the text begins
        above that seq. Raises JobFailed, JobCancelled, and what `follow` raises.
        """
        narrator = Narrator(on_content, on_restart, shown=after > 0)
        for event in self.follow(job_id, after):
            narrator.feed(event)
        raise_for_end(job_id, narrator.transcript)
        return narrator.transcript.text

    def result(self, job_id: str, timeout: float | None = None) -> Result:
        """Wait for the end, at most `timeout` seconds, and return the answer; `completed` and `incomplete` alike.

        Raises JobFailed, JobCancelled, ResultTimeout (a TimeoutError), and what `follow` raises.
        """
        found = self.outcome(job_id, timeout)
        raise_for_end(job_id, found[1])
        return found[0]

    def outcome(self, job_id: str, timeout: float | None = None) -> tuple[Result, Transcript]:
        """As `result`, for any ending: nothing is raised for a failed or cancelled job."""
        transcript = Transcript()
        following = Following([job.check_id(job_id)], clock=self._clock)
        for _, event in self._follow(following, timeout):
            transcript.feed(event)
        return outcome(job_id, transcript), transcript

    def ended(self, after: str | None = None) -> Iterator[Ended]:
        """Every job as it ends, for ever: from now on, or after a cursor an earlier entry gave ("0" = all kept).

        Outlasts a server that goes away for OUTAGE seconds, then raises RedisUnavailable. The feed keeps about the last
        100,000 endings: who was away for longer misses some without a sign, and looks at its jobs by `status`.
        """
        cursor, outage = after, Outage(self._clock)
        while True:
            try:
                with translated(self._url):
                    if cursor is None:
                        newest = self.redis.xrevrange(self.keys.ended, count=1)
                        cursor = newest[0][0].decode() if newest else "0"
                        outage.answered()
                    found = self.redis.xread({self.keys.ended: cursor}, count=1000, block=int(LISTEN * 1000))
            except RedisUnavailable as error:
                outage.outlast(error)
                time.sleep(RECONNECT)
                continue
            outage.answered()
            for each in endings(found):
                cursor = each.cursor
                yield each

    # The shell around the decisions ------------------------------------------------------------------------------

    def run(self, call: Call[T]) -> T:
        """Run one script call; retried on a lost reply, which every script allows."""
        script = call.load(header=self._header)
        with translated(self._url):
            try:
                reply = self.redis.evalsha(script.sha, len(call.keys), *call.keys, *call.args)
            except NoScriptError:
                reply = self.redis.eval(script.text, len(call.keys), *call.keys, *call.args)
        return call.decode(reply)

    def run_many(self, wanted: Sequence[Call[T]]) -> Sequence[T]:
        """Run calls in pipelines of PIPELINE; raises what the first of them raises that fails."""
        values: list[T] = []
        for start in range(0, len(wanted), PIPELINE):
            values += self._run_some(wanted[start : start + PIPELINE])
        return values

    def _run_some(self, wanted: Sequence[Call[T]]) -> Sequence[T]:
        with translated(self._url):
            replies = self._ask_many(wanted)
            if any(isinstance(reply, NoScriptError) for reply in replies):
                for script in {call.load(header=self._header) for call in wanted}:
                    self.redis.script_load(script.text)
                replies = self._ask_many(wanted)  # those that had run say so again
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
        return [call.decode(reply) for call, reply in zip(wanted, replies, strict=True)]

    def _ask_many(self, wanted: Sequence[Call[Any]]) -> Sequence[Any]:
        pipe = self.redis.pipeline(transaction=False)
        for call in wanted:
            pipe.evalsha(call.load(header=self._header).sha, len(call.keys), *call.keys, *call.args)
        replies: Sequence[Any] = pipe.execute(raise_on_error=False)
        return replies

    def _statuses(self, job_ids: Sequence[str]) -> Sequence[Status]:
        with translated(self._url):
            pipe = self.redis.pipeline(transaction=False)
            for job_id in job_ids:
                pipe.hgetall(self.keys.state(job_id))
                pipe.get(self.keys.spec(job_id))
            replies = pipe.execute(raise_on_error=False)
            for reply in replies:
                if isinstance(reply, redis.exceptions.RedisError) and "WRONGTYPE" not in str(reply):
                    raise reply
        return status.from_replies(job_ids, replies)

    def _page(self, at: Reading) -> reading.Page:
        with translated(self._url):
            pipe = self.redis.pipeline(transaction=True)
            pipe.xrange(self.keys.log(at.job_id), min=f"{max(1, at.cursor)}-0", count=reading.PAGE)
            pipe.hmget(self.keys.state(at.job_id), reading.STATE_FIELDS)
            if at.begun:
                pipe.xrange(self.keys.log(at.job_id), min=f"{at.begun}-0", count=1)
            replies = pipe.execute()
        return reading.page(*replies)

    def _follow(self, following: Following, timeout: float | None = None) -> Iterator[tuple[str, Event]]:
        until = None if timeout is None else self._clock() + timeout
        while due := following.due():  # what has ended already needs no subscription
            yield from following.read(due[0], self._page(due[0]))
        outage = Outage(self._clock, until)
        outage.answered()
        while following.open:
            try:
                with self._subscribed(following.open) as pubsub:
                    following.reconnected()
                    while following.open and not following.deaf:
                        batch = self._next(pubsub, following, until)
                        outage.answered()
                        yield from batch
            except RedisUnavailable as error:
                outage.outlast(error)
                time.sleep(RECONNECT)

    def _next(self, pubsub: PubSub, following: Following, until: float | None) -> Sequence[tuple[str, Event]]:
        if due := following.due():
            return following.read(due[0], self._page(due[0]))
        wait = following.patience(LISTEN, until)
        with translated(self._url):
            message = pubsub.get_message(timeout=wait)
        return following.take(message, self.keys.job_of)

    @contextmanager
    def _subscribed(self, job_ids: Sequence[str]) -> Iterator[PubSub]:
        with self.redis.pubsub() as pubsub:
            with translated(self._url):
                pubsub.subscribe(*map(self.keys.chunks, job_ids))
                for _ in job_ids:  # the log may be read only after the server has acknowledged each
                    if pubsub.get_message(timeout=COMMAND_TIMEOUT) is None:
                        raise redis.exceptions.TimeoutError("no acknowledgement of a subscription")
            yield pubsub
