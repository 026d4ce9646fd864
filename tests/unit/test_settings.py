"""Settings: read once, validated, and secrets never shown."""

from __future__ import annotations

import dataclasses

import pytest

from millstream import Settings, SettingsError
from millstream.keys import LANES
from millstream.settings import describe, misspelled

VARIABLES = {each.metadata["variable"]: each.name for each in dataclasses.fields(Settings)}

BAD = [
    ("REDIS_URL", "127.0.0.1:6379"), ("REDIS_URL", "http://127.0.0.1"), ("REDIS_URL", "redis://"),
    ("REDIS_URL", "redis://:hunter2/x@host:6379/0"), ("REDIS_URL", "redis://:hunter2@host:port/0"),
    ("REDIS_URL", "redis://:hunter2@host:99999/0"), ("REDIS_URL", "redis://:hunter2@[::1/0"),
    ("OPENAI_BASE_URL", "api.openai.com"), ("OPENAI_BASE_URL", "ftp://x"), ("OPENAI_BASE_URL", "https://"),
    ("OPENAI_BASE_URL", "https://me:hunter2@host/v1"), ("OPENAI_BASE_URL", "https://host/v1?key=hunter2"),
    ("OPENAI_BASE_URL", "https://host/v1#hunter2"), ("OPENAI_BASE_URL", "http://host:99999/v1"),
    ("MILLSTREAM_PREFIX", "a:b"), ("MILLSTREAM_PREFIX", "x" * 33), ("MILLSTREAM_PREFIX", "{a}"),
    ("MILLSTREAM_STREAMS", "0"), ("MILLSTREAM_STREAMS", "1.5"), ("MILLSTREAM_STREAMS", "many"),
    ("MILLSTREAM_STREAMS", "10001"),
    ("MILLSTREAM_LEASE", "0"), ("MILLSTREAM_LEASE", "nan"), ("MILLSTREAM_LEASE", "inf"), ("MILLSTREAM_LEASE", "15s"),
    ("MILLSTREAM_MAX_ATTEMPTS", "0"), ("MILLSTREAM_RETRIES", "-1"), ("MILLSTREAM_RETENTION", "0"),
    ("MILLSTREAM_FLUSH_MS", "-1"), ("MILLSTREAM_FLUSH_MS", "1001"), ("MILLSTREAM_CONNECT_TIMEOUT", "0"),
    ("MILLSTREAM_FIRST_TOKEN_TIMEOUT", "x"), ("MILLSTREAM_IDLE_TIMEOUT", "1e9"), ("MILLSTREAM_TOTAL_TIMEOUT", "-5"),
    ("MILLSTREAM_GRACE", "-1"), ("MILLSTREAM_LOG", "xml"), ("MILLSTREAM_ALLOW_INSECURE_REDIS", "maybe"),
    ("MILLSTREAM_BREAKER", "sometimes"),
    ("MILLSTREAM_RPM", "0"), ("MILLSTREAM_TPM", "1e6"), ("MILLSTREAM_MAX_STREAMS", "0"),
    ("MILLSTREAM_INTERACTIVE_SHARE", "1"),
]  # fmt: skip

FREE_TEXT = {"OPENAI_API_KEY", "MILLSTREAM_MODEL", "MILLSTREAM_UPSTREAMS"}


