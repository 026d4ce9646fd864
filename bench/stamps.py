"""The time stamps that the stub writes as content, and how old a text of them is."""

from __future__ import annotations

import time

WIDTH = 4
"""Characters of one stamp, about what a token has."""
UNIT_US = 10
WRAP: int = 62**WIDTH
"""Stamps count units of 10 us modulo this, 147.7 s; an age beyond that would be taken for a small one."""

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_PAIRS = {a + b: 62 * i + j for i, a in enumerate(_DIGITS) for j, b in enumerate(_DIGITS)}


def now() -> int:
    """This moment in stamp units, on the clock that all processes of the machine share."""
    return time.monotonic_ns() // (1000 * UNIT_US) % WRAP


def ages(text: str, at: int) -> list[int]:
    """The age at `at` (see `now`), in units of 10 us, of every stamp in `text`, however many were merged into it.

    Raises ValueError where the text is not a whole number of stamps: then a chunk was cut, lost or altered.
    """
    pairs = _PAIRS
    try:
        # Two table look-ups a stamp: this runs once per chunk, up to 50,000 times a second.
        return [
            (at - pairs[text[i : i + 2]] * 3844 - pairs[text[i + 2 : i + 4]]) % WRAP for i in range(0, len(text), WIDTH)
        ]
    except KeyError:
        raise ValueError(f"not a text of {WIDTH}-character stamps: {text[:40]!r}") from None


def encode(at: int) -> str:
    """The stamp the stub would write at `at`; for tests and for scripted upstreams."""
    digits = []
    for _ in range(WIDTH):
        at, digit = divmod(at, 62)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))
