"""What the tests of upstreams share: a good answer, and clocks so short that a bad one is soon noticed."""

from __future__ import annotations

from typing import Final

from tests.upstream import Text, answer, expected_text

N: Final = 12
WHOLE: Final = expected_text(N, 1)
GOOD: Final = answer(Text(N, seed=1))
SHORT_CLOCKS: Final = {
    "MILLSTREAM_IDLE_TIMEOUT": "1", "MILLSTREAM_FIRST_TOKEN_TIMEOUT": "2", "MILLSTREAM_RETRIES": "2",
}  # fmt: skip
