"""`python -m local up`: everything in the foreground, until Ctrl-C."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from millstream.redis_door import place
from millstream.settings import Settings

from . import parts
from .plan import Plan
from .supervise import Say, Stack, signals_interrupt, sole_use

_LOOK: Final = 0.1  # seconds between two looks at the parts


def say(line: str) -> None:
    """To stdout at once, also into a pipe."""
    print(line, flush=True)


def up(
    environ: Mapping[str, str],
    data: Path,
    port: int | None = parts.USUAL_PORT,
    worker_command: Sequence[str] = parts.WORKER_COMMAND,
    say: Say = say,
) -> int:
    """Run until a signal; 0. Valkey listens on `port`, or on any if that is taken or None.

    Raises LocalError when a part cannot start, SettingsError for what the environment holds.
    A second signal while everything is stopping raises KeyboardInterrupt; what still runs then dies with the process.
    """
    plan = Plan.from_environ(environ)
    with signals_interrupt(), sole_use(data):
        stack = Stack(plan, data, port=port, worker_command=worker_command, say=say)
        hurried = False
        try:
            stack.start()
            say(summary(stack, plan, data))
            while True:
                stack.tend()
                time.sleep(_LOOK)
        except KeyboardInterrupt:
            hurried = True  # a second signal may come while these words are written: then nothing is waited for
            say("stopping: the worker finishes its streams first; Ctrl-C again ends everything at once")
            hurried = False
        finally:
            if not hurried:
                stack.stop()
    say("stopped; nothing is left running")
    return 0


def summary(stack: Stack, plan: Plan, data: Path) -> str:
    """What runs where, and what to type next."""
    settings = Settings.from_env(stack.environ)
    ours = plan.redis_url is None  # else the URL may hold a password
    cli = "valkey-cli" if shutil.which("valkey-cli") else "redis-cli"
    redis = stack.redis_url if ours else f"{place(stack.redis_url)}, because REDIS_URL is set"
    python = _shown(Path(sys.executable))
    lines = [
        "",
        "Millstream is up; Ctrl-C stops it.",
        f"  Redis   {redis}",
        f"  model   {plan.upstream}" + (f" ({stack.model_url})" if stack.model_url else ""),
        f"  logs    {_shown(data)}{os.sep}*.log",
        "",
        "Try this in another shell:",
    ]
    if ours and stack.redis_url != Settings().redis_url:
        lines += [f"  export REDIS_URL={stack.redis_url}"]
    lines += [
        f'  {python} -m producer submit "Why do mills stand by rivers?" --model {settings.model} --follow',
        "and to see what goes over the channels:",
        f"  {cli} -u {stack.redis_url if ours else '$REDIS_URL'} psubscribe '{settings.keys.chunks('*')}'",
        "",
    ]
    return "\n".join(lines)


def _shown(path: Path) -> str:
    """Relative to where the reader stands, if it lies below."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
