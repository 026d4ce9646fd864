"""Going on from a partial answer: what is asked, of whom, and what of the answer is new."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.job import Spec
from worker.upstream import Answer, Finish, Piece, Usage
from worker.upstream.config import CONTINUES
from worker.upstream.continuation import MAX_TEXT, Echo, Partial, possible, request

USER = {"role": "user", "content": "Tell me."}


def spec(*messages: dict[str, Any], **params: Any) -> Spec:
    return Spec(model="m", messages=[*messages] or [USER], params=params)


@pytest.mark.parametrize(
    ("dialect", "fields", "message"),
    [
        ("vllm", {"continue_final_message": True, "add_generation_prompt": False}, {}),
        ("llama.cpp", {}, {}),
        ("deepseek", {}, {"prefix": True}),
        ("mistral", {}, {"prefix": True}),
    ],
)
def test_each_server_is_asked_its_own_way(dialect: str, fields: dict[str, Any], message: dict[str, Any]) -> None:
    """The text goes last, as the assistant's; nothing else of the request changes but the length."""
    body = {"model": "m", "messages": [USER], "stream": True, "max_tokens": 100, "seed": 3}
    asked = request(body, dialect, "Once upon a ti", 30)
    assert asked == {
        **body, **fields, "max_tokens": 70,
        "messages": [USER, {"role": "assistant", "content": "Once upon a ti", **message}],
    }  # fmt: skip
    assert body["messages"] == [USER]
    assert set(CONTINUES) == {"", "vllm", "llama.cpp", "deepseek", "mistral"}


def test_the_length_shrinks_by_what_there_is_and_stays_a_length() -> None:
    """At least one token is asked for; a length nobody gave is not made up."""
    assert request({"messages": [], "max_completion_tokens": 10}, "vllm", "x", 30)["max_completion_tokens"] == 1
    assert "max_tokens" not in request({"messages": []}, "vllm", "x", 30)
    assert request({"messages": [], "max_tokens": None}, "vllm", "x", 30)["max_tokens"] is None


def test_only_one_plain_text_can_be_gone_on_with() -> None:
    """Several choices, tools, sound, or a prompt that ends with the assistant's own words: begin anew."""
    assert possible(spec(), "vllm")
    assert possible(spec(n=1, tools=[]), "vllm")
    assert not possible(spec(), "")
    assert not possible(spec(n=2), "vllm")
    assert not possible(spec(tools=[{}]), "vllm")
    assert not possible(spec(functions=[{}]), "vllm")
    assert not possible(spec(modalities=["audio"]), "vllm")
    assert not possible(spec(USER, {"role": "assistant", "content": "Sure: "}), "vllm")


def test_a_partial_is_plain_until_something_else_comes() -> None:
    """Another choice, reasoning or a tool call, and more text than is kept: from then on nothing is kept."""
    partial = Partial()
    partial.add(0, "Hel", None)
    partial.add(0, "lo", None)
    assert (partial.plain, partial.text()) == (True, "Hello")
    partial.add(0, ".", None)
    assert partial.text() == "Hello."
    for index, text, delta in ((1, "x", None), (0, "", {"reasoning": "Hm"}), (0, "x" * (MAX_TEXT + 1), None)):
        other = Partial()
        other.add(0, "a", None)
        other.add(index, text, delta)
        other.add(0, "b", None)
        assert not other.plain
        assert other.text() == ""


@given(st.text(max_size=12), st.text(max_size=12), st.data())
def test_a_repeated_text_is_taken_off_however_it_is_cut(text: str, new: str, data: st.DataObject) -> None:
    """Mistral sends the prefix again: what is left is exactly what is new."""
    echo, whole = Echo("mistral", text), text + new
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert "".join(map(echo.new, filter(None, pieces))) + echo.rest() == new


@given(st.text(max_size=12), st.text(max_size=12))
def test_what_is_no_repetition_stays(text: str, new: str) -> None:
    """Of others nothing is taken off, and of Mistral only a repetition of all of it."""
    plain = Echo("vllm", text)
    assert plain.new(new) + plain.rest() == new
    if not new.startswith(text):
        echo = Echo("mistral", text)
        assert "".join(map(echo.new, new)) + echo.rest() == new


def test_the_usage_is_the_sum_and_an_estimate_where_a_part_is() -> None:
    """Both requests are billed, the second one with the text as a part of its prompt."""
    broken = Answer(prompt_bytes=40)
    broken.take(Piece(0, "a"))
    broken.take(Piece(0, "b"))
    second = Answer(earlier=broken.usage)
    second.take(Piece(0, "c"))
    second.take(Usage({"prompt_tokens": 12, "completion_tokens": 1, "total_tokens": 13, "details": {}}))
    second.take(Finish(0, "stop"))
    usage = {"prompt_tokens": 22, "completion_tokens": 3, "total_tokens": 25, "estimated": True}
    assert second.verdict(done=True).usage == usage
    measured = Answer(earlier={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3})
    measured.take(Usage({"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}))
    assert measured.usage == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
