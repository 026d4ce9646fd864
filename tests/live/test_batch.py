"""A batch from file to file: official examples, bad rows, kills, Ctrl-C, cancel, a full Redis, one that went away."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.live.batch_processes import batch, check_answers, map_rows, paced, paid, read, row, write
from tests.live.producer_processes import ROOT, Room, Screen
from tests.upstream import Request, Script, Text, WaitFor, answer, expected_text, good_answer, seed_of
from tests.valkey import Valkey
from tests.worker_process import environment, wait_until
from tests.world import World

OFFICIAL = [  # the examples of OpenAI's Batch guide and cookbook, written anew: same fields, same shapes
    {"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions",
     "body": {"model": "gpt-3.5-turbo-0125", "max_tokens": 1000,
              "messages": [{"role": "system", "content": "You are a helpful assistant."},
                           {"role": "user", "content": "Hello world!"}]}},
    {"custom_id": "request-2", "method": "POST", "url": "/v1/chat/completions",
     "body": {"model": "gpt-3.5-turbo-0125", "max_tokens": 1000,
              "messages": [{"role": "system", "content": "You are an unhelpful assistant."},
                           {"role": "user", "content": "Hello again, world!"}]}},
    {"custom_id": "task-0", "method": "POST", "url": "/v1/chat/completions",
     "body": {"model": "gpt-4o-mini", "temperature": 0.1, "response_format": {"type": "json_object"},
              "messages": [{"role": "system", "content": "Extract the categories of a movie as JSON."},
                           {"role": "user", "content": "A mill by a river, and who owns it."}]}},
    {"custom_id": "task-1", "method": "POST", "url": "/v1/chat/completions",
     "body": {"model": "gpt-4o-mini", "temperature": 0.2, "max_tokens": 300,
              "messages": [{"role": "system", "content": "Write a caption for the picture of an item."},
                           {"role": "user", "content": [{"type": "text", "text": "A white table"},
                                                        {"type": "image_url",
                                                         "image_url": {"url": "https://example.com/table.jpg"}}]}]}},
    {"custom_id": "tool-1", "method": "POST", "url": "/v1/chat/completions",
     "body": {"model": "gpt-4.1", "n": 2, "tool_choice": "auto", "parallel_tool_calls": False,
              "tools": [{"type": "function", "function": {"name": "grind", "strict": True, "parameters": {
                  "type": "object", "properties": {"grain": {"type": "string"}}, "required": ["grain"],
                  "additionalProperties": False}}}],
              "response_format": {"type": "json_schema", "json_schema": {"name": "flour", "strict": True, "schema": {
                  "type": "object", "properties": {}, "additionalProperties": False}}},
              "messages": [{"role": "user", "content": "Grind the wheat."}]}},
]  # fmt: skip


def test_the_official_examples_run_unchanged_and_read_like_openais(world: World, tmp_path: Path) -> None:
    """The bodies reach the upstream as they are; a script that reads OpenAI's results reads these."""
    world.worker()
    source, out = write(tmp_path / "in.jsonl", OFFICIAL), tmp_path / "out.jsonl"
    with batch(world.environ, source, out) as run:
        assert run.end()[0] == 0
    asked = [each.request.json for each in world.upstream.journal]
    for line in OFFICIAL:
        body: Any = line["body"]
        [sent] = [each for each in asked if each["messages"] == body["messages"]]
        assert {name: sent[name] for name in body} == body
    results = {}
    for text in out.read_text().strip().split("\n"):  # as OpenAI's cookbook reads a result file
        res = json.loads(text)
        assert res["id"].startswith("batch_req_")
        assert res["response"]["request_id"]
        results[res["custom_id"]] = res["response"]["body"]["choices"][0]["message"]["content"]
        body = res["response"]["body"]
        assert (body["object"], res["response"]["status_code"], res["error"]) == ("chat.completion", 200, None)
        assert {"prompt_tokens", "completion_tokens", "total_tokens"} <= set(body["usage"])
        assert [choice["finish_reason"] for choice in body["choices"]] == ["stop"] * len(body["choices"])
    assert results["request-1"] == expected_text(20, seed_of("Hello world!"))
    assert set(results) == {line["custom_id"] for line in OFFICIAL}


