"""Follow one job with plain redis-py: `REDIS_URL=... python docs/examples/follow.py JOB [AFTER]`; one event a line.

It shows every step of "Reading" in docs/wire.md, as a client in any language would take them, without the library.
"""
# ruff: noqa: INP001 - a program on its own, in no package

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import redis

TERMINAL = ("completed", "incomplete", "failed", "cancelled")
SILENCE = 15.0  # seconds after which the log is read although nothing was heard
PACKS = 256  # read at once


def unpack(entry_id: str, fields: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The events of one pack: the entry's id is the seq of its last event."""
    items = json.loads(fields["e"])
    first = int(entry_id.partition("-")[0]) - len(items) + 1
    for seq, item in enumerate(items, first):
        index, n, text = (0, 1, item) if isinstance(item, str) else item if isinstance(item, list) else (0, 0, None)
        event = item if text is None else {"type": "chunk", "index": index, "delta": {"content": text}, "n": n}
        yield {"v": 1, "seq": seq, "attempt": int(fields["a"]), "at": int(fields["t"]) / 1000, **event}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two events are one, but for `at`, which repacking rounds."""
    return {**one, "at": 0} == {**other, "at": 0}


class Follower:
    """One consumer's place in one job's log."""

    def __init__(self, connection: redis.Redis, job: str, after: int = 0, prefix: str = "millstream") -> None:
        self.redis: Any = connection
        self.state, self.log, self.channel = (f"{prefix}:{{{job}}}:{part}" for part in ("state", "log", "chunks"))
        self.cursor = after  # the last seq that was taken
        self.seen: dict[str, Any] | None = None  # the event at the cursor, None while unknown
        self.begun: dict[str, Any] = {}  # the `started` of its attempt, empty while unknown
        self.known = self.ended = False

    def events(self) -> Iterator[dict[str, Any]]:
        """Every event above the cursor, in order, each once, up to the terminal one."""
        while not self.ended:
            try:
                with self.redis.pubsub() as live:
                    live.subscribe(self.channel)
                    yield from self.listen(live)
            except (redis.ConnectionError, redis.TimeoutError):
                if not self.known:
                    raise  # never reached: the address may be wrong
                time.sleep(0.25)  # then subscribe and read the log again

    def listen(self, live: Any) -> Iterator[dict[str, Any]]:
        """Go from message to message; the log is read whenever the channel alone does not say what comes next."""
        while not self.ended:
            message = live.get_message(timeout=SILENCE)
            if message is not None and message["type"] == "message":
                event = json.loads(message["data"])
                if event["seq"] == self.cursor + 1:
                    yield self.take(event)
                    continue
                if event["seq"] <= self.cursor and not self.contradicts(event):
                    continue
            before = self.cursor
            yield from self.read()  # acknowledged (after a reconnect, too), a gap, a doubt, or silence
            if message is None and self.cursor > before:
                return  # there was news and nobody told: nothing comes over this subscription

    def contradicts(self, event: dict[str, Any]) -> bool:
        """Whether an event at or below the cursor is no late copy of what was taken: the log knows."""
        if event["type"] in TERMINAL or self.seen is None:
            return event["type"] in TERMINAL
        another = event["seq"] == self.cursor and not same(event, self.seen)
        return another or event["attempt"] > self.seen["attempt"]

    def read(self) -> Iterator[dict[str, Any]]:
        """Take the log from the cursor to its end."""
        while not self.ended:
            with self.redis.pipeline(transaction=True) as both:
                both.xrange(self.log, min=f"{max(1, self.cursor)}-0", count=PACKS)
                both.hmget(self.state, "seq", "status")
                both.xrange(self.log, min=f"{self.begun.get('seq', 1)}-0", count=1)
                packs, (seq, status), begun = both.execute()
            if seq is None:
                raise LookupError("JobExpired: it was there" if self.known else "JobNotFound")
            self.known = True
            if self.cursor > int(seq):
                raise RuntimeError("LogRewound: the log ends before what was seen")
            for event in (each for pack in begun for each in unpack(*pack)):
                if event["seq"] == self.begun.get("seq") and event.get("mark") != self.begun.get("mark"):
                    raise RuntimeError("LogRewound: another attempt stands where the one that was seen began")
            for event in (each for pack in packs for each in unpack(*pack)):
                if event["seq"] == self.cursor and self.seen is not None and not same(event, self.seen):
                    raise RuntimeError("LogRewound: another event at the seq that was seen last")
                if event["seq"] > self.cursor + 1:
                    raise LookupError("JobExpired: the log's beginning is gone")
                if event["seq"] == self.cursor + 1:
                    yield self.take(event)
            if self.cursor == int(seq) and status in TERMINAL:
                self.ended = True  # also when the cursor lay at the end from the start
            if len(packs) < PACKS:
                if self.cursor < int(seq):
                    raise LookupError("JobExpired: the log's end is gone")
                return

    def take(self, event: dict[str, Any]) -> dict[str, Any]:
        """Move the cursor to the next event."""
        self.cursor, self.seen = event["seq"], event
        self.begun = event if event["type"] == "started" else self.begun
        self.ended = event["type"] in TERMINAL
        return event


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not all(each.isdecimal() for each in sys.argv[2:]):
        sys.exit(f"usage: {sys.argv[0]} JOB [AFTER]; AFTER is the last seq you have, 0 for none")
    url = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
    after = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    try:
        connection = redis.Redis.from_url(url, decode_responses=True)
    except ValueError:  # without redis-py's words, which may quote a piece of the password
        sys.exit("REDIS_URL: found an address that cannot be used, expected redis://[:PASSWORD@]HOST[:PORT][/DB]")
    try:
        for each in Follower(connection, sys.argv[1], after).events():
            print(json.dumps(each), flush=True)  # noqa: T201 - stdout is its interface
    except (LookupError, RuntimeError, redis.RedisError) as error:
        sys.exit(str(error))
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(1)  # nothing is left to flush
