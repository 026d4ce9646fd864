"""Which failures of an upstream are worth another try, what they are called, and how long to wait."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.writer_desk import leaping
from worker.retries import FIRST_BACKOFF, LONGEST_BACKOFF, HandBack, persist
from worker.upstream import UpstreamFailure
from worker.upstream.failures import FINAL_CODES, MESSAGE_LIMIT, from_error, from_status

AGAIN: Final = (408, 409, 425, 429, 500, 501, 502, 503, 504, 520, 529, 599)
NEVER: Final = (301, 307, 400, 401, 402, 403, 404, 405, 410, 413, 415, 422, 431, 451)


@pytest.mark.parametrize("status", AGAIN)
def test_these_statuses_are_tried_again(status: int) -> None:
    """Time-outs, conflicts, limits and every 5xx, 529 (overloaded) included."""
    failure = from_status(status, None)
    assert (failure.retryable, failure.code, failure.status) == (True, f"http_{status}", status)


@pytest.mark.parametrize("status", NEVER)
def test_these_statuses_are_final(status: int) -> None:
    """The request itself is at fault, or the upstream is elsewhere."""
    assert not from_status(status, None).retryable


@pytest.mark.parametrize("code", sorted(FINAL_CODES))
def test_some_codes_never_pass_whatever_the_status(code: str) -> None:
    """A 429 for an empty account is still a 429; a 5xx is worth a try whatever its body says."""
    body = {"error": {"message": "No.", "code": code}}
    assert not from_status(429, body).retryable
    assert not from_error(body["error"]).retryable
    assert from_status(500, body).retryable


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"error": {"message": "m", "type": "t", "code": "c"}}, "c", "m"),
        ({"error": {"message": "m", "type": "t", "code": None}}, "t", "m"),
        ({"error": {"message": "m", "type": "t", "code": "429"}}, "t", "m"),
        ({"error": {"message": "m", "code": 429}}, "http_400", "m"),
        ({"error": "text"}, "http_400", "text"),
        ({"message": "m", "code": "c"}, "c", "m"),
        ([{"error": {"message": "m", "code": 400, "status": "INVALID_ARGUMENT"}}], "INVALID_ARGUMENT", "m"),
        ({"detail": "d"}, "http_400", "d"),
        ({"error": None}, "http_400", "the upstream answered 400"),
        ("<html>\n a  page </html>", "http_400", "a page"),
        ("", "http_400", "the upstream answered 400"),
        (None, "http_400", "the upstream answered 400"),
        ([1], "http_400", "the upstream answered 400"),
        (7, "http_400", "the upstream answered 400"),
        ({"error": {"message": ["not", "text"], "code": ["c"]}}, "http_400", '["not", "text"]'),
    ],
)
def test_code_and_message_are_found_in_every_known_shape(body: Any, code: str, message: str) -> None:
    """OpenAI's object, a bare one, FastAPI's detail, text, a page, nothing."""
    failure = from_status(400, body)
    assert (failure.code, failure.message) == (code, message)
    assert failure.error == {"code": code, "message": message, "status": 400}


SECRET: Final = "sk-1234567890abcdef"


@pytest.mark.parametrize(("said", "shown"), [
    (f"{SECRET}: no", "***: no"), (f"a {SECRET} b {SECRET}", "a *** b ***"), ("nothing", "nothing"),
    ("x" * (MESSAGE_LIMIT - 12) + SECRET, "x" * (MESSAGE_LIMIT - 12)),
])  # fmt: skip
def test_a_key_is_never_shown(said: str, shown: str) -> None:
    """In message and code, and where the limit of a message cut it."""
    failure = UpstreamFailure(SECRET, said)
    failure.without(SECRET)
    assert (failure.code, failure.message, str(failure)) == ("***", shown, f"***: {shown}")
    short = UpstreamFailure("none", "there is none")
    short.without("none")
    assert short.message == "there is none"


def test_a_redirect_says_what_to_do() -> None:
    """It is not followed, since the key would go elsewhere."""
    failure = from_status(307, "whatever")
    assert (failure.code, failure.retryable) == ("redirect", False)
    assert "base URL" in failure.message


NAMES = st.sampled_from(["error", "message", "code", "type", "detail"])
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner),
    max_leaves=8,
)


@given(st.integers(300, 599), JSONS)
def test_any_body_gives_a_failure_with_bounds(status: int, body: Any) -> None:
    """Code and message are never empty and never long, whatever an upstream answers."""
    for failure in (from_status(status, body), from_error(body)):
        assert 0 < len(failure.code) <= 64
        assert 0 < len(failure.message) <= MESSAGE_LIMIT


# How long to wait ----------------------------------------------------------------------------------------------------


def run_persist(
    failures: Sequence[UpstreamFailure], tries: int, *, shown: bool = False
) -> tuple[str, list[float], int]:
    """What came of it, the waits announced, and how often it was tried; time leaps."""
    waits: list[float] = []
    outcomes: list[str] = []
    left = list(failures)
    asked = 0

    async def attempt() -> str:
        nonlocal asked
        asked += 1
        if left:
            raise left.pop(0)
        return "answer"

    async def main() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            outcome = await persist(
                attempt,
                retries=tries,
                may_retry=lambda failure: failure.retryable and not shown,
                announce=lambda _failure, delay: waits.append(delay),
            )
        except UpstreamFailure as failure:
            outcome = failure.code
        outcomes.append(outcome)
        assert loop.time() - began == pytest.approx(sum(waits)), "the waits announced are those that were waited"

    leaping(main())
    return outcomes[0], waits, asked


def test_a_failure_is_retried_up_to_the_cap() -> None:
    """`retries` further tries, then the last failure."""
    failing = [UpstreamFailure(f"try_{number}", "") for number in range(10)]
    assert run_persist(failing[:3], 5)[::2] == ("answer", 4)
    assert run_persist(failing, 5)[::2] == ("try_5", 6)
    assert run_persist(failing, 0)[::2] == ("try_0", 1)


def test_what_is_final_or_was_shown_is_not_retried() -> None:
    """One request."""
    assert run_persist([UpstreamFailure("no", "", retryable=False)], 5) == ("no", [], 1)
    assert run_persist([UpstreamFailure("shown", "")], 5, shown=True) == ("shown", [], 1)


def test_the_wait_is_the_upstreams_else_a_backoff() -> None:
    """As it asked; without a word 0.5 s doubling to 5 s, of which at least half is waited."""
    asked = [UpstreamFailure("busy", "", retry_after=seconds) for seconds in (0.25, 1.5, 90.0)]
    assert run_persist(asked, 5)[1] == [0.25, 1.5, 90.0]
    silent = [UpstreamFailure("busy", "") for _ in range(9)]
    waits = run_persist(silent, 9)[1]
    most = [min(LONGEST_BACKOFF, FIRST_BACKOFF * 2**number) for number in range(9)]
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, most, strict=True))
    assert len(set(waits)) > 1


def test_a_wait_that_is_refused_is_not_waited() -> None:
    """Whoever is told of a wait may hand the job back instead: nothing is asked again, no time passes."""
    asked = 0

    async def attempt() -> None:
        nonlocal asked
        asked += 1
        raise UpstreamFailure("busy", "", retry_after=90.0)

    def refuse(_failure: UpstreamFailure, delay: float) -> None:
        raise HandBack(delay, "an upstream")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(HandBack) as caught:
            await persist(attempt, retries=5, may_retry=lambda _failure: True, announce=refuse)
        assert (caught.value.delay, caught.value.upstream) == (90.0, "an upstream")
        assert loop.time() == began

    leaping(main())
    assert asked == 1
