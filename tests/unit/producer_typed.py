"""Type a command of the producer in this process, on a fake Redis, and look at what comes out."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from millstream import Client
from producer.__main__ import main
from producer.standard import Standard


@dataclass(frozen=True)
class Typed:
    """What a command left: its exit status, and what it wrote."""

    status: int
    out: str
    err: str


def standard(*, terminal: bool = False, stdin: bytes = b"", width: int = 60) -> Standard:
    """Streams in memory. `terminal` makes stdout count as one."""
    return Standard(io.BytesIO(stdin), io.StringIO(newline=""), io.StringIO(), terminal, width)


def written(streams: Standard) -> tuple[str, str]:
    """What went to stdout and stderr."""
    out, err = streams.stdout, streams.stderr
    assert isinstance(out, io.StringIO)
    assert isinstance(err, io.StringIO)
    return out.getvalue(), err.getvalue()


def typed(client: Client, *argv: str, **how: Any) -> Typed:
    """Run `millstream ARGV` on this client."""
    streams = standard(**how)
    return Typed(main(argv, lambda: client, streams), *written(streams))
