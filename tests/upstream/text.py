"""The text a scripted model writes: a function of a seed, so that a test knows every byte without being told."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from itertools import islice

# About four characters each, as tokens are. Among them whatever breaks careless code: JSON escapes, two, three and
# four byte UTF-8, a combining accent, and text that looks like the grammar of the stream it travels in.
PIECES = (
    "the ", "mill", " turns", "ing ", "water", " and", " grain", ", ", "a ", "wheel", "stone", " to ", "flour", ".\n",
    " of", "by ", "river", " slow", "ly ", "day", " and ", "night", "; ", "it ", "runs", " on", "0", " 42", "er ", "s ",
    'say "', '" ', "C:\\", "\t", "\n\n", "\n\ndata: ", "[DONE]", "é", "e\u0301", "ß ", "漢字", "流れ", "→", "🌾",
    "👩‍🌾", "\u2028",
)  # fmt: skip


def pieces(seed: int) -> Iterator[str]:
    """The endless sequence of chunk contents of one seed. Only `random.random` is used, which Python keeps stable."""
    draw = random.Random(seed).random
    count = len(PIECES)
    while True:
        yield PIECES[int(draw() * count)]


def expected_text(n_chunks: int, seed: int = 0) -> str:
    """What the first `n_chunks` chunks of `Text(..., seed=seed)` say when joined; choice i speaks with `seed + i`."""
    return "".join(islice(pieces(seed), n_chunks))


def seed_of(prompt: str) -> int:
    """The seed of an answer nobody gave one: different prompts read differently, the same prompt always the same."""
    return zlib.crc32(prompt.encode("utf-8", "surrogatepass"))
