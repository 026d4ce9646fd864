"""Where the upstream's key and a job's prompt and answer may be, and that they are nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.upstream import Chunk, Raw, Reset, Script, Text, WaitFor, answer, error, html
from tests.valkey import Valkey
from tests.world import KEY, World

PROMPT: Final = "prompt-canary-77aa1c"
SAID: Final = "answer-canary-b81f20"

pytestmark = pytest.mark.experiment(37)


def everything(redis: Any) -> Iterator[tuple[str, str]]:
    """Every key with all it holds, as text."""
    readers = {
        b"string": redis.get, b"hash": redis.hgetall, b"stream": redis.xrange, b"set": redis.smembers,
        b"list": lambda key: redis.lrange(key, 0, -1),
        b"zset": lambda key: redis.zrange(key, 0, -1),
    }  # fmt: skip
    for key in redis.scan_iter("*"):
        kind = redis.type(key)
        if kind in readers:
            yield key.decode(errors="replace"), repr(readers[kind](key))


def command_lines() -> Iterator[str]:
    """What `ps` shows of every process."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_text(errors="replace")
        except OSError:
            continue  # it ended while we looked


def test_key_and_prompt_stay_where_they_belong(world: World, valkey: Valkey) -> None:
    """Jobs that end in every way, an upstream that echoes the key, and a look at all of Redis, the logs and `ps`.

    The prompt is in the specs alone, the answer in the logs alone, the key in the requests alone.
    """
    scripts: dict[str, tuple[Script, ...]] = {
        "well": (answer(Chunk(SAID), Text(5)),),
        "broken": (Script(Chunk(SAID), Reset()),),
        "refused": (error(401, f"Incorrect API key provided: {KEY}.", error_code="invalid_api_key"),),
        "echoed": (error(500, f"upstream crashed on Bearer {KEY} and {PROMPT}"),),
        "page": (html(text=f"<html>{KEY}</html>"),),
        "malformed": (Script(Chunk(SAID, raw={"choices": [{"index": 10**6, "delta": {"content": KEY}}]})),),
        "held": (answer(Chunk(SAID), WaitFor("secrets"), Text(5)),),
    }
    for name, answers in scripts.items():
        world.upstream.on(*answers, prompt=f"{PROMPT} {name}")
    worker = world.worker(MILLSTREAM_RETRIES="0", MILLSTREAM_LOG="json")
    jobs = {name: world.submit(f"{PROMPT} {name}") for name in scripts}
    world.held("secrets")
    world.wait_for_seq(jobs["held"], 2)
    look(world)
    lines = list(command_lines())
    assert any("worker" in line for line in lines) or not Path("/proc/self").exists()
    assert not [line for line in lines if KEY in line or PROMPT in line]
    world.upstream.open_gate("secrets")
    for job_id in jobs.values():
        world.outcome(job_id)
        world.check(job_id)
    worker.terminate()
    assert worker.wait() == 0
    look(world)
    log = worker.log.read_text()
    assert [word for word in (KEY, PROMPT, SAID) if word in log] == []
    world.redis.save()
    written = files_of(valkey)
    assert any(PROMPT.encode() in content for content in written.values()), "the append-only file is not among them"
    assert [name for name, content in written.items() if KEY.encode() in content] == []
    assert all(each.request.headers["authorization"] == f"Bearer {KEY}" for each in world.upstream.journal)
    refused = world.outcome(jobs["refused"]).error
    assert refused is not None
    assert refused["message"] == "Incorrect API key provided: ***."


def files_of(server: Valkey) -> dict[str, bytes]:
    """What the server has written: its append-only files, a dump, its log."""
    return {str(path): path.read_bytes() for path in server.folder.rglob("*") if path.is_file()}


def look(world: World) -> None:
    specs, logs = (tuple(name(each.id) for each in world.client.list()) for name in (world.keys.spec, world.keys.log))
    states = tuple(world.keys.state(each.id) for each in world.client.list())
    found = dict(everything(world.redis))
    assert len(found) > 10
    assert [key for key, text in found.items() if KEY in text] == []
    # An upstream that quotes the prompt in its error is quoted in turn, in the job's own log and state.
    assert {key for key, text in found.items() if PROMPT in text} <= {*specs, *logs, *states}
    assert {key for key, text in found.items() if SAID in text} <= set(logs)
    assert set(specs) <= {key for key, text in found.items() if PROMPT in text}


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_traceback_does_not_show_them_either(world: World, style: str) -> None:
    """Whatever an upstream sends, the worker's own words about it hold neither key, prompt nor answer."""
    weird = [b"\xff\xfe" * 100, b"data: " + b"[" * 50_000 + b"\n\n", b'data: {"choices":[{"delta":{"content":5}}]}\n\n']
    for number, raw in enumerate(weird):
        world.upstream.on(Script(Chunk(SAID), Raw(raw)), prompt=f"{PROMPT} {number}")
    worker = world.start(MILLSTREAM_RETRIES="0", MILLSTREAM_LOG=style)
    jobs = [world.submit(f"{PROMPT} {number}", max_attempts=1) for number in range(len(weird))]
    for job_id in jobs:
        assert world.outcome(job_id).status == "failed"
    worker.terminate()
    assert worker.wait() == 0
    log = worker.log.read_text()
    assert "job.ended" in log
    assert [word for word in (KEY, PROMPT, SAID) if word in log] == []
