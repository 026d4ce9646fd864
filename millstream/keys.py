"""Every name in Redis, spelled once. The braces are literal.

| name                    | type                 | holds                                                   |
|-------------------------|----------------------|---------------------------------------------------------|
| `P:{JOB}:spec`          | STRING               | the spec, JSON                                          |
| `P:{JOB}:state`         | HASH                 | status, holder, attempt, lease, seq, times, usage, ...  |
| `P:{JOB}:log`           | STREAM               | the events, in packs                                    |
| `P:{JOB}:chunks`        | PUB/SUB              | each event as it is appended, one JSON object           |
| `P:open`                | ZSET                 | jobs without a terminal event, by when to look at them  |
| `P:{JOB}:log:building`  | STREAM               | the same events in large packs, until it replaces the log |
| `P:repack`              | ZSET                 | ended jobs whose log is still in small packs            |
| `P:ended`               | STREAM, and PUB/SUB  | id and status of every job that ended                   |
| `P:limit:meters`        | ZSET                 | names of meters (UPSTREAM/MODEL), by when they are forgotten |
| `P:limit:waiting`       | ZSET                 | meters with a line, by when their next job is due       |
| `P:limit:learned`       | ZSET                 | meters an upstream has limited or cools, by until when  |
| `P:limit:METER:meter`   | HASH                 | limits, counts in the window, cool-down, what was learned |
| `P:limit:METER:used`    | HASH                 | requests and tokens by slot of the window               |
| `P:limit:METER:tickets` | ZSET                 | tickets of running requests, by when their lease ends   |
| `P:limit:METER:held`    | HASH                 | ticket: lane, slot, tokens reserved                     |
| `P:limit:METER:line:LANE` | ZSET               | deliveries that wait for the limit, by when they were submitted |
| `P:limit:METER:front`   | ZSET                 | requests of running jobs that wait, by when they lapse |
| `P:limit:METER:replies` | HASH                 | the last answer to each worker                          |
| `P-LANE`                | RQ queue             | deliveries: RQ jobs named `JOB-NONCE`                   |

`P` is the prefix, `millstream` unless `MILLSTREAM_PREFIX` says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

LANES = ("interactive", "batch")
"""The lanes, the first served first."""

DEFAULT_PREFIX = "millstream"


def text_of(name: bytes) -> str:
    """A name as Redis has it. Anybody may have written it there: one that is no text names nothing of ours."""
    return name.decode("utf-8", "replace")


@lru_cache(maxsize=1000)
def _meter(prefix: str, name: str) -> tuple[str, ...]:
    keys = Keys(prefix)
    own = [f"{prefix}:limit:{name}:{part}" for part in ("meter", "used", "tickets", "held")]
    lines = [keys.line(name, lane) for lane in LANES]
    more = [f"{prefix}:limit:{name}:{part}" for part in ("front", "replies")]
    return (*own, *lines, *more, keys.meters, keys.waiting, keys.learned)


@dataclass(frozen=True, slots=True)
class Keys:
    """The names under one prefix."""

    prefix: str = DEFAULT_PREFIX

    def spec(self, job_id: str) -> str:
        return f"{self.prefix}:{{{job_id}}}:spec"

    def state(self, job_id: str) -> str:
        return f"{self.prefix}:{{{job_id}}}:state"

    def log(self, job_id: str) -> str:
        return f"{self.prefix}:{{{job_id}}}:log"

    def building(self, job_id: str) -> str:
        return f"{self.prefix}:{{{job_id}}}:log:building"

    def written(self, job_id: str) -> tuple[str, str]:
        """What an append touches: the state and the log."""
        return self.state(job_id), self.log(job_id)

    def forgotten(self, job_id: str) -> tuple[str, str, str]:
        """What a forget touches: the state, the log and the spec."""
        return self.state(job_id), self.log(job_id), self.spec(job_id)

    def chunks(self, job_id: str) -> str:
        return f"{self.prefix}:{{{job_id}}}:chunks"

    @property
    def open(self) -> str:
        return f"{self.prefix}:open"

    @property
    def repack(self) -> str:
        return f"{self.prefix}:repack"

    @property
    def ended(self) -> str:
        return f"{self.prefix}:ended"

    @property
    def limit(self) -> bytes:
        """How every name of the limiter begins, as it is read from Redis."""
        return f"{self.prefix}:limit:".encode()

    @property
    def meters(self) -> str:
        return f"{self.prefix}:limit:meters"

    @property
    def waiting(self) -> str:
        return f"{self.prefix}:limit:waiting"

    @property
    def learned(self) -> str:
        return f"{self.prefix}:limit:learned"

    def line(self, meter: str, lane: str) -> str:
        return f"{self.prefix}:limit:{meter}:line:{lane}"

    def meter(self, name: str) -> tuple[str, ...]:
        """What every script of the limiter touches, in the order of `_meter.lua`."""
        return _meter(self.prefix, name)

    def queue(self, lane: str) -> str:
        """The RQ queue's name (RQ adds its own `rq:queue:` in front)."""
        return f"{self.prefix}-{lane}"

    def lane_of(self, queue: str) -> str:
        """The lane of such a queue."""
        return queue.removeprefix(f"{self.prefix}-")

    def job_of(self, channel: str) -> str:
        """The job id in the name of one of its keys or its channel."""
        return channel[len(self.prefix) + 2 : channel.rindex("}")]
