"""What can be typed, what it becomes, and the one clear line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from millstream import Client, job
from millstream.job import MAX_SPEC_BYTES
from millstream.testing import fake_client
from tests.unit.producer_typed import Typed, typed


@pytest.fixture
def client() -> Client:
    return fake_client()


def spec_of(client: Client, job_id: str) -> job.Spec:
    return job.parse(client.redis.get(client.keys.spec(job_id)))


def refused(client: Client, *argv: str, **how: Any) -> str:
    """The one line a command was refused with; nothing was written to stdout or Redis."""
    try:
        found = typed(client, *argv, **how)
    except SystemExit as end:
        pytest.fail(f"argparse ended with {end.code} where the library's own words were expected")
    assert (found.status, found.out) == (2, "")
    assert client.redis.keys() == []
    return one_line(found.err)


def one_line(err: str) -> str:
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert len(err) < 700
    assert err[:-1].isprintable()
    return err.strip()


def test_submit_prints_the_id_alone(client: Client) -> None:
    """`id=$(millstream submit ...)` needs no parsing."""
    found = typed(client, "submit", "Hello", "--id", "mine")
    assert found == Typed(0, "mine\n", "")
    assert spec_of(client, "mine").messages == [{"role": "user", "content": "Hello"}]


def test_submit_json_is_one_object_that_says_whether_the_job_is_new(client: Client) -> None:
    """A repeated submit is the same job, and says so."""
    first = typed(client, "submit", "Hello", "--id", "mine", "--json")
    again = typed(client, "submit", "Hello", "--id", "mine", "--json")
    assert json.loads(first.out) == {"id": "mine", "created": True}
    assert json.loads(again.out) == {"id": "mine", "created": False}
    assert "there already" in one_line(again.err)


def test_every_option_reaches_the_spec(client: Client) -> None:
    """What is typed is what the worker reads."""
    argv = [
        "--model",
        "M",
        "--system",
        "S",
        "--lane",
        "batch",
        "--id",
        "j",
        "--timeout",
        "5",
        "--expires",
        "6",
        "--retention",
        "7",
        "--on-break",
        "fail",
    ]
    more = "--max-attempts 2 --metadata a=b=c --metadata d= --param temperature=0.2 --param user=me --param stop=[END]"
    found = typed(client, "submit", "Hello", *argv, *more.split(), "--param", 'logit_bias={"1": -5}')
    assert found.status == 0
    assert spec_of(client, "j") == job.Spec(
        model="M", lane="batch", timeout=5.0, expires=6.0, retention=7.0, on_break="fail", max_attempts=2,
        messages=[{"role": "system", "content": "S"}, {"role": "user", "content": "Hello"}],
        metadata={"a": "b=c", "d": ""},
        params={"temperature": 0.2, "user": "me", "stop": "[END]", "logit_bias": {"1": -5}},
    )  # fmt: skip


def test_a_dash_reads_the_prompt_from_stdin(client: Client) -> None:
    """Every byte of it but a byte order mark, the last newline too."""
    typed(client, "submit", "-", "--id", "j", stdin="\ufeffGrüße\n".encode())
    assert spec_of(client, "j").messages[0]["content"] == "Grüße\n"


@pytest.mark.parametrize("where", ["file", "stdin"])
def test_messages_come_from_a_file_or_stdin(client: Client, tmp_path: Path, where: str) -> None:
    """With --system before them."""
    body = json.dumps([{"role": "user", "content": "Hi"}]).encode()
    path = tmp_path / "messages.json"
    path.write_bytes(body)
    typed(
        client, "submit", "--messages", str(path) if where == "file" else "-", "--id", "j", "--system", "S", stdin=body
    )
    assert [each["content"] for each in spec_of(client, "j").messages] == ["S", "Hi"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "submit needs one of"),
        (["Hello", "--messages", "x.json"], "submit needs one of"),
        (["  "], "the prompt is empty"),
        (["", "--system", "S"], "the prompt is empty"),
        (["Hi", "--param", "temperature"], "expected NAME=VALUE"),
        (["Hi", "--param", "=1"], "expected NAME=VALUE"),
        (["Hi", "--param", "seed=1", "--param", "seed=2"], "given twice"),
        (["Hi", "--param", "temperature=NaN"], "found 'NaN', expected a number"),
        (["Hi", "--param", "temperature=-Infinity"], "expected a number"),
        (["Hi", "--param", "temperature=1e999"], "no number that JSON knows"),
        (["Hi", "--param", 'logit_bias={"1": NaN}'], "no number that JSON knows"),
        (["Hi", "--param", "seed=" + "1" * 5000], "a number that is too long"),
        (["Hi", "--param", "stop=" + "[" * 100_000], "nested too deeply"),
        (["Hi", "--param", 'user="\\ud800"'], "lone surrogate"),
        (["Hi", "--param", "temprature=1"], "did you mean 'temperature'"),
        (["Hi", "--param", "base_url=http://x"], "the worker's own settings"),
        (["Hi", "--param", "model=x"], "use --model"),
        (["Hi", "--param", "on_break=x"], "use --on-break"),
        (["Hi", "--param", "self=x"], "not one a job may carry"),
        (["Hi", "--metadata", "x"], "expected NAME=VALUE"),
        (["Hi", "--metadata", "a=" + "x" * 513], "at most 512"),
        (["Hi", "--timeout", "nan"], "timeout: found nan"),
        (["Hi", "--timeout", "0"], "timeout: found 0"),
        (["Hi", "--max-attempts", "0"], "max_attempts: found 0"),
        (["Hi", "--model", ""], "expected a name of 1 to 256"),
        (["Hi \udcff"], "not UTF-8"),
        (["Hi", "--system", "\udcff"], "not UTF-8"),
        (["x" * (MAX_SPEC_BYTES + 1)], "shorten the prompt"),
        (["Hi", "--messages", "nowhere.json"], "submit needs one of"),
        (["--messages", "nowhere.json"], "No such file"),
        (["--messages", "/"], "Is a directory"),
        (["--messages", "a\0b"], "cannot be read"),
    ],
)
def test_what_cannot_be_submitted_is_refused_in_one_line(client: Client, argv: list[str], says: str) -> None:
    """It says what was found and what to do, and nothing is written to Redis."""
    assert says in refused(client, "submit", *argv)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "the prompt is empty"),
        (b"ab\xffc", "byte 2 (0xff) is not UTF-8"),
        (b"x" * (MAX_SPEC_BYTES + 1), "more than 4,194,304 bytes"),
    ],
)
def test_a_prompt_on_stdin_that_cannot_be_is_refused_in_one_line(client: Client, body: bytes, says: str) -> None:
    """Whatever somebody pipes in."""
    assert says in refused(client, "submit", "-", stdin=body)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "line 1, column 1"),
        (b"{", "expected JSON"),
        (b'{"role": "user"}', "expected a JSON array"),
        (b"[]", "messages: found 0"),
        (b"[1]", "messages: found int"),
        (b'[{"role": "king", "content": "x"}]', "messages[0].role"),
        (b'[{"role": "user", "content": 7}]', "messages[0].content"),
        (b'[{"role": "user", "content": "x", "weight": NaN}]', "no number that JSON knows"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[\xff]", "is not UTF-8"),
    ],
)
def test_messages_that_cannot_be_are_refused_in_one_line(client: Client, body: bytes, says: str) -> None:
    """The line names the place."""
    assert says in refused(client, "submit", "--messages", "-", stdin=body)


BAD_IDS = ["../x", "*", "a:b", "{}", "a\r\nb", "x" * 10_000, "ünïcode", "", "\x1b[2J", "\u202e"]


@pytest.mark.parametrize("command", ["follow", "status", "result", "cancel", "forget"])
@pytest.mark.parametrize("job_id", BAD_IDS, ids=ascii)
def test_an_id_that_cannot_be_is_refused_in_one_line(client: Client, command: str, job_id: str) -> None:
    """Ids are 1 to 64 of A-Z a-z 0-9 _ -; what was typed is shown, never obeyed."""
    assert "expected 1 to 64 of A-Z" in refused(client, command, job_id)


@pytest.mark.parametrize("job_id", BAD_IDS, ids=ascii)
def test_an_id_that_cannot_be_is_not_submitted(client: Client, job_id: str) -> None:
    """The producer's own ids obey the same rule."""
    assert "expected 1 to 64 of A-Z" in refused(client, "submit", "Hi", "--id", job_id)


