"""How long an upstream asks to be left alone, in all the forms that headers have for it. Pure.

`retry-after-ms`; `retry-after` in seconds, as a duration or as an HTTP date; else the `x-ratelimit-reset-*` of whatever
has nothing remaining, the later of requests and tokens. OpenAI writes durations (`1s`, `6m0s`, `120ms`), others seconds
or the moment as Unix time. Zero and less mean that the upstream does not know (Azure sends -1 and 0).
"""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Mapping
from typing import Final

LONGEST: Final = 86_400.0
"""Seconds; who asks for more than a day is not believed."""

_METERS: Final = ("requests", "tokens")
_DURATION: Final = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?(?:ms|us|µs|d|h|m|s))+")
_NUMBER: Final = re.compile(r"-?[0-9]{1,20}(?:\.[0-9]{0,20})?")
_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|us|µs|d|h|m|s)")
_UNITS: Final = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_UNIX_TIME: Final = 1e9
_UNIX_MILLISECONDS: Final = 1e12


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds to wait, None where nothing useful is said. `headers` are found whatever their case; `now`: Unix time."""
    now = time.time() if now is None else now
    for found in (
        _known(_number(headers.get("retry-after-ms", "")) / 1000),
        _known(_seconds(headers.get("retry-after", ""), now)),
    ):
        if found is not None:
            return found
    resets = [_reset(headers, f"-{meter}", now) for meter in _METERS] + [_reset(headers, "", now)]
    return max((each for each in resets if each is not None), default=None)


def _reset(headers: Mapping[str, str], meter: str, now: float) -> float | None:
    if _number(headers.get(f"x-ratelimit-remaining{meter}", "")) != 0:
        return None  # there is some left, or nobody knows
    return _known(_seconds(headers.get(f"x-ratelimit-reset{meter}", ""), now))


def _known(seconds: float) -> float | None:
    return seconds if 0 < seconds <= LONGEST else None  # NaN is neither


def _number(text: str) -> float:
    return float(text) if _NUMBER.fullmatch(text.strip()) else math.nan  # float() would take `1_0` and `\u0661`, too


def _seconds(text: str, now: float) -> float:
    text = text.strip()
    if not math.isnan(number := _number(text)):
        if number >= _UNIX_MILLISECONDS:
            return number / 1000 - now
        return number - now if number >= _UNIX_TIME else number
    if _DURATION.fullmatch(text):
        return sum(float(amount) * _UNITS[unit] for amount, unit in _PART.findall(text))
    date = email.utils.parsedate_tz(text) if len(text) < 100 else None
    try:
        return math.nan if date is None else email.utils.mktime_tz(date) - now
    except (ValueError, OverflowError):
        return math.nan
