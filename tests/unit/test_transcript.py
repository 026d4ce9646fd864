"""From events to an answer, and the callbacks of `stream`."""

from __future__ import annotations

from typing import Any

import pytest

from millstream import Cancelled, Chunk, Completed, Failed, Incomplete, JobCancelled, JobFailed, Started, Transcript
from millstream.events import Event, Resumed, Retrying, Unknown
from millstream.result import Narrator, outcome, raise_for_end


class Story:
    """Events in order, with their seqs given."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def add(self, kind: type[Event], attempt: int = 1, **fields: Any) -> Story:
        self.events.append(kind(seq=len(self.events) + 1, attempt=attempt, at=1700000000.5, **fields))
        return self

    def content(self, *texts: str, attempt: int = 1, index: int = 0) -> Story:
        for text in texts:
            self.add(Chunk, attempt, index=index, delta={"content": text})
        return self

    def delta(self, *, index: int = 0, **delta: Any) -> Story:
        return self.add(Chunk, index=index, delta=delta)

    def read(self) -> Transcript:
        transcript = Transcript()
        for event in self.events:
            transcript.feed(event)
        return transcript

    def message(self, index: int = 0) -> dict[str, Any]:
        message: dict[str, Any] = self.read().completion("j")["choices"][index]["message"]
        return message


def begun() -> Story:
    return Story().add(Started, worker="w", model="m", upstream="u")


def test_calls_of_servers_that_number_them_badly_stay_apart() -> None:
    """An id of its own makes a call, whatever its index; a name that is sent again is no second half."""
    calls = [{"index": 0, "id": name, "function": {"name": name, "arguments": "{}"}} for name in ("f", "g")]
    found = begun().delta(tool_calls=calls[:1]).delta(tool_calls=calls[1:]).message()["tool_calls"]
    assert found == [{key: value for key, value in call.items() if key != "index"} for call in calls]
    again = {"index": 0, "id": "f", "function": {"name": "f", "arguments": "!"}}
    [found] = begun().delta(tool_calls=calls[:1]).delta(tool_calls=[again]).message()["tool_calls"]
    assert found["function"] == {"name": "f", "arguments": "{}!"}
    [found] = begun().delta(tool_calls=[{"function": {"name": "f", "arguments": {"x": [1]}}}]).message()["tool_calls"]
    assert found["function"]["arguments"] == '{"x":[1]}'


def test_old_function_calls_and_what_else_a_delta_has_are_joined() -> None:
    """Text is joined, lists are lengthened, what is said once stays."""
    story = begun().delta(function_call={"name": "f", "arguments": "{"}).delta(function_call={"arguments": "}"})
    story.delta(annotations=[1]).delta(annotations=[2]).delta(reasoning_details=[{"type": "t"}])
    story.delta(audio={"id": "a", "data": "A"}).delta(audio={"data": "B", "expires_at": 3})
    message = story.message()
    assert message["function_call"] == {"name": "f", "arguments": "{}"}
    assert (message["annotations"], message["reasoning_details"]) == ([1, 2], [{"type": "t"}])
    assert message["audio"] == {"id": "a", "data": "AB", "expires_at": 3}


def test_text_is_the_pieces_in_order() -> None:
    """Retries and seams change nothing."""
    story = begun().content("Hel").add(Retrying, delay=2).content("lo").add(Resumed).content("!")
    assert story.read().text == "Hello!"


def test_a_new_attempt_voids_the_text_before_it() -> None:
    """In all choices, reasoning and tool calls included."""
    story = (
        begun()
        .content("old")
        .content("old", index=1)
        .delta(reasoning="old")
        .delta(tool_calls=[{"index": 0, "id": "old"}])
    )
    story.add(Started, 2, model="m2", reason="worker_lost").content("new", attempt=2)
    read = story.read()
    assert (read.text, read.attempt, read.model) == ("new", 2, "m2")
    assert [choice["message"] for choice in read.completion("j")["choices"]] == [
        {"role": "assistant", "content": "new", "refusal": None}
    ]


def test_an_event_of_a_later_version_changes_nothing() -> None:
    """Unknown types are skipped."""
    story = begun().content("a")
    story.events.append(Unknown(seq=3, attempt=1, at=0, type="later"))
    assert story.read().text == "a"


def test_three_choices_keep_apart() -> None:
    """`n=3`, interleaved: each choice has its own text and finish reason; `text` is choice 0's."""
    story = begun().content("a", index=2).content("b").content("c", index=1).content("d", index=2)
    story.add(Completed, finish_reasons={0: "stop", 1: "length", 2: "stop"}, usage={"total_tokens": 9})
    completion = story.read().completion("j")
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in completion["choices"]] == [
        (0, "b", "stop"), (1, "c", "length"), (2, "ad", "stop"),
    ]  # fmt: skip
    assert (story.read().text, completion["usage"]) == ("b", {"total_tokens": 9})


def test_tool_calls_are_put_together_by_their_index() -> None:
    """Arguments come in pieces, two calls interleaved; the id and type come once."""
    story = begun()
    story.delta(tool_calls=[{"index": 0, "id": "c0", "type": "function", "function": {"name": "add", "arguments": ""}}])
    story.delta(
        tool_calls=[{"index": 1, "id": "c1", "type": "function", "function": {"name": "mul", "arguments": '{"b"'}}]
    )
    story.delta(
        tool_calls=[{"index": 0, "function": {"arguments": '{"a":'}}, {"index": 1, "function": {"arguments": ":2}"}}]
    )
    story.delta(tool_calls=[{"index": 0, "id": None, "function": {"name": None, "arguments": "1}"}}])
    assert story.message() == {
        "role": "assistant", "content": None, "refusal": None,
        "tool_calls": [
            {"id": "c0", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}},
            {"id": "c1", "type": "function", "function": {"name": "mul", "arguments": '{"b":2}'}},
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    "calls",
    [5, "text", [3], [None], [[]], [{"index": []}], [{"index": "x"}, {"index": 1}],
     [{"index": 0, "function": {"name": 3, "arguments": ["a"]}}], [{"index": 0, "function": "f"}], {"a": 1}],
    ids=str,
)  # fmt: skip
def test_malformed_tool_calls_break_no_consumer(calls: Any) -> None:
    """The log holds what an upstream sent; whatever that is, the text can still be read."""
    story = begun().content("a").delta(tool_calls=calls).add(Completed, finish_reasons={0: "stop"})
    assert story.read().text == "a"
    assert story.message()["content"] == "a"