def test_one_bad_row_does_not_spoil_the_others(world: World, tmp_path: Path) -> None:
    """Each becomes an error line, what an upstream refuses included; the exit status says that there are some."""
    world.worker()
    rows = [
        row(0), "no JSON", row(1), {**row(2), "custom_id": None}, row(0, temperature=1),
        {**row(3), "url": "/v1/embeddings"}, {**row(4), "method": "GET"}, row(5, temperature="hot"),
        row(6, stream=True), row(7, model=None), row(8, model="unknown"), row(9, api_base="http://x"),
        row(10, stream=False),
    ]  # fmt: skip
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with batch(world.environ, source, out, "--json") as run:
        summary = run.summary()
    lines = read(out)
    assert (summary["status"], summary["answered"], summary["failed"], len(lines)) == (1, 3, 10, len(rows))
    refused = Counter(line["error"]["code"] for line in lines if line["error"])
    assert refused == {
        "invalid_json_line": 1, "missing_required_parameter": 2, "duplicate_custom_id": 1, "invalid_url": 1,
        "invalid_method": 1, "invalid_request": 3,
    }  # fmt: skip
    [unknown] = [line["response"] for line in lines if line["custom_id"] == "row-8"]
    assert (unknown["status_code"], unknown["body"]["error"]["code"]) == (404, "model_not_found")
    assert summary["reasons"] == {**refused, "model_not_found": 1}


def test_an_edited_row_is_asked_again_and_an_answered_one_is_not(world: World, tmp_path: Path) -> None:
    """The same command does what is missing; a torn last line is one of these; `--retry-failed` adds the errors."""
    world.worker()
    source, out = (
        write(tmp_path / "in.jsonl", [row(0), row(1), "no JSON", row(2, model="unknown")]),
        tmp_path / "out.jsonl",
    )

    def run(*options: str) -> dict[str, Any]:
        with batch(world.environ, source, out, *options) as running:
            return running.summary()

    assert [run()[name] for name in ("before", "answered", "failed")] == [0, 2, 2]
    assert [run()[name] for name in ("before", "answered", "failed")] == [4, 2, 2]
    assert paid(world) == {"prompt 0": 1, "prompt 1": 1, "prompt 2": 1}

    edited = {**row(1), "body": {**row(1)["body"], "messages": [{"role": "user", "content": "edited"}]}}
    write(source, [row(0), edited, row(3), row(2, model="unknown")])
    out.write_bytes(out.read_bytes() + b'{"id":"batch_req_')
    assert [run()[name] for name in ("before", "answered", "failed")] == [2, 3, 1]
    texts = {line["custom_id"]: line for line in read(out)}
    assert len(read(out)) == len(texts) == 4, "the old answer and the refusal of a line that is gone are not there"
    text = texts["row-1"]["response"]["body"]["choices"][0]["message"]["content"]
    assert text == expected_text(20, seed_of("edited"))

    assert run("--retry-failed")["before"] == 3
    assert paid(world)["prompt 2"] == 2
    assert len(read(out)) == 4


@pytest.mark.timeout(300)
def test_what_a_killed_producer_left_open_is_picked_up_and_not_paid_twice(world: World, tmp_path: Path) -> None:
    """With a worker that lives, the upstream is asked once for each row, however often the producer is killed."""
    count = 120
    paced(world, 0.002)
    source, out = write(tmp_path / "in.jsonl", map_rows(count)), tmp_path / "out.jsonl"
    world.worker()
    for target in (1, 40, 80):
        with batch(world.environ, source, out, "--window", "30") as run:
            run.wait_for(target)
            run.process.kill()
    with batch(world.environ, source, out, "--window", "30") as run:
        assert run.end()[0] == 0
    check_answers(read(out), count)
    assert set(paid(world).values()) == {1}
    assert paid(world).total() == count


def held(world: World) -> None:
    """Every answer stops before its first word, at the gate `go`."""

    def script(request: Request) -> Script:
        return answer(WaitFor("go"), Text(20, seed=seed_of(request.prompt)))

    world.upstream.on(script)


def open_rows(world: World) -> int:
    return int(world.redis.zcard(world.keys.open))


def listens(world: World) -> bool:
    """Whether a producer blocks on the feed of ended jobs."""
    return any(each["cmd"] == "xread" and "b" in each["flags"] for each in world.redis.client_list())


