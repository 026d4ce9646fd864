"""What the documentation tells people to type works, on a real server and through the scripts a worker uses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import pytest
import redis

from millstream import AsyncClient, Client, Settings, calls
from millstream.events import compact_text, encode
from millstream.testing import ScriptedChannel
from tests.valkey import Valkey

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "follow.py"
Follow = Callable[..., Iterator[dict[str, Any]]]


@pytest.fixture
def client(valkey: Valkey) -> Iterator[Client]:
    """With a retention that outlives no run of the suite by much."""
    with Client(settings=Settings(redis_url=valkey.url, retention=60)) as connected:
        yield connected


def _of_the_readme(function: str) -> Any:
    """A function of the README, from its text."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [block] = [each for each in blocks if f"def {function}(" in each]
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    return names[function]


@pytest.fixture
def readme_follow() -> Follow:
    """The function `follow` of the README."""
    follow: Follow = _of_the_readme("follow")
    return follow


def _listed(client: Client, job_id: str, after: int = 0) -> list[dict[str, Any]]:
    """What the library gives, as the channel writes it."""
    return [json.loads(encode(event)) for event in client.follow(job_id, after)]


def _write_in_every_form(client: Client, job_id: str) -> None:
    """A restart, all three compact forms, several events in a pack, an ending."""
    channel = ScriptedChannel(client)
    channel.start(job_id)
    channel.chunk(job_id, "void")
    channel.restart(job_id)
    channel.write(job_id, compact_text("Hé"), compact_text("llo", 1, 3), compact_text('"]'))
    channel.delta(job_id, tool_calls=[{"index": 0, "function": {"name": "f", "arguments": "{}"}}])
    channel.retrying(job_id)
    channel.complete(job_id, prompt_tokens=1, completion_tokens=2, total_tokens=3)


def _run_example(valkey: Valkey, *arguments: str) -> subprocess.Popen[str]:
    environ = {**os.environ, "REDIS_URL": valkey.url}
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("repacked", [False, True])
@pytest.mark.parametrize("after", [0, 1, 4, 5, 9])
def test_the_example_reads_a_finished_log_as_the_library_does(
    valkey: Valkey, client: Client, after: int, repacked: bool
) -> None:
    """From every kind of cursor: the start, a pack's border, its middle, the end; whatever the packing."""
    job = client.submit("Hello", id=f"finished-{after}-{repacked}")
    _write_in_every_form(client, job.id)
    if repacked:
        assert client.run(calls.repack(client.keys, job.id)) == "done"
    with _run_example(valkey, job.id, str(after)) as example:
        said, complaints = example.communicate(timeout=20)
    assert (example.returncode, complaints) == (0, "")
    assert [json.loads(line) for line in said.splitlines()] == _listed(client, job.id, after)


def test_the_example_follows_a_live_job_over_lost_connections(valkey: Valkey, client: Client) -> None:
    """Early events come from the log, later ones live; what is published while its subscription is cut is not lost."""
    job = client.submit("Hello", id="live")
    channel = ScriptedChannel(client)
    channel.start(job.id)
    channel.chunk(job.id, "0")
    with _run_example(valkey, job.id) as example:
        assert example.stdout is not None
        lines = [example.stdout.readline(), example.stdout.readline()]
        for number in range(1, 20):
            if number % 5 == 0:
                client.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            channel.chunk(job.id, str(number))
            lines.append(example.stdout.readline())
        channel.complete(job.id)
        rest, complaints = example.communicate(timeout=20)
    assert (example.returncode, complaints) == (0, "")
    assert [json.loads(line) for line in [*lines, *rest.splitlines()]] == _listed(client, job.id)


def test_the_example_says_what_became_of_a_job(valkey: Valkey, client: Client) -> None:
    """An unknown job, and a cursor beyond the log, are errors of one line with the names of docs/wire.md."""
    job = client.submit("Hello", id="rewound")
    _write_in_every_form(client, job.id)
    for arguments, expected in ((("nobody",), "JobNotFound"), ((job.id, "10"), "LogRewound"), ((), "usage")):
        with _run_example(valkey, *arguments) as example:
            said, complaints = example.communicate(timeout=20)
        assert (example.returncode, said) == (1, "")
        [line] = complaints.splitlines()
        assert expected in line


async def test_the_readmes_event_stream_goes_on_after_the_last_event_id(client: Client) -> None:
    """What a browser that reconnects gets: the events it has not seen, each with its seq as the id."""
    client.submit("Hi", id="j")
    _write_in_every_form(client, "j")
    wanted = _listed(client, "j", 3)
    async with AsyncClient(settings=client.settings) as reader:
        said = [each async for each in _of_the_readme("sse")(reader, "j", "3")]
    parts = [re.fullmatch(r"id: (\d+)\ndata: (.*)\n\n", each) for each in said]
    assert [(int(part[1]), json.loads(part[2])) for part in parts if part] == [(each["seq"], each) for each in wanted]


def test_the_readmes_configuration_starts_a_server(valkey: Valkey, tmp_path: Path) -> None:
    """A comment behind a directive would keep it from starting."""
    pages = [(ROOT / "README.md").read_text(), (ROOT / "docs" / "operations.md").read_text().replace("\n    ", "\n")]
    for number, page in enumerate(pages):
        [lines] = re.findall(r"\n(appendonly yes\n(?:.*\n)*?maxmemory-policy noeviction\n)", page)
        (tmp_path / f"{number}.conf").write_text(lines)
        included = ["--include", str(tmp_path / f"{number}.conf")]
        with Valkey.start(options=included) as server, redis.Redis.from_url(server.url) as connection:
            assert connection.config_get("maxmemory")["maxmemory"] == str(2**30)


def test_the_readmes_follow_gives_every_event_of_a_finished_job(
    valkey: Valkey, client: Client, readme_follow: Follow
) -> None:
    """It leaves out fields, never events."""
    job = client.submit("Hello", id="readme-finished")
    _write_in_every_form(client, job.id)
    with redis.Redis.from_url(valkey.url, decode_responses=True) as connection:
        found = list(readme_follow(connection, job.id))
    expected = _listed(client, job.id)
    assert [{**each, "at": at["at"], "v": 1} for each, at in zip(found, expected, strict=True)] == expected


@pytest.mark.parametrize("url", ["bogus", "redis://:canary/x@host:6379/0"])
def test_the_example_says_in_one_line_that_an_address_is_none(url: str) -> None:
    """No traceback, and nothing of a password."""
    environ = {**os.environ, "REDIS_URL": url}
    done = subprocess.run([sys.executable, str(EXAMPLE), "j"], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("REDIS_URL: found an address that cannot be used, expected redis://")
    assert done.stderr.count("\n") == 1
    assert "canary" not in done.stderr


def test_the_readmes_follow_loses_nothing_live(valkey: Valkey, client: Client, readme_follow: Follow) -> None:
    """Called again with the last seq after a broken connection, it goes on; nothing is lost or doubled."""
    job = client.submit("Hello", id="readme-live")
    channel = ScriptedChannel(client)
    channel.start(job.id)
    seen: SimpleQueue[int] = SimpleQueue()

    def read() -> None:
        seq = 0
        with redis.Redis.from_url(valkey.url, decode_responses=True) as connection:
            while seq < 11:
                try:
                    for event in readme_follow(connection, job.id, seq):
                        seq = event["seq"]
                        seen.put(seq)
                except redis.ConnectionError:
                    pass

    reader = Thread(target=read, daemon=True)
    reader.start()
    seqs = [seen.get(timeout=10)]
    for number in range(9):
        if number % 3 == 2:
            client.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        channel.chunk(job.id, str(number))
        seqs.append(seen.get(timeout=10))
    channel.complete(job.id)
    reader.join(10)
    assert [*seqs, seen.get(timeout=10)] == list(range(1, 12))
    assert seen.empty()
