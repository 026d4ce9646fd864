"""Ids and specs that nobody should send, from producers and straight into Redis."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Final

import pytest

from local import guard
from millstream import JobNotFound, SpecError
from tests.tally import TALLY
from tests.upstream import ScriptedUpstream
from tests.worker_process import environment
from tests.world import KEY, World

IDS: Final = [
    "", ".", "..", "../x", "/etc/passwd", "*", "?", "a:b", "{}", "{a}", "a}b", "a\r\nDEL b", "a\n", " a", "a b", "a\0",
    "x" * 65, "x" * 10_240, "é", "e\u0301", "漢字", "🌾", "١٢٣", "\u202ex", "a'b", 'a"b', "a;b", "$(id)", "%2e%2e",
    "a.b", "a,b", "-\x1b[31m",
]  # fmt: skip


@pytest.mark.experiment(35)
def test_ids_that_are_none_are_refused_everywhere(world: World) -> None:
    """Whatever is asked with such an id is refused before anything is sent, and Redis stays as empty as it was."""
    calls: list[Callable[[str], object]] = [
        lambda each: world.client.submit("x", id=each), world.client.status, world.client.cancel, world.client.forget,
        world.client.result, lambda each: list(world.client.follow(each)), world.client.stream,
    ]  # fmt: skip
    for each in IDS:
        for call in calls:
            with pytest.raises((SpecError, JobNotFound)):
                call(each)
            TALLY.trials += 1
    assert world.redis.keys("*") == []


@pytest.mark.experiment(35)
@pytest.mark.parametrize(
    ("command", "job_id"),
    [("submit", "../x"), ("submit", "x" * 10_240), ("follow", "a\r\nDEL b"), ("cancel", "{}"), ("status", "漢字")],
)
def test_the_command_line_refuses_them_in_a_sentence(world: World, command: str, job_id: str) -> None:
    """Exit status 2, one line on stderr, no traceback."""
    arguments = ["submit", "x", f"--id={job_id}"] if command == "submit" else [command, "--", job_id]
    done = subprocess.run(
        [sys.executable, "-m", "producer", *arguments], cwd=guard.ROOT, env=environment(world.environ), text=True,
        capture_output=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr) < 1000
    assert "Traceback" not in done.stderr
    assert world.redis.keys("*") == []
    TALLY.trials += 1


@pytest.mark.experiment(35)
def test_longest_and_plainest_ids_are_taken(world: World) -> None:
    """64 of A-Z a-z 0-9 _ - are an id, and so is one of them, a hyphen too."""
    world.worker()
    for each in ("x" * 64, "-", "_", "0", "A-z_9"):
        world.submit(f"as {each}", id=each)
        world.check_text(each, f"as {each}")
        world.check(each)
        TALLY.trials += 1


FOREIGN: Final = ("base_url", "api_key", "organization", "extra_headers", "extra_body", "extra_query", "proxy")


@pytest.mark.experiment(38)
def test_a_spec_cannot_name_an_upstream(world: World) -> None:
    """Not through the library, nor by writing the spec by hand: upstreams come from the worker's settings alone.

    Whoever is named in it is not asked, and no key goes anywhere.
    """
    with ScriptedUpstream() as elsewhere:
        values: dict[str, Any] = {"base_url": elsewhere.base_url, "extra_headers": {"authorization": "Bearer x"}}
        for name in FOREIGN:
            with pytest.raises(SpecError):
                world.client.submit("x", **{name: values.get(name, elsewhere.origin)})
            TALLY.trials += 1
        worker = world.worker()
        plain = {"model": "scripted", "messages": [{"role": "user", "content": "x"}]}
        for name in FOREIGN:
            value = values.get(name, elsewhere.origin)
            for spec in ({**plain, name: value}, {**plain, "params": {name: value}}):
                refused = by_hand(world, spec)
                assert refused["code"] == "invalid_spec"
                assert name in refused["message"]
                TALLY.trials += 1
        for model in (elsewhere.base_url, f"{elsewhere.base_url}/chat/completions", "openai/http://127.0.0.1:1"):
            world.submit("a model's name is no address", model=model)
            TALLY.trials += 1
        good = world.submit("after all of them")
        world.check_text(good, "after all of them")
        for each in world.client.list():
            world.outcome(each.id)
            world.check(each.id)
        assert len(elsewhere.journal) == 0
    assert {each.request.headers["authorization"] for each in world.upstream.journal} == {f"Bearer {KEY}"}
    assert worker.alive


def by_hand(world: World, spec: dict[str, Any]) -> dict[str, Any]:
    """Put this in place of an accepted job's spec before a worker sees it; the error the job ended with."""
    world.redis.set("rq:suspended", 1)
    job_id = world.submit("to be replaced")
    world.redis.set(world.keys.spec(job_id), json.dumps(spec), keepttl=True)
    world.redis.delete("rq:suspended")
    error = world.outcome(job_id).error
    assert error is not None
    return error