def test_reasoning_and_refusal_have_their_own_place() -> None:
    """Neither is mixed into the content; absent ones are not made up."""
    story = begun().delta(reasoning="hm, ").delta(reasoning="yes").delta(refusal="I can").delta(refusal="not")
    assert story.read().text == ""
    assert story.message() == {"role": "assistant", "content": None, "refusal": "I cannot", "reasoning": "hm, yes"}


def test_a_completion_is_what_the_openai_api_answers() -> None:
    """The shape of `chat.completion`."""
    story = begun().content("Hi").add(Completed, finish_reasons={0: "stop"}, usage={"total_tokens": 3})
    assert story.read().completion("j1") == {
        "id": "chatcmpl-j1", "object": "chat.completion", "created": 1700000000, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi", "refusal": None}, "logprobs": None,
                     "finish_reason": "stop"}],
        "usage": {"total_tokens": 3},
    }  # fmt: skip


def test_logprobs_are_joined_by_choice() -> None:
    """As the OpenAI API gives them with the whole answer; null where there were none."""
    story = begun().content("Hi").delta(logprobs={"content": [{"token": "H"}]})
    story.delta(logprobs={"content": [{"token": "i"}], "refusal": "x"}).delta(logprobs=[5])
    completion = story.add(Completed, finish_reasons={0: "stop", 1: "stop"}).read().completion("j1")
    assert [each["logprobs"] for each in completion["choices"]] == [
        {"content": [{"token": "H"}, {"token": "i"}], "refusal": None}, None,
    ]  # fmt: skip


def test_a_choice_that_was_cut_off_has_no_finish_reason() -> None:
    """An answer that failed or was cancelled shows its partial text as such."""
    completion = begun().content("Hi").add(Cancelled).read().completion("j1")
    assert completion["choices"][0]["finish_reason"] is None


def test_a_choice_without_text_is_still_a_choice() -> None:
    """A finish reason alone makes one, as with an empty answer."""
    (choice,) = begun().add(Completed, finish_reasons={0: "stop"}).read().completion("j")["choices"]
    assert choice["message"]["content"] is None


@pytest.mark.parametrize("end", [Completed, Incomplete])
def test_an_answer_is_a_result(end: type[Event]) -> None:
    """`completed` and `incomplete` alike; `status` says which."""
    transcript = begun().content("Hi").add(end, finish_reasons={0: "stop"}, usage={"total_tokens": 3}).read()
    result = outcome("j", transcript)
    assert (result.id, result.status, result.text, result.attempts) == ("j", end.__name__.lower(), "Hi", 1)
    assert (result.usage, result.error) == ({"total_tokens": 3}, None)
    raise_for_end("j", transcript)


def test_a_failure_raises_with_its_code() -> None:
    """Also when the upstream gave no code."""
    story = begun().content("Hi").add(Failed, error={"code": "no_model", "message": "there is none"})
    with pytest.raises(JobFailed, match="there is none") as caught:
        raise_for_end("j", story.read())
    assert caught.value.code == "no_model"
    assert outcome("j", story.read()).error == {"code": "no_model", "message": "there is none"}
    with pytest.raises(JobFailed, match="unknown"):
        raise_for_end("j", begun().add(Failed).read())


def test_a_cancelled_job_raises() -> None:
    """Its partial text stays in the transcript."""
    transcript = begun().content("Hi").add(Cancelled).read()
    with pytest.raises(JobCancelled):
        raise_for_end("j", transcript)
    assert transcript.text == "Hi"


def narrated(story: Story, **options: Any) -> list[Any]:
    told: list[Any] = []
    narrator = Narrator(told.append, lambda attempt, reason: told.append((attempt, reason)), **options)
    for event in story.events:
        narrator.feed(event)
    return told


def test_callbacks_tell_of_a_restart_before_the_new_text() -> None:
    """What was shown is void: the caller hears it before anything new, with the attempt and its reason."""
    story = begun().content("a", "b").add(Started, 2, reason="worker_lost").content("c", attempt=2)
    assert narrated(story) == ["a", "b", (2, "worker_lost"), "c"]


def test_a_restart_before_any_text_is_nobodys_business() -> None:
    """Nothing was shown, so nothing is void."""
    story = (
        begun()
        .add(Started, 2, reason="worker_lost")
        .content("c", attempt=2)
        .add(Started, 3, reason="x")
        .content("d", attempt=3)
    )
    assert narrated(story) == ["c", (3, "x"), "d"]


def test_only_the_first_choice_is_told() -> None:
    """`on_content` shows choice 0; reasoning and empty pieces are not content."""
    assert narrated(begun().content("x", index=1).delta(reasoning="hm").content("", "a")) == ["a"]


def test_a_caller_that_resumes_hears_of_a_restart() -> None:
    """Who goes on from a cursor has shown the text before it."""
    story = Story().add(Started, 2, reason="worker_lost").content("c", attempt=2)
    assert narrated(story, shown=True) == [(2, "worker_lost"), "c"]