@pytest.mark.parametrize(
    "argv",
    [
        [], ["nonsense"], ["follow"], ["follow", "a", "--after", "-1"], ["follow", "a", "--after", "x" * 10_000],
        ["follow", "a", "--after", "\u0663"], ["result", "a", "--timeout", "nan"], ["result", "a", "--timeout", "-1"],
        ["submit", "Hi", "--lane", "\x1b[2J"], ["submit", "Hi", "--timeout", "soon"], ["list", "--state", "done"],
        ["list", "--limit", "0"], ["status", "a", "\x1b[2J" * 1000], ["submit", "Hi", "--fol"],
    ],
    ids=ascii,
)  # fmt: skip
def test_wrong_usage_ends_with_2_and_one_line(
    client: Client, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """argparse's own page of usage is for --help; the line can be shown on any terminal."""
    with pytest.raises(SystemExit) as end:
        typed(client, *argv)
    assert end.value.code == 2
    line = one_line(capsys.readouterr().err)
    assert line.endswith("--help")


def test_a_prompt_that_begins_with_a_dash_comes_after_two(client: Client) -> None:
    """As in every other command."""
    assert typed(client, "submit", "--id", "j", "--", "-5 + 3?").status == 0
    assert spec_of(client, "j").messages[0]["content"] == "-5 + 3?"


def test_stdout_is_no_output_of_a_batch(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    """What goes on from its output needs a file; none is made that is called `-`."""
    with pytest.raises(SystemExit) as end:
        typed(client, "batch", "-", "--out", "-")
    assert end.value.code == 2
    assert "--out: found '-', expected a file" in one_line(capsys.readouterr().err)
