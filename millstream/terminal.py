"""Model output must not drive a terminal: control characters are shown, not obeyed."""

from __future__ import annotations

import re

# C0 without tab and newline, DEL, C1 (8-bit escape sequences), the bidirectional controls (CVE-2021-42574), line and
# paragraph separators, and lone surrogates, which no terminal encoding can carry.
_ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""The text with every character that could act on a terminal written as `\x1b` or `\u202e`.

    Newlines and tabs stay. A carriage return directly before a newline (CRLF) is dropped.
    """
    return _ACTIVE.sub(_escaped, text.replace("\r\n", "\n"))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
