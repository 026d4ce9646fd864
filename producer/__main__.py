"""`python -m producer`, and the command `millstream` of the wheel."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

from millstream.errors import MillstreamError

from . import arguments, exits
from .standard import Standard

if TYPE_CHECKING:
    from millstream.client import Client

COMMANDS: Final = {
    "submit": ("submit", "run"),
    "follow": ("follow", "run"),
    "status": ("states", "status"),
    "list": ("states", "listing"),
    "result": ("answers", "result"),
    "cancel": ("answers", "cancel"),
    "forget": ("answers", "forget"),
    "limits": ("limits", "run"),
    "batch": ("batch", "run"),
}
"""Where each command is: a module of this room and a function in it. Imported when called, for a fast `--help`."""


def main(
    argv: Sequence[str] | None = None, connect: Callable[[], Client] | None = None, standard: Standard | None = None
) -> int:
    """Run one command; its exit status. `connect` and `standard` are for tests: a client, the standard streams."""
    standard = standard or Standard.of_process(_prog())
    try:
        try:
            return _run(argv, connect or _from_env, standard)
        except MillstreamError as error:
            standard.say(f"{standard.prog}: {error}")
            return exits.of_error(error)
        finally:
            standard.stdout.flush()
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except BrokenPipeError:
        standard.abandon()
        return exits.CLOSED_PIPE
    except OSError as error:  # a full disk behind stdout; what comes from Redis was translated before
        standard.abandon()
        standard.say(f"{standard.prog}: cannot write the output ({error.strerror or error}); see where it goes to")
        return exits.FAILED


def _run(argv: Sequence[str] | None, connect: Callable[[], Client], standard: Standard) -> int:
    asked = arguments.build(standard.prog).parse_args(argv)
    module, function = COMMANDS[asked.command]
    command = getattr(import_module(f".{module}", __package__), function)
    with connect() as client:
        status: int = command(asked, client, standard)
    return status


def _from_env() -> Client:
    from millstream.client import Client

    return Client.from_env()


def _prog() -> str:
    """How this was called, so that what it tells people to type works."""
    name = Path(sys.argv[0]).name
    return f"python -m {__package__}" if name == "__main__.py" else name


if __name__ == "__main__":
    sys.exit(main())
