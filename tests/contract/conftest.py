"""The worker's side by hand: every script as a call, with its token, its attempt and its seqs given by the test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from millstream import Client
from millstream.calls import Call, Claim, Ending, Frame, T, append, claim, holder, release, sweep
from millstream.events import compact, compact_text

STARTED = compact("started", worker="w", model="m", upstream="u")
DONE = compact("completed", finish_reasons={0: "stop"})
COMPLETED = Ending("completed", b'{"0":"stop"}')
LEASE = 15.0


@dataclass(slots=True)
class Hands:
    """Sends script calls. With `twice`, each call is sent again as it was, as after a lost reply."""

    client: Client
    twice: bool = False

    def send(self, call: Call[T]) -> T:
        reply = self.client.run(call)
        return self.client.run(call) if self.twice else reply

    def claim(self, job_id: str, token: str = "t1", *, nth: int | None = None, lease: float = LEASE) -> Claim:
        return self.send(claim(self.client.keys, job_id, token, lease, nth))

    def append(
        self, job_id: str, first: int, *events: bytes, token: str = "t1", attempt: int = 1, lease: float = LEASE,
        usage: bytes = b"", ending: Ending | None = None,
    ) -> tuple[str, int]:  # fmt: skip
        """The code and last seq of an append for one job."""
        frame = Frame(job_id, self.client.keys.written(job_id), holder(token, attempt), first, events, usage, ending)
        return self.append_many([frame], lease=lease)[0]

    def append_many(self, frames: Sequence[Frame], *, lease: float = LEASE) -> list[tuple[str, int]]:
        replies = self.send(append(self.client.keys, lease, frames))
        return [(code, seq) for code, seq, _ in replies]

    def release(self, job_id: str, token: str = "t1", attempt: int = 1, **options: Any) -> str:
        return self.send(release(self.client.keys, job_id, holder(token, attempt), lease=LEASE, **options))

    def sweep(self, *job_ids: str, oldest: Mapping[str, int | None] | None = None, lease: float = LEASE) -> list[Any]:
        lanes = {"interactive": None, "batch": None} if oldest is None else oldest
        found = self.client.run(sweep(self.client.keys, lease, job_ids, lanes))
        return list(found)

    def begin(self, job_id: str, *texts: str, lease: float = LEASE) -> None:
        """Claim as attempt 1 of token t1, write `started` and some text."""
        assert self.claim(job_id, lease=lease).outcome == "claimed"
        self.append(job_id, 1, STARTED, *map(compact_text, texts), lease=lease)

    def state(self, job_id: str) -> dict[str, str]:
        found = self.client.redis.hgetall(self.client.keys.state(job_id))
        return {name.decode(): value.decode() for name, value in found.items()}

    def now_ms(self) -> int:
        """The server's clock, which all scripts use."""
        seconds, micros = self.client.redis.time()
        return int(seconds * 1000 + micros // 1000)

    def let_lapse(self, job_id: str, field: str = "lease") -> None:
        """Wait until a time in the job's state has come."""
        until = int(self.state(job_id)[field])
        while self.now_ms() <= until:
            time.sleep(0.001)

    def make_past(self, job_id: str, field: str) -> None:
        """As if a time in the job's state had come, however far ahead it is."""
        self.client.redis.hset(self.client.keys.state(job_id), field, self.now_ms() - 1)

    @contextmanager
    def from_now(self) -> Iterator[Callable[[int], range]]:
        """`after(ms)`: the moments (ms, the server's clock) so long after what happens in the block, however long
        that takes.
        """
        began = self.now_ms()
        ended: list[int] = []

        def after(ms: int) -> range:
            return range(began + ms, ended[0] + ms + 1)

        yield after
        ended.append(self.now_ms())

    def make_due(self, *job_ids: str) -> None:
        """Have the sweep look at these jobs now."""
        self.client.redis.zadd(self.client.keys.open, dict.fromkeys(job_ids, 1))

    def everything(self) -> dict[str, Any]:
        """All that is stored, to tell that nothing was written. Times to live are left out."""
        redis = self.client.redis
        read = {
            b"string": redis.get, b"hash": redis.hgetall, b"stream": redis.xrange, b"set": redis.smembers,
            b"list": lambda key: redis.lrange(key, 0, -1),
            b"zset": lambda key: redis.zrange(key, 0, -1, withscores=True),
        }  # fmt: skip
        return {key: read[redis.type(key)](key) for key in sorted(redis.scan_iter("*"))}


@pytest.fixture
def hands(client: Client) -> Hands:
    return Hands(client)


@pytest.fixture(params=[False, True], ids=["once", "twice"])
def sent(request: pytest.FixtureRequest, client: Client) -> Hands:
    """As `hands`; in the second round every call is sent twice, and must have the effect and the reply of one."""
    return Hands(client, twice=request.param)


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which of the two clients."""
    return str(request.param)


class Clock:
    """What the fake server takes for the time."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def time(self) -> float:
        return self.now

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The server's clock, in the test's hand."""
    made = Clock()
    for module in ("commands_mixins.server_mixin", "_helpers", "_socket._base"):
        monkeypatch.setattr(f"fakeredis.{module}.time", made)
    return made
