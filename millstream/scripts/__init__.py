"""The Lua scripts, one file each, and how they are loaded. Every script is idempotent: a lost reply may be retried.

A file's header may hold two directives: `-- uses: _ending` puts that fragment in front of it, and `-- flags: allow-oom`
becomes the server's script header (a script that can only help a full server may run at maxmemory).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

NAMES: Final = (
    "submit", "deliver", "take", "claim", "append", "cancel", "release", "forget", "sweep", "repack",
    "limit_acquire", "limit_again", "limit_renew", "limit_settle", "limit_learn", "limit_look",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Script:
    """One script's text, and the SHA-1 the server knows it by."""

    name: str
    text: str
    sha: str


@cache
def load(name: str, *, header: bool = True) -> Script:
    """The script by its name; `header=False` leaves the `#!lua` line out, which Redis before 7 and fakeredis refuse."""
    body = _read(name)
    for fragment in re.findall(r"^-- uses: (\w+)$", body, re.MULTILINE):
        body = _read(fragment) + body
    if header:
        flags = re.search(r"^-- flags: *([\w, -]*)$", body, re.MULTILINE)
        body = f"#!lua{' flags=' + flags.group(1) if flags and flags.group(1) else ''}\n{body}"
    return Script(name, body, hashlib.sha1(body.encode(), usedforsecurity=False).hexdigest())


def _read(name: str) -> str:
    return files(__package__).joinpath(f"{name}.lua").read_text(encoding="utf-8")
