"""What the environment asks for."""

from __future__ import annotations

import pytest

from local.plan import Plan
from millstream.errors import SettingsError

KEY = "sk-canary"


def test_nothing_set_means_everything_is_started_here() -> None:
    """Neither Redis nor a model is given: both are local, and the plan says why."""
    plan = Plan.from_environ({"PATH": "/bin", "OPENAI_API_KEY": " ", "REDIS_URL": ""})
    assert (plan.redis_url, plan.local_model) == (None, True)
    assert plan.upstream == "smollm2-135m on this machine, because neither OPENAI_API_KEY nor OPENAI_BASE_URL is set"


def test_the_worker_is_pointed_at_the_local_model() -> None:
    """Address, model and a placeholder for the key; what was in the environment stays."""
    environ = Plan.from_environ({"PATH": "/bin"}).for_worker("redis://127.0.0.1:1/0", "http://127.0.0.1:2/v1")
    assert environ["PATH"] == "/bin"
    assert environ["REDIS_URL"] == "redis://127.0.0.1:1/0"
    assert environ["OPENAI_BASE_URL"] == "http://127.0.0.1:2/v1"
    assert environ["OPENAI_API_KEY"] == "local"
    assert environ["MILLSTREAM_MODEL"] == "smollm2-135m"
    assert environ["MILLSTREAM_STREAMS"] == "4"


def test_a_proxy_is_not_asked_for_the_local_model() -> None:
    """This machine joins the exceptions, under both names; those there already stay."""
    environ = Plan.from_environ({"no_proxy": "example.org"}).for_worker("redis://127.0.0.1", "http://127.0.0.1:2/v1")
    assert (environ["NO_PROXY"], environ["no_proxy"]) == ("127.0.0.1", "example.org,127.0.0.1")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"OPENAI_API_KEY": KEY}, "https://api.openai.com/v1, because OPENAI_API_KEY is set"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:11434/v1"}, "http://127.0.0.1:11434/v1, because OPENAI_BASE_URL is set"),
        (
            {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "https://llm.example/v1"},
            "https://llm.example/v1, because OPENAI_API_KEY and OPENAI_BASE_URL are set",
        ),
        ({"MILLSTREAM_UPSTREAMS": "/etc/upstreams.toml"}, "those of MILLSTREAM_UPSTREAMS"),
    ],
)
def test_a_model_elsewhere_is_used_and_named_without_its_key(given: dict[str, str], says: str) -> None:
    """Any of the variables means: no local model. The line shown says which, and never the key."""
    plan = Plan.from_environ(given)
    assert (plan.local_model, plan.upstream) == (False, says)
    assert KEY not in repr(plan)


def test_a_model_elsewhere_keeps_its_settings() -> None:
    """Nothing the user set is replaced; where they set no key, the SDK still gets one to be content with."""
    given = {"OPENAI_BASE_URL": "http://127.0.0.1:11434/v1", "MILLSTREAM_MODEL": "theirs"}
    environ = Plan.from_environ(given).for_worker("redis://127.0.0.1", None)
    assert {**environ, **given} == environ
    assert environ["OPENAI_API_KEY"] == "none"
    assert "MILLSTREAM_STREAMS" not in environ
    assert Plan.from_environ({"OPENAI_API_KEY": KEY}).for_worker("redis://x", None)["OPENAI_API_KEY"] == KEY


def test_a_given_redis_is_used() -> None:
    """REDIS_URL set: no server is started."""
    assert Plan.from_environ({"REDIS_URL": "redis://db.example:6379/1"}).redis_url == "redis://db.example:6379/1"


def test_a_setting_that_cannot_be_used_is_refused_before_anything_starts() -> None:
    """The worker would refuse it too, but only after the model has been loaded."""
    with pytest.raises(SettingsError, match="MILLSTREAM_LEASE"):
        Plan.from_environ({"MILLSTREAM_LEASE": "soon"})
