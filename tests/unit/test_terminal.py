"""Model output in a terminal: shown, never obeyed."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.terminal import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text\twith a tab\nand a line", "plain text\twith a tab\nand a line"),
        ("héllo 日本 👩‍👩‍👧", "héllo 日本 👩‍👩‍👧"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]8;;http://x\x07link\x1b]8;;\x07", r"\x1b]8;;http://x\x07link\x1b]8;;\x07"),
        ("\x1b]52;c;AAAA\x07", r"\x1b]52;c;AAAA\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("a\r\nb\rc", "a\nb\\x0dc"),
        ("a\u202eb\u2066c", r"a\u202eb\u2066c"),
        ("\0\x08\x7f", r"\x00\x08\x7f"),
        ("\ud800", r"\ud800"),
        ("line\u2028sep", r"line\u2028sep"),
    ],
)
def test_what_could_act_is_written_out(text: str, shown: str) -> None:
    """Escape sequences, bidirectional controls and lone surrogates are spelled; text, tabs and newlines stay."""
    assert printable(text) == shown


@given(st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp", "L"])))
def test_nothing_active_is_left(text: str) -> None:
    """No control character but tab and newline, no surrogate and no bidirectional control is ever let through."""
    shown = printable(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\t\n"]
    assert not [
        c
        for c in shown
        if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    ]
    shown.encode()
