"""`python -m tests.upstream`: the scripted upstream as its own process, steered by the model names it is asked for.

Prints its base URL on a line and serves until SIGTERM or SIGINT. With `--commands` it also reads its standard input,
and ends when that does, so that it cannot outlive the test that holds the pipe. Each line is a command, answered by
one line: `journal` by the exchanges as JSON, `count` by JSON of how many streams there are and were, `open GATE` by
`opened GATE`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from types import FrameType
from typing import NoReturn

from . import ScriptedUpstream


def obey(upstream: ScriptedUpstream, line: str) -> str:
    """The answer to one command."""
    journal = upstream.journal
    match line.split():
        case ["journal"]:
            return json.dumps([exchange.summary() for exchange in journal])
        case ["count"]:
            counts = {"total": journal.total, "open": journal.open_streams, "max_open": journal.max_open_streams}
            return json.dumps(counts)
        case ["open", gate]:
            upstream.open_gate(gate)
            return f"opened {gate}"
        case _:
            return f"not a command: {line.strip()!r}; there are journal, count, open GATE"


def leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Leaves the `with`, whatever the main thread waits for: clients see us close, not vanish. Once is enough."""
    for stopping in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stopping, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    """Serves until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m tests.upstream", description="A scripted OpenAI-compatible API.")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    parser.add_argument("--require-key", action="store_true", help="401 without a key or with the key `bad`")
    parser.add_argument("--keep", type=int, default=10_000, help="how many exchanges the journal remembers")
    parser.add_argument("--commands", action="store_true", help="obey standard input, end when it does")
    options = parser.parse_args()
    for stopping in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stopping, leave)
    try:
        with ScriptedUpstream(port=options.port, require_key=options.require_key, keep=options.keep) as upstream:
            print(upstream.base_url, flush=True)  # noqa: T201 - stdout is the interface
            while not options.commands:
                signal.pause()
            for line in sys.stdin:
                print(obey(upstream, line), flush=True)  # noqa: T201 - as above
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
