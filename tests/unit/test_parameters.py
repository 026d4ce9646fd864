"""The request parameters a job may carry."""

from __future__ import annotations

import math
from typing import Any

import pytest

from millstream import SpecError
from millstream.parameters import ALLOWED, MAX_CHOICES, check


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("temprature", "temperature"), ("maxtokens", "max_tokens"), ("top-p", "top_p"),
        ("freqency_penalty", "frequency_penalty"), ("Seed", "seed"), ("responseformat", "response_format"),
    ],
)  # fmt: skip
def test_a_typo_gets_the_name_that_was_meant(typo: str, meant: str) -> None:
    """An unknown parameter is never dropped silently; a near one is suggested."""
    with pytest.raises(SpecError, match=f"did you mean '{meant}'"):
        check({typo: 1})


def test_a_name_like_no_other_points_to_the_list() -> None:
    """Without a near name the message says where the names are."""
    with pytest.raises(SpecError, match=r"millstream\.parameters\.ALLOWED"):
        check({"zzzzzz": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "0.2"), ("temperature", True), ("temperature", math.inf), ("temperature", math.nan),
        ("temperature", 10**400), ("top_p", [1]), ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", "9"),
        ("n", 0), ("n", MAX_CHOICES + 1), ("n", -1), ("n", 2.0), ("seed", "x"), ("logprobs", 1), ("logprobs", "true"),
        ("user", 3), ("reasoning_effort", ["low"]), ("max_tokens", "9" * 10_000),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_named(name: str, value: Any) -> None:
    """The message names the parameter, shows what was found and says what is expected."""
    with pytest.raises(SpecError, match=f"parameter {name}: found .* expected ") as caught:
        check({name: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "params",
    [
        {}, {"temperature": 0}, {"temperature": 0.7, "top_p": 1, "n": 3, "seed": -1}, {"n": 1}, {"n": MAX_CHOICES},
        {"stop": ["\n"], "logit_bias": {"50256": -100}}, {"tools": [{"type": "function"}], "tool_choice": "auto"},
        {"response_format": {"type": "json_object"}, "logprobs": True, "top_logprobs": 2}, {"user": "ann"},
        {"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "chat_template_kwargs": {"enable_thinking": False}},
    ],
)  # fmt: skip
def test_what_the_apis_document_is_taken(params: dict[str, Any]) -> None:
    """OpenAI's names and those of the compatible servers."""
    check(params)


def test_nothing_that_leads_elsewhere_is_allowed() -> None:
    """A spec can name no address, key, header or transport."""
    forbidden = {
        "model", "messages", "stream", "stream_options", "base_url", "api_base", "api_key", "api_version",
        "organization", "project", "headers", "extra_headers", "extra_query", "extra_body", "timeout", "proxy",
        "http_client", "max_retries", "webhook", "webhooks", "callback", "on_success",
    }  # fmt: skip
    assert not forbidden & ALLOWED
    for name in forbidden:
        with pytest.raises(SpecError, match=f"parameter '{name}'"):
            check({name: "x"})