def test_the_first_ctrl_c_waits_and_the_second_leaves(world: World, tmp_path: Path) -> None:
    """Nothing is submitted after the first; what is open goes on after the second, and is picked up later."""
    source, out = write(tmp_path / "in.jsonl", map_rows(9)), tmp_path / "out.jsonl"
    held(world)
    world.worker()
    with batch(world.environ, source, out, "--window", "4") as run:
        wait_until(lambda: open_rows(world) == 4, "a window of open jobs")
        world.held("go", 4)
        run.process.send_signal(signal.SIGINT)
        assert run.process.stderr is not None
        assert "no more rows are submitted; waiting for 4 that are open. Ctrl-C again" in run.process.stderr.readline()
        run.process.send_signal(signal.SIGINT)
        status, said = run.end()
    assert status == 130
    assert "4 open rows go on" in said
    assert "--cancel" in said
    assert open_rows(world) == 4

    with batch(world.environ, source, out, "--window", "4") as run:
        wait_until(lambda: listens(world), "it has its window full, and waits for an end")
        assert open_rows(world) == 4, "it counts the four as its own"
        run.process.send_signal(signal.SIGINT)
        assert run.process.stderr is not None
        assert "waiting for 4" in run.process.stderr.readline()
        world.upstream.open_gate("go")
        status, said = run.end()
    assert (status, len(read(out))) == (130, 4)
    assert "run the same command again for the rest" in said

    with batch(world.environ, source, out) as run:
        assert run.end()[0] == 0
    assert len(read(out)) == 9
    assert set(paid(world).values()) == {1}


def test_cancel_ends_what_is_open_and_accounts_for_every_row(world: World, tmp_path: Path) -> None:
    """Completed + failed + cancelled = rows, and nothing stays open; asked again, the cancelled ones are done."""
    count = 30
    source, out = write(tmp_path / "in.jsonl", [row(0, model="unknown"), *map_rows(count)[1:]]), tmp_path / "out.jsonl"
    world.upstream.on(lambda r: good_answer(r) if r.prompt in ("prompt 1", "prompt 2") else answer(WaitFor("never")))
    world.worker()
    with batch(world.environ, source, out, "--window", "10") as run:
        run.wait_for(3)
        wait_until(lambda: open_rows(world) == 10, "the window is full again")
        with batch(world.environ, source, out, "--cancel") as second:
            status, said = second.end()
        assert status == 2
        assert "is being written by another producer" in said
        run.process.kill()
    with batch(world.environ, source, out, "--cancel", "--json") as run:
        summary = run.summary()
    assert summary["answered"] + summary["failed"] + summary["cancelled"] == count == len(read(out))
    assert (summary["status"], summary["answered"], summary["failed"], summary["cancelled"]) == (1, 2, 1, 27)
    assert open_rows(world) == 0
    wait_until(lambda: world.upstream.journal.open_streams == 0, "the upstream's connections are closed")
    with batch(world.environ, source, out) as run:
        assert run.summary()["before"] == count
    world.upstream.on(good_answer)
    with batch(world.environ, source, out, "--retry-failed") as run:
        assert run.summary()["answered"] == count - 1
    assert len(read(out)) == count


