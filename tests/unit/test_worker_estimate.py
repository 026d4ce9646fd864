"""What is reserved for a request before it is made."""

from __future__ import annotations

from typing import Any

import pytest

from millstream.job import Spec
from worker.estimate import PER_MESSAGE, PER_PART, answer_tokens, prompt_tokens


def spec(content: Any = "x", **params: Any) -> Spec:
    return Spec(model="m", messages=[{"role": "user", "content": content}], params=params)


def test_a_prompt_is_estimated_on_the_safe_side() -> None:
    """Three bytes a token and a little for each message; more for tools."""
    assert prompt_tokens(spec("abcdef")) == PER_MESSAGE + 2
    assert prompt_tokens(spec("abcdefg")) == PER_MESSAGE + 3
    assert prompt_tokens(spec("ü" * 3)) == PER_MESSAGE + 2
    assert prompt_tokens(spec("x", tools=[{"type": "function"}])) > PER_MESSAGE + 1


def test_an_image_is_not_counted_by_its_bytes() -> None:
    """A picture of a megabyte is about a thousand tokens, not a third of a million."""
    parts = [{"type": "text", "text": "abc"}, {"type": "image_url", "image_url": {"url": "data:" + "x" * 10**6}}]
    assert prompt_tokens(spec(parts)) == PER_MESSAGE + 1 + PER_PART


@pytest.mark.parametrize(
    ("params", "most"),
    [
        ({}, None), ({"max_tokens": 10}, 10), ({"max_completion_tokens": 5, "max_tokens": 10}, 5),
        ({"max_tokens": 10, "n": 3}, 30), ({"max_tokens": None}, None),
    ],
)  # fmt: skip
def test_the_most_of_an_answer_is_what_the_job_allows(params: dict[str, Any], most: int | None) -> None:
    """All choices together; None where it does not say."""
    assert answer_tokens(spec(**params)) == most


def test_minus_one_is_no_limit() -> None:
    """llama.cpp and its like mean by it that an answer may be as long as it likes, not that it has no tokens."""
    assert answer_tokens(spec(max_tokens=-1)) is None
    assert answer_tokens(spec(max_tokens=0)) == 0
