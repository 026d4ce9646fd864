"""The file that names upstreams: what it gives, and one line that says what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from millstream import Settings, SettingsError
from millstream.meters import Limits
from worker.upstream.config import FIELDS, UpstreamSettings, load, parse

ENVIRON = {"A_KEY": "sk-canary-0123456789", "EMPTY": " ", "BROKEN": "one\nX-Evil: two"}

WHOLE = b"""
[upstreams.first]
base_url = "https://one.example/v1/"
api_key_env = "A_KEY"
auth = "api-key"
models = ["gpt-*", "exact"]
aliases = { fast = "deployment-7" }
headers = { X-Title = "mill" }
query = { api-version = "2024-10-21" }
stream_options = false
ends_with = "done"
finish_reasons = ["eos"]
continue_with = "vllm"
limits = { rpm = 60, tpm = 90000, streams = 8 }
breaker = false

[upstreams.second]
base_url = "http://127.0.0.1:8080"
"""


def upstreams(text: bytes = WHOLE) -> list[object]:
    return list(parse(text, "up.toml", ENVIRON))


def test_every_field_is_read() -> None:
    """What stands in the file, in its order, with the key taken from its variable."""
    first, second = parse(WHOLE, "up.toml", ENVIRON)
    assert (first.name, first.base_url, first.api_key, first.auth) == (
        "first", "https://one.example/v1", "sk-canary-0123456789", "api-key",
    )  # fmt: skip
    assert (first.headers, first.query) == ({"X-Title": "mill"}, {"api-version": "2024-10-21"})
    assert (first.stream_options, first.ends_with, first.finish_reasons) == (False, "done", frozenset({"eos"}))
    assert (first.continue_with, first.limits) == ("vllm", Limits(60, 90_000, 8))
    assert not first.breaker
    assert (second.api_key, second.models, second.stream_options, second.ends_with) == (
        None, ("*",), True, "finish_reason",
    )  # fmt: skip
    assert (second.continue_with, second.breaker, second.foreign) == ("", True, True)


def test_a_model_may_have_limits_of_its_own() -> None:
    """The first name or pattern that fits, by what the model is called there; else those of the upstream."""
    text = (
        '[upstreams.a]\nbase_url = "http://127.0.0.1:1"\nlimits = {rpm = 60, window = 10, models.exact = {tpm = 5}, '
        'models."gpt-*" = {rpm = 3}}'
    )
    (found,) = parse(text.encode(), "up.toml", ENVIRON, share=0.2)
    assert found.limits_of("other") == Limits(60, 0, 0, 0.2, 10.0)
    assert found.limits_of("exact") == Limits(0, 5, 0, 0.2, 10.0)
    assert found.limits_of("gpt-4o") == Limits(3, 0, 0, 0.2, 10.0)


def test_without_a_file_the_limits_come_from_the_settings() -> None:
    """One upstream, one limit for each of its models."""
    (found,) = load(Settings(rpm=60, tpm=1000, max_streams=4, interactive_share=0.3), {})
    assert found.limits_of("any") == Limits(60, 1000, 4, 0.3)
    (free,) = load(Settings(), {})
    assert not free.limits_of("any")


def test_a_model_is_served_by_name_pattern_or_alias() -> None:
    """An alias is a name jobs may use, too, and is translated; other names go as they are."""
    first, second = parse(WHOLE, "up.toml", ENVIRON)
    assert [first.serves(model) for model in ("gpt-4o", "exact", "fast", "EXACT", "claude")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert second.serves("anything/at all")
    assert (first.model("fast"), first.model("gpt-4o")) == ("deployment-7", "gpt-4o")


def test_the_key_is_shown_by_no_repr() -> None:
    """Settings are printed and logged by people who debug."""
    assert "canary" not in repr(upstreams())


@pytest.mark.parametrize(
    ("more", "lacks"),
    [
        ({}, True),
        ({"api_key": "k"}, False),
        ({"headers": {"x-api-key": "k"}}, False),
        ({"query": {"api-version": "1"}}, True),
        ({"base_url": "http://127.0.0.1:8080/v1"}, False),
    ],
)
def test_an_upstream_that_was_given_no_key_is_known(more: dict[str, Any], lacks: bool) -> None:
    """Over https with neither key nor header it will refuse; a server on this machine asks for none."""
    assert UpstreamSettings(**{"name": "x", "base_url": "https://api.example/v1", **more}).has_no_credentials is lacks


def test_without_a_file_there_is_the_one_of_the_environment() -> None:
    """OPENAI_BASE_URL and OPENAI_API_KEY, named after its host; it serves every model."""
    settings = Settings.from_env({"OPENAI_BASE_URL": "http://localhost:9/v1", "OPENAI_API_KEY": "k"})
    [only] = load(settings, {})
    assert (only.name, only.base_url, only.api_key, only.foreign) == ("localhost", "http://localhost:9/v1", "k", False)
    assert only.serves("whatever")
    assert only.breaker
    [spared] = load(Settings.from_env({"MILLSTREAM_BREAKER": "0"}), {})
    assert not spared.breaker


def test_a_key_that_no_header_can_carry_ends_the_start() -> None:
    """One that was copied with its typographic quotes would break every job; it is not shown."""
    with pytest.raises(SettingsError, match=r"^OPENAI_API_KEY: found a character that no header can carry") as caught:
        load(Settings(api_key="\u201csk-canary\u201d"), {})
    assert "canary" not in str(caught.value)


def test_the_file_wins_over_the_environment(tmp_path: Path) -> None:
    """MILLSTREAM_UPSTREAMS names a file; MILLSTREAM_BREAKER=0 is for all of it."""
    path = tmp_path / "up.toml"
    path.write_bytes(WHOLE)
    found = load(Settings.from_env({"MILLSTREAM_UPSTREAMS": str(path), "MILLSTREAM_BREAKER": "0"}), ENVIRON)
    assert [(each.name, each.breaker) for each in found] == [("first", False), ("second", False)]


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    """It names the variable and the file."""
    with pytest.raises(SettingsError, match=r"MILLSTREAM_UPSTREAMS: cannot read .*none\.toml: No such file"):
        load(Settings.from_env({"MILLSTREAM_UPSTREAMS": str(tmp_path / "none.toml")}), {})
    with pytest.raises(SettingsError, match="Is a directory"):
        load(Settings.from_env({"MILLSTREAM_UPSTREAMS": str(tmp_path)}), {})


ADDRESS = 'base_url = "http://h/v1"\n'
WRONG = {
    "not TOML": ("[upstreams", "not TOML"),
    "nothing": ("", "names no upstream"),
    "no table": ("upstreams = 3", "upstreams: found 3, expected tables"),
    "unknown top": ("[upstream.a]", "upstream: unknown key; did you mean 'upstreams'?"),
    "bad name": ('[upstreams."a b"]\n' + ADDRESS, "a name has 1 to 64"),
    "not a table": ("[upstreams]\na = 1", "upstreams.a: found int, expected a table"),
    "no address": ("[upstreams.a]", "upstreams.a.base_url: is missing"),
    "no scheme": ('[upstreams.a]\nbase_url = "h/v1"', "upstreams.a.base_url: found 'h/v1', expected http://"),
    "bad port": ('[upstreams.a]\nbase_url = "http://h:99999"', "upstreams.a.base_url: found"),
    "query in address": ('[upstreams.a]\nbase_url = "http://h/v1?k=hunter2"', "found an address with @, ? or # in it"),
    "user in address": ('[upstreams.a]\nbase_url = "http://u:hunter2@h/v1"', "without user, query or fragment"),
    "unknown key": ("[upstreams.a]\n" + ADDRESS + "qeury = {}", "a.qeury: unknown key; did you mean 'query'?"),
    "key in the file": ("[upstreams.a]\n" + ADDRESS + 'api_key = "hunter2"', "name its variable with api_key_env"),
    "key not set": ("[upstreams.a]\n" + ADDRESS + 'api_key_env = "NONE"', "the variable NONE is not set"),
    "key empty": ("[upstreams.a]\n" + ADDRESS + 'api_key_env = "EMPTY"', "the variable EMPTY is not set"),
    "key with a line break": ("[upstreams.a]\n" + ADDRESS + 'api_key_env = "BROKEN"', "no header can carry"),
    "key as a name": ("[upstreams.a]\n" + ADDRESS + 'api_key_env = "sk-hunter2"', "the name of the variable"),
    "authorization": ("[upstreams.a]\n" + ADDRESS + 'headers = {Authorization = "x"}', "use api_key_env"),
    "our header": ("[upstreams.a]\n" + ADDRESS + 'headers = {host = "x"}', "is the worker's own header"),
    "header name": ("[upstreams.a]\n" + ADDRESS + 'headers = {"a b" = "x"}', "is no name of a header"),
    "header value": ("[upstreams.a]\n" + ADDRESS + 'headers = {a = "x\\r\\ny: z"}', "found a line break"),
    "header kind": ("[upstreams.a]\n" + ADDRESS + "headers = {a = 1}", "headers.a: found int, expected text"),
    "models empty": ("[upstreams.a]\n" + ADDRESS + "models = []", "expected a list of names"),
    "models kind": ("[upstreams.a]\n" + ADDRESS + 'models = "gpt"', "models: found 'gpt', expected a list"),
    "dialect": ("[upstreams.a]\n" + ADDRESS + 'continue_with = "openai"', "continue_with: found 'openai', expected"),
    "ending": ("[upstreams.a]\n" + ADDRESS + 'ends_with = "eof"', "expected 'finish_reason' or 'done'"),
    "limit kind": ("[upstreams.a]\n" + ADDRESS + "limits = {rpm = 0}", "limits.rpm: found 0, expected a whole"),
    "limit name": ("[upstreams.a]\n" + ADDRESS + "limits = {rps = 1}", "limits.rps: unknown key; did you mean 'rpm'?"),
    "limit window": ("[upstreams.a]\n" + ADDRESS + "limits = {window = 0}", "limits.window: found 0, expected seconds"),
    "limit of a model": ("[upstreams.a]\n" + ADDRESS + 'limits = {models = {"x" = 5}}', "found int, expected a table"),
    "limit in a model": (
        "[upstreams.a]\n" + ADDRESS + 'limits = {models = {"x" = {window = 9}}}', "window: unknown key; known are rpm",
    ),
    "flag kind": ("[upstreams.a]\n" + ADDRESS + 'stream_options = "no"', "stream_options: found 'no', expected true"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(case: str) -> None:
    """File, key, what was found and what is expected; never a secret somebody put there."""
    text, expected = WRONG[case]
    with pytest.raises(SettingsError) as caught:
        parse(text.encode(), "up.toml", ENVIRON)
    message = str(caught.value)
    assert message.startswith("up.toml: ")
    assert expected in message
    assert "\n" not in message
    assert "hunter2" not in message


def test_bytes_that_are_no_text_are_no_toml() -> None:
    """A binary file by mistake."""
    with pytest.raises(SettingsError, match=r"up\.toml: not TOML"):
        parse(b"\xff\xfe\x00", "up.toml", {})


def test_every_field_stands_in_the_docs() -> None:
    """In the table of docs/upstreams.md, in the order of the code but for the required one."""
    page = (Path(__file__).parents[2] / "docs" / "upstreams.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert set(rows) == set(FIELDS)
    assert len(rows) == len(FIELDS)


EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "upstreams").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_in_the_docs_can_be_used(path: Path) -> None:
    """Each is a file a worker starts with, once the variables it names are set."""
    environ = dict.fromkeys(("OPENAI_API_KEY", "AZURE_OPENAI_API_KEY", "OPENROUTER_API_KEY"), "k")
    assert parse(path.read_bytes(), str(path), environ)


def test_there_is_an_example_for_every_server_that_is_promised() -> None:
    """Two that were talked to for real or by its dialect, and four more."""
    assert {path.stem for path in EXAMPLES} >= {"openai", "azure", "openrouter", "vllm", "ollama", "llama-cpp"}