def test_a_row_can_be_followed_live_and_its_follower_is_not_cut_off(world: World, tmp_path: Path) -> None:
    """Its job is found by custom_id; the producer forgets it at the end, and whoever follows still reads it all."""
    source, out = write(tmp_path / "in.jsonl", map_rows(3)), tmp_path / "out.jsonl"
    held(world)
    world.worker()
    with batch(world.environ, source, out) as run:
        world.held("go", 3)
        jobs = {each.metadata["custom_id"]: each.id for each in world.client.list("in_progress")}
        assert set(jobs) == {"row-0", "row-1", "row-2"}
        following = subprocess.Popen(
            [sys.executable, "-m", "producer", "follow", jobs["row-1"], "--live"], cwd=ROOT,
            env=environment(world.environ), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            wait_until(lambda: world.redis.pubsub_numsub(world.keys.chunks(jobs["row-1"]))[0][1], "somebody follows")
            world.upstream.open_gate("go")
            assert run.end()[0] == 0
            seen, _ = following.communicate(timeout=20)
        finally:
            following.kill()
            following.wait()
    assert seen == expected_text(20, seed_of("prompt 1"))
    left = {job_id for job_id in jobs.values() if world.redis.exists(world.keys.state(job_id))}
    assert left <= {jobs["row-1"]}, "what nobody followed is gone at once"


def test_rows_of_a_slow_pipe_are_answered_while_it_is_idle(world: World, tmp_path: Path) -> None:
    """The next row comes only after the answer of the last one is in the output."""
    out = tmp_path / "out.jsonl"
    world.worker()
    with batch(world.environ, "-", out, stdin=subprocess.PIPE) as run:
        assert run.process.stdin is not None
        for number in range(3):
            text = json.dumps(row(number)) + "\n"
            run.process.stdin.write(text[:10])
            run.process.stdin.flush()
            run.process.stdin.write(text[10:])
            run.process.stdin.flush()
            run.wait_for(number + 1)
            assert run.written() == number + 1
        run.process.stdin.close()
        run.process.stdin = None
        assert run.end()[0] == 0
    check_answers(read(out), 3)


def test_a_redis_that_dies_is_waited_for(make_world: Callable[..., World], tmp_path: Path) -> None:
    """kill -9 of the server in the middle, and back after a while: the batch goes on, and every row is there."""
    server = Valkey.start(appendfsync="always")
    try:
        world = make_world(server.url)
        paced(world, 0.01)
        source, out = write(tmp_path / "in.jsonl", map_rows(150)), tmp_path / "out.jsonl"
        world.worker()
        with batch(world.environ, source, out, "--window", "40") as run:
            run.wait_for(30)
            server.kill()
            time.sleep(5)  # beyond the connection's own retries
            server.restart()
            assert run.end(within=90)[0] == 0
        check_answers(read(out), 150)
        world.close()
    finally:
        server.close()


def test_a_full_redis_is_waited_for(make_world: Callable[..., World], tmp_path: Path) -> None:
    """Submit is refused at maxmemory: rows wait and the batch says why; when there is room, it goes on."""
    server = Valkey.start()
    try:
        world = make_world(server.url)
        source, out = write(tmp_path / "in.jsonl", map_rows(40)), tmp_path / "out.jsonl"
        world.worker()
        world.redis.config_set("maxmemory", int(world.redis.info("memory")["used_memory"]) - 100_000)
        with batch(world.environ, source, out, "--json") as run:
            assert run.process.stderr is not None
            report = json.loads(run.process.stderr.readline())
            assert (report["event"], report["answered"]) == ("progress", 0)
            assert "is full" in report["trouble"]
            world.redis.config_set("maxmemory", 0)
            summary = run.summary(within=60)
        assert (summary["status"], summary["answered"]) == (0, 40)
        assert "trouble" not in summary
        check_answers(read(out), 40)
        world.close()
    finally:
        server.close()


def test_on_a_terminal_one_line_shows_how_it_stands(world: World, tmp_path: Path) -> None:
    """It is drawn again and again, wiped at the end, and the summary stays."""
    source, out = write(tmp_path / "in.jsonl", map_rows(40)), tmp_path / "out.jsonl"
    held(world)
    world.worker()
    room = Room(world.url)
    environ = {**world.environ, "MILLSTREAM_PREFIX": world.keys.prefix}
    with room.client, Screen(room, "batch", str(source), "--out", str(out), **environ) as screen:
        wait_until(lambda: "0 of 40 rows · 0 failed · 40 open" in screen.raw, "the line is there")
        world.upstream.open_gate("go")
        shown = screen.to_the_end()
    assert screen.process.returncode == 0
    last = shown.rpartition("\x1b[K")[2].splitlines()
    assert last[0] == "40 rows: 40 answered, 0 failed, 0 cancelled"
    assert "rows/s" in last[1]
    assert all(len(each) < 80 for each in shown.split("\r\x1b[K")[1:-1])


def test_nothing_is_submitted_by_a_dry_run(world: World, tmp_path: Path) -> None:
    """It says what would be refused, counts tokens and money, and needs neither output nor server."""
    prices = tmp_path / "prices.toml"
    prices.write_text('currency = "EUR"\n[scripted]\ninput = 2.0\noutput = 8.0\n')
    source = write(tmp_path / "in.jsonl", [*[row(n, max_tokens=100) for n in range(4)], "no JSON"])
    done = subprocess.run(
        [sys.executable, "-m", "producer", "batch", str(source), "--dry-run", "--json", "--prices", str(prices)],
        cwd=ROOT, env=environment({**world.environ, "REDIS_URL": "redis://127.0.0.1:1/0"}), capture_output=True,
        text=True, timeout=30, check=False,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert (done.returncode, found["rows"], found["refused"]) == (1, 4, 1)
    assert found["completion_tokens_at_most"] == 400
    assert found["cost_at_most"] == pytest.approx(4 * 2 * 2e-6 + 400 * 8e-6, rel=0.5)
    assert not list(tmp_path.glob("*.batch"))
    assert open_rows(world) == 0
