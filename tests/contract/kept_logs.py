"""Logs of all kinds of events, ended, and what is to be seen in them however they are repacked."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from millstream import Client
from millstream.calls import repack
from millstream.events import AnyEvent, Event, compact, compact_text
from millstream.reading import Reading
from tests.contract.conftest import COMPLETED, DONE, STARTED, Hands
from tests.oracle import check_log, read_log


def timeless(events: Sequence[Any]) -> list[Any]:
    return [msgspec.structs.replace(event, at=0.0) for event in events]


TEXTS: Final = ("a", " the", "", "\n\ndata: x", '"],["', "é😀", "\\u0000\x00", "\u202e", "{}", "x" * 300)


def some_event(rng: random.Random) -> bytes:
    """Any kind of event a worker may write, and one of a version to come."""
    kind = rng.randrange(12)
    if kind < 8:
        return compact_text(rng.choice(TEXTS), rng.choice((0, 0, 0, 2)), rng.choice((1, 1, 1, 9)))
    if kind == 8:
        call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": rng.choice(TEXTS)}}
        return compact("chunk", index=1, n=1, delta={"tool_calls": [call]})
    if kind == 9:
        return compact("chunk", index=0, n=2, delta={"reasoning": rng.choice(TEXTS)})
    if kind == 10:
        return compact("retrying", error={"code": "rate_limited", "message": "é"}, delay=1.5)
    return compact("of_the_future", of=[rng.choice(TEXTS), {"deep": [[]]}])


def end_a_log(hands: Hands, job_id: str, events: int, rng: random.Random, pack: int = 3, attempts: int = 3) -> None:
    """Write about so many events, in packs of 1 to `pack` and in up to so many attempts, and end the job."""
    hands.client.submit("Hi", id=job_id)
    attempt, seq = hands.claim(job_id).attempt, 0
    while seq < events:
        if seq and attempt < attempts and rng.random() < attempts / events:
            attempt = hands.claim(job_id, nth=attempt + 1).attempt
        carried = [STARTED] if seq == 0 else [some_event(rng) for _ in range(rng.randint(1, pack))]
        assert hands.append(job_id, seq + 1, *carried, attempt=attempt)[0] == "ok"
        seq += len(carried)
    assert hands.append(job_id, seq + 1, DONE, attempt=attempt, ending=COMPLETED)[0] == "ok"


@dataclass
class Kept:
    """An ended log as it was, to look at its repacking again and again."""

    client: Client
    job_id: str

    def __post_init__(self) -> None:
        keys, redis = self.client.keys, self.client.redis
        self._entries = redis.xrange(keys.log(self.job_id))
        self.events: list[AnyEvent] = timeless(check_log(self.client, self.job_id))

    def put_back(self) -> None:
        """The log as it was when the job ended."""
        keys, redis = self.client.keys, self.client.redis
        pipe = redis.pipeline(transaction=True)
        pipe.delete(keys.log(self.job_id), keys.building(self.job_id))
        for entry_id, fields in self._entries:
            pipe.xadd(keys.log(self.job_id), fields, id=entry_id)
        pipe.pexpire(keys.log(self.job_id), redis.pttl(keys.state(self.job_id)))
        pipe.zadd(keys.repack, {self.job_id: 1})
        pipe.pexpire(keys.repack, 3_600_000)
        pipe.execute()

    def step(self, packs: int) -> str:
        return self.client.run(repack(self.client.keys, self.job_id, packs))

    def finish(self, packs: int) -> int:
        """All steps there are; how many they were."""
        for number in range(1, 10_000):
            if self.step(packs) == "done":
                return number
        raise AssertionError("it never ends")

    def pages(self, after: int, between: Callable[[], object] = lambda: None) -> list[Event]:
        """What a reader sees that starts at a cursor and has something happen between its pages."""
        at, seen = Reading(self.job_id, after), list[Event]()
        while not at.ended:
            seen += at.read(self.client._page(at))
            between()
        return seen

    def shown(self) -> list[AnyEvent]:
        """The events that readers are shown: those of types to come are not."""
        return [event for event in self.events if isinstance(event, Event)]

    def check(self, cursors: Sequence[int]) -> None:
        """The log and what is read from these cursors is what it was."""
        assert timeless(read_log(self.client.redis, self.client.keys, self.job_id)) == self.events
        for after in cursors:
            assert timeless(self.pages(after)) == [event for event in self.shown() if event.seq > after]

    @property
    def packs(self) -> int:
        return int(self.client.redis.xlen(self.client.keys.log(self.job_id)))