@pytest.mark.parametrize(("variable", "value"), BAD)
def test_a_bad_value_is_one_line_that_names_its_variable(variable: str, value: str) -> None:
    """What was found, what is expected; a secret is not shown."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({variable: value})
    message = str(caught.value)
    assert message.startswith(f"{variable}: found ")
    assert ", expected " in message
    assert "\n" not in message
    assert "hunter2" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__, "the traceback must not show the value either"


def test_every_setting_that_can_be_wrong_is_tried() -> None:
    """A new setting comes with a bad value in this file."""
    assert {variable for variable, _ in BAD} == set(VARIABLES) - FREE_TEXT


def test_an_empty_environment_gives_the_documented_defaults() -> None:
    """The defaults of interface.md; a variable that is set to nothing counts as not set."""
    settings = Settings.from_env(dict.fromkeys(VARIABLES, " "))
    assert settings == Settings.from_env({}) == Settings()
    assert (settings.redis_url, settings.prefix) == ("redis://127.0.0.1:6379/0", "millstream")
    assert (settings.streams, settings.lease, settings.max_attempts, settings.retries) == (200, 15.0, 3, 5)
    assert (settings.retention, settings.flush_ms, settings.grace, settings.log) == (3600.0, None, 30.0, "json")
    assert (settings.connect_timeout, settings.first_token_timeout) == (5.0, 120.0)
    assert (settings.idle_timeout, settings.total_timeout) == (60.0, 3600.0)
    assert settings.api_key is None
    assert not settings.allow_insecure_redis


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("REDIS_URL", "rediss://:pw@redis.example:6380/3", "rediss://:pw@redis.example:6380/3"),
        ("REDIS_URL", "unix:///run/redis.sock?db=2", "unix:///run/redis.sock?db=2"),
        ("REDIS_URL", "redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("OPENAI_BASE_URL", "http://127.0.0.1:8080/v1/", "http://127.0.0.1:8080/v1"),
        ("OPENAI_API_KEY", " sk-1 \n", "sk-1"),
        ("MILLSTREAM_FLUSH_MS", "0", 0.0),
        ("MILLSTREAM_LEASE", "2", 2.0),
        ("MILLSTREAM_ALLOW_INSECURE_REDIS", "YES", True),
        ("MILLSTREAM_ALLOW_INSECURE_REDIS", "0", False),
        ("MILLSTREAM_LOG", "console", "console"),
        ("MILLSTREAM_PREFIX", "team-a.prod", "team-a.prod"),
    ],
)
def test_a_good_value_is_taken(variable: str, text: str, value: object) -> None:
    """White space around a value is dropped, which `$(cat key)` and env files leave there."""
    assert getattr(Settings.from_env({variable: text}), VARIABLES[variable]) == value


def test_the_command_line_wins_over_the_environment() -> None:
    """An option that was given counts; one that was not (None) leaves the environment's value."""
    settings = Settings.from_env({"MILLSTREAM_STREAMS": "5", "MILLSTREAM_LEASE": "3"}, streams=7, lease=None)
    assert (settings.streams, settings.lease) == (7, 3.0)


def test_secrets_are_not_in_the_repr() -> None:
    """A key or password must be in no log or traceback that prints the settings."""
    settings = Settings.from_env({"OPENAI_API_KEY": "sk-canary", "REDIS_URL": "redis://:canary@127.0.0.1/0"})
    assert "canary" not in repr(settings)
    assert "canary" not in str(describe())


def test_settings_do_not_change() -> None:
    """Read once, passed down: nobody edits them on the way."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().lease = 1  # type: ignore[misc]


def test_the_table_has_every_setting() -> None:
    """`--help` and docs/operations.md show what there is, with defaults as one would type them."""
    rows = {variable: (default, about) for variable, default, about in describe()}
    assert set(rows) == set(VARIABLES)
    assert all(about for _, about in rows.values())
    assert rows["MILLSTREAM_LEASE"][0] == "15"
    assert rows["MILLSTREAM_ALLOW_INSECURE_REDIS"][0] == "0"
    assert rows["MILLSTREAM_FLUSH_MS"][0] == rows["OPENAI_API_KEY"][0] == ""
    typed = {variable: default for variable, (default, _) in rows.items()}
    assert Settings.from_env(typed) == Settings()


def test_names_in_redis_are_those_of_the_documentation() -> None:
    """Clients in other languages are written from these names; the braces are literal."""
    keys = Settings(prefix="p").keys
    assert [keys.spec("j"), keys.state("j"), keys.log("j")] == ["p:{j}:spec", "p:{j}:state", "p:{j}:log"]
    assert [keys.chunks("j"), keys.open, keys.ended] == ["p:{j}:chunks", "p:open", "p:ended"]
    assert [keys.queue(lane) for lane in LANES] == ["p-interactive", "p-batch"]
    assert keys.job_of(keys.chunks("a-b_c")) == "a-b_c"


def test_a_name_that_is_nearly_a_setting_is_noticed() -> None:
    """Those that are nothing like one may be somebody's own, such as the variable of a key."""
    environ = {
        "MILLSTREAM_STREAM": "5", "MILLSTREAM_FLUSH_MSEC": "5", "MILLSTREAM_LEASE": "5", "MILLSTREAM_AZURE_KEY": "x",
        "STREAMS": "5",
    }  # fmt: skip
    assert misspelled(environ) == [
        ("MILLSTREAM_FLUSH_MSEC", "MILLSTREAM_FLUSH_MS"), ("MILLSTREAM_STREAM", "MILLSTREAM_STREAMS"),
    ]  # fmt: skip
