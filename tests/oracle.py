"""The oracle of every experiment: what must hold of a job's log, its consumers and its keys, whatever happened before.

Plain functions over a `redis.Redis` of bytes, for every suite: unit, contract, live, faults and simulation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from millstream.events import TERMINAL_STATUSES, AnyEvent, Chunk, unpack
from millstream.keys import Keys

_TTL_SPREAD_MS = 1000


def read_log(redis: Any, keys: Keys, job_id: str) -> list[AnyEvent]:
    """The events of a log, unpacked from the raw stream, whose entries must be what docs/wire.md says."""
    events: list[AnyEvent] = []
    for entry_id, fields in redis.xrange(keys.log(job_id)):
        last, _, rest = entry_id.partition(b"-")
        assert rest == b"0", f"{job_id}: the entry {entry_id!r} is not LASTSEQ-0"
        assert set(fields) == {b"a", b"t", b"e"}, f"{job_id}: the entry {entry_id!r} has the fields {sorted(fields)}"
        assert msgspec.json.decode(fields[b"e"]), f"{job_id}: the pack {entry_id!r} is empty"
        pack = unpack(entry_id, fields)
        assert pack[-1].seq == int(last), f"{job_id}: the pack {entry_id!r} ends at {pack[-1].seq}"
        events += pack
    return events


def check_log(client: Any, job_id: str) -> list[AnyEvent]:
    """Check an ended job and return its log: its seqs, its one end, its state and TTLs, nothing open or held."""
    redis, keys = client.redis, client.keys
    log = read_log(redis, keys, job_id)
    _check_order(job_id, log)
    state = {name.decode(): value.decode() for name, value in redis.hgetall(keys.state(job_id)).items()}
    assert state["status"] == log[-1].type, f"{job_id}: the state says {state['status']}, the log {log[-1].type}"
    assert int(state["seq"]) == len(log), f"{job_id}: the state counts {state['seq']} events, the log {len(log)}"
    assert int(state["attempt"]) == log[-1].attempt, f"{job_id}: the state has attempt {state['attempt']}: {log[-1]}"
    ended, last = int(state["ended"]), round(log[-1].at * 1000)
    assert last <= ended, f"{job_id}: ended at {ended}, {log[-1]}"
    # A repacked log has the time of a pack's first event for all of it.
    assert last == ended or redis.xlen(keys.log(job_id)) < len(log), f"{job_id}: ended at {ended}, {log[-1]}"
    held = {"holder", "lease", "not_before", "wait"} & set(state)
    assert not held, f"{job_id}: ended, and still has {held}"
    assert redis.zscore(keys.open, job_id) is None, f"{job_id}: ended, and still open"
    _check_retention(redis, keys, job_id, int(state["retention"]))
    return log


def _check_order(job_id: str, log: Sequence[AnyEvent]) -> None:
    assert [event.seq for event in log] == list(range(1, len(log) + 1)), f"{job_id}: {[e.seq for e in log]}"
    attempts = [event.attempt for event in log]
    assert attempts == sorted(attempts), f"{job_id}: attempts decrease: {attempts}"
    ends = [event.seq for event in log if event.type in TERMINAL_STATUSES]
    assert ends == [len(log)], f"{job_id}: terminal events at {ends}, the log has {len(log)} events"


def _check_retention(redis: Any, keys: Keys, job_id: str, retention_ms: int) -> None:
    ends = [redis.pexpiretime(name(job_id)) for name in (keys.spec, keys.state, keys.log)]
    assert min(ends) > 0, f"{job_id}: spec, state, log expire at {ends} ms"
    assert max(ends) - min(ends) <= _TTL_SPREAD_MS, f"{job_id}: spec, state, log expire apart: {ends} ms"
    left = redis.pttl(keys.state(job_id))
    assert left <= retention_ms, f"{job_id}: expires in {left} ms, its retention is {retention_ms} ms"


def check_consumers(lists: Iterable[Sequence[AnyEvent]], log: Sequence[AnyEvent]) -> None:
    """Every consumer's list of events equals the log."""
    for number, seen in enumerate(lists):
        if list(seen) == list(log):
            continue
        seqs = [event.seq for event in seen]
        odd = next((pair for pair in zip(seen, log, strict=False) if pair[0] != pair[1]), None)
        raise AssertionError(
            f"consumer {number} saw {len(seqs)} of {len(log)} events; first difference {odd}; its seqs: {seqs}"
        )


def timeless(events: Iterable[AnyEvent]) -> list[AnyEvent]:
    """The events without their times, which a repacked log rounds and a worker that sends them again renews."""
    return [msgspec.structs.replace(event, at=0.0) for event in events]


def answers(log: Iterable[AnyEvent], index: int = 0) -> dict[int, list[str]]:
    """The text of a choice by attempt, cut at its seams: what an upstream sent without being asked to go on."""
    found: dict[int, list[str]] = {}
    for event in log:
        if event.type == "started":
            found[event.attempt] = [""]
        elif event.type == "resumed":
            found[event.attempt].append("")
        elif isinstance(event, Chunk) and event.index == index:
            found[event.attempt][-1] += event.content
    return found


def check_at_rest(client: Any) -> None:
    """Nothing is open, waits to be repacked or was forgotten on its way; no key stays for ever."""
    redis, keys = client.redis, client.keys
    assert not redis.zcard(keys.open), f"still open: {redis.zrange(keys.open, 0, -1)}"
    assert not redis.zcard(keys.repack), f"still to be repacked: {redis.zrange(keys.repack, 0, -1)}"
    check_keys(redis, keys)


_OURS = re.compile(r"^\{([^}]+)\}:(spec|state|log)$")


def check_keys(redis: Any, keys: Keys) -> None:
    """Every key has a TTL, but for what must live: open jobs, the feed, the queues and what waits in them."""
    still_open = {job_id.decode() for job_id in redis.zrange(keys.open, 0, -1)}
    waiting = {
        rq_id.decode() for name in redis.scan_iter("rq:queue:*", _type="list") for rq_id in redis.lrange(name, 0, -1)
    } | {
        member.decode().rpartition(":")[0]  # in the line of a limit
        for name in redis.scan_iter(f"{keys.prefix}:limit:*:line:*", _type="zset")
        for member in redis.zrange(name, 0, -1)
    }  # fmt: skip
    stray = [
        name
        for name in map(bytes.decode, redis.scan_iter("*"))
        if redis.ttl(name) == -1 and not _may_stay(name, keys, still_open, waiting)
    ]
    assert not stray, f"keys without a TTL: {sorted(stray)}"


def end_cool_down(redis: Any, keys: Keys, meter: str) -> None:
    """As if its time had come."""
    redis.hset(keys.meter(meter)[0], "cooling", 0)
    redis.zadd(keys.waiting, {meter: 0})


def end_line(redis: Any, keys: Keys, meter: str, lane: str) -> None:
    """Take everybody out of a line: their deliveries are gone, as they would be once they were worked off."""
    line = keys.line(meter, lane)
    members = [member.decode().rpartition(":")[0] for member in redis.zrange(line, 0, -1)]
    redis.delete(line, *(f"rq:job:{delivery}" for delivery in members))


def _may_stay(name: str, keys: Keys, still_open: set[str], waiting: set[str]) -> bool:
    if name in (keys.open, keys.ended, "rq:queues", "rq:workers"):
        return True
    if name.startswith("rq:"):
        _, kind, rest = name.split(":", 2)
        return kind in ("queue", "worker", "workers") or (kind == "job" and rest in waiting)
    ours = _OURS.match(name.removeprefix(f"{keys.prefix}:"))
    return ours is not None and ours[1] in still_open
