"""What upstreams say of their limits, in every spelling."""

from __future__ import annotations

import pytest

from millstream.meters import Count
from worker.upstream.counts import counts

NOW = 1_800_000_000.0
NOTHING = Count()


@pytest.mark.parametrize(
    ("headers", "requests", "tokens"),
    [
        (
            {
                "x-ratelimit-limit-requests": "500", "x-ratelimit-remaining-requests": "499",
                "x-ratelimit-reset-requests": "120ms", "x-ratelimit-limit-tokens": "30000",
                "x-ratelimit-remaining-tokens": "29985", "x-ratelimit-reset-tokens": "6m0s",
            },
            Count(500, 499, 0.12), Count(30_000, 29_985, 360.0),
        ),
        (
            {"x-ratelimit-limit-requests-minute": "30", "x-ratelimit-remaining-requests-minute": "0",
             "x-ratelimit-reset-requests-minute": "41.5"},
            Count(30, 0, 41.5), NOTHING,
        ),
        (
            {"x-ratelimit-limit": "20", "x-ratelimit-remaining": "3", "x-ratelimit-reset": "1800000030000"},
            Count(20, 3, 30.0), NOTHING,
        ),
        (
            {"anthropic-ratelimit-tokens-limit": "40000", "anthropic-ratelimit-tokens-remaining": "39000",
             "anthropic-ratelimit-tokens-reset": "2027-01-15T08:00:20Z"},
            NOTHING, Count(40_000, 39_000, 20.0),
        ),
        ({"x-ratelimit-limit-requests": "-1", "x-ratelimit-remaining-requests": "5"}, NOTHING, NOTHING),
        ({"x-ratelimit-limit-requests": "many", "x-ratelimit-limit-tokens": "nan"}, NOTHING, NOTHING),
        ({"x-ratelimit-limit-requests": "10", "x-ratelimit-reset-requests": "soon"}, Count(10, None, None), NOTHING),
        ({"x-ratelimit-limit-requests": "10", "x-ratelimit-reset-requests": "-5"}, Count(10, None, None), NOTHING),
        ({}, NOTHING, NOTHING),
    ],
)  # fmt: skip
def test_every_spelling_is_read(headers: dict[str, str], requests: Count, tokens: Count) -> None:
    """Limit, rest and reset of requests and tokens; what cannot be read says nothing."""
    found = counts(headers, NOW)
    assert found.requests.limit == requests.limit
    assert found.requests.remaining == requests.remaining
    assert found.requests.reset == (None if requests.reset is None else pytest.approx(requests.reset))
    assert found.tokens.limit == tokens.limit
    assert found.tokens.remaining == tokens.remaining
    assert found.tokens.reset == (None if tokens.reset is None else pytest.approx(tokens.reset))
    assert bool(found) == (requests.limit is not None or tokens.limit is not None)
