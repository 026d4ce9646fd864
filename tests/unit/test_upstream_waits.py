"""How long an upstream asks to be left alone, in every form seen."""

from __future__ import annotations

import email.utils

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.upstream.waits import retry_after

NOW = 1_795_352_254.0

SAID = [
    ({"retry-after-ms": "1500"}, 1.5),
    ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
    ({"retry-after-ms": "soon", "retry-after": "3"}, 3.0),
    ({"retry-after": "2"}, 2.0),
    ({"retry-after": "0.25"}, 0.25),
    ({"Retry-After": "7"}, 7.0),
    ({"retry-after": email.utils.formatdate(NOW + 30, usegmt=True)}, 30.0),
    ({"retry-after": "1m30s"}, 90.0),
    ({"retry-after": f"{NOW + 12:.0f}"}, 12.0),
    ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s"}, 1.0),
    ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 360.0),
    ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "120ms"}, 0.12),
    ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1h2m3.5s"}, 3723.5),
    (
        {
            "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s",
            "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "17s",
        },
        17.0,
    ),
    (
        {
            "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s",
            "x-ratelimit-remaining-tokens": "500", "x-ratelimit-reset-tokens": "17s",
        },
        1.0,
    ),
    ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": f"{(NOW + 5) * 1000:.0f}"}, 5.0),
]  # fmt: skip

UNKNOWN = [
    {}, {"retry-after": "0"}, {"retry-after": "-1"}, {"retry-after": "nan"}, {"retry-after": "inf"},
    {"retry-after": "soon"}, {"retry-after": "86401"}, {"retry-after-ms": "0"}, {"retry-after": "1e400"},
    {"retry-after-ms": "-5"}, {"retry-after": "1_0"},
    {"retry-after": "0x10"}, {"retry-after": "9" * 5000 + "s"},
    {"retry-after": email.utils.formatdate(NOW - 30, usegmt=True)}, {"retry-after": "9" * 5000},
    {"retry-after": "Mon, 99 Foo 99999 99:99:99 GMT"},
    {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "-1"},
    {"x-ratelimit-remaining-requests": "-1", "x-ratelimit-reset-requests": "0"},
    {"x-ratelimit-remaining-requests": "12", "x-ratelimit-reset-requests": "1s"},
    {"x-ratelimit-reset-requests": "1s"},
]  # fmt: skip


@pytest.mark.parametrize(("headers", "seconds"), SAID, ids=str)
def test_every_form_is_understood(headers: dict[str, str], seconds: float) -> None:
    """Milliseconds, seconds, durations, dates, Unix times; of several meters the later of those used up."""
    assert retry_after(httpx2.Headers(headers), NOW) == pytest.approx(seconds, abs=1e-3)


@pytest.mark.parametrize("headers", UNKNOWN, ids=lambda headers: str(headers)[:60])
def test_nothing_useful_is_nothing(headers: dict[str, str]) -> None:
    """Zero, less, more than a day and nonsense: the worker's own wait is better."""
    assert retry_after(httpx2.Headers(headers), NOW) is None


@given(st.text(max_size=200), st.sampled_from(["retry-after-ms", "retry-after", "x-ratelimit-reset-tokens"]))
def test_no_header_breaks_it(text: str, name: str) -> None:
    """Whatever it holds: seconds within a day, or None."""
    found = retry_after({name: text, "x-ratelimit-remaining-tokens": "0"}, NOW)
    assert found is None or 0 < found <= 86_400
