"""The command: `python -m local up | demo`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from millstream.errors import MillstreamError

from . import guard, parts
from .errors import LocalError


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when it ended as it should, 1 with one clear line when it could not, 130 when interrupted in its tracks."""
    parser = argparse.ArgumentParser(
        prog="python -m local", description="All of Millstream on this machine: Valkey, a small model and a worker."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="keep it all running in the foreground")
    up.add_argument("--data", type=Path, default=guard.ROOT / ".data", help="where data and logs are kept")
    up.add_argument(
        "--port", type=_port, default=parts.USUAL_PORT, help="Valkey's, if it is free (default: %(default)s)"
    )
    commands.add_parser("demo", help="start it all, show a few answers streaming side by side, and end")
    options = parser.parse_args(arguments)
    try:
        if options.command == "up":
            from .up import up as run_up

            return run_up(os.environ, options.data, options.port)
        from .demo import demo

        return demo(os.environ)
    except (LocalError, MillstreamError) as error:
        print(f"local {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and 1 <= int(text) <= 65_535):
        raise argparse.ArgumentTypeError(f"found {text[:40]!r}, expected a port, 1 to 65535")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
