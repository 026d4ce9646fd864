"""What an upstream says about its own limits, in every spelling that headers have for it. Pure.

`x-ratelimit-limit-requests`, `-remaining-`, `-reset-`, the same of tokens (OpenAI, Azure, Groq, Mistral and most
others); with `-minute` behind them (Cerebras); without a meter, which means requests (OpenRouter); and
`anthropic-ratelimit-requests-limit` and so on. Resets are durations, seconds, Unix times or dates.
"""

from __future__ import annotations

import datetime as dt
import math
import time
from collections.abc import Mapping
from typing import Final, NamedTuple

from millstream.meters import Count

from .waits import seconds

_SPELLINGS: Final = {
    "requests": (
        "x-ratelimit-{}-requests", "x-ratelimit-{}-requests-minute", "anthropic-ratelimit-requests-{}", "x-ratelimit-{}"
    ),
    "tokens": ("x-ratelimit-{}-tokens", "x-ratelimit-{}-tokens-minute", "anthropic-ratelimit-tokens-{}"),
}  # fmt: skip


class Counts(NamedTuple):
    """Requests and tokens as the upstream counts them."""

    requests: Count
    tokens: Count

    def __bool__(self) -> bool:
        return self.requests.limit is not None or self.tokens.limit is not None


NONE: Final = Counts(Count(), Count())


def counts(headers: Mapping[str, str], now: float | None = None) -> Counts:
    """What the headers say; `headers` are found whatever their case; `now`: Unix time."""
    now = time.time() if now is None else now
    return Counts(*(_count(headers, _SPELLINGS[meter], now) for meter in ("requests", "tokens")))


def _count(headers: Mapping[str, str], spellings: tuple[str, ...], now: float) -> Count:
    for spelling in spellings:
        limit = _whole(headers.get(spelling.format("limit"), ""))
        if limit is not None and limit > 0:
            remaining = _whole(headers.get(spelling.format("remaining"), ""))
            return Count(limit, remaining, _reset(headers.get(spelling.format("reset"), ""), now))
    return Count()


def _whole(text: str) -> int | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return int(found) if 0 <= found < 1e12 else None  # NaN is in no range


def _reset(text: str, now: float) -> float | None:
    found = seconds(text, now)
    if math.isnan(found):
        try:
            found = dt.datetime.fromisoformat(text.strip()).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return found if 0 <= found < 1e7 else None
