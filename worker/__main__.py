"""The command `millstream-worker`, or `python -m worker` in the checkout."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import structlog

import millstream
from millstream.errors import MillstreamError, RedisUnavailable
from millstream.keys import LANES
from millstream.redis_door import connect, translated
from millstream.settings import Settings, describe, misspelled

from . import log as log_lines
from . import redis_checks
from .process import Process
from .rq_worker import StreamWorker, check_release
from .upstream import UpstreamSettings, load

log = structlog.get_logger()

USAGE, UNREACHABLE = 2, 5
"""Exit statuses, as in the producer."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    settings = "\n".join(f"  {name:33}{default:28}{about}" for name, default, about in describe())
    found = argparse.ArgumentParser(
        prog=None if sys.argv[0].endswith("millstream-worker") else "python -m worker",
        description="Take jobs from the lanes and stream their completions into Redis, many at once.",
        epilog="exit status: 0 stopped, or --burst found nothing more; 1 a fault of its own; 2 usage or settings; "
        f"5 Redis cannot be reached\n\nsettings (environment; times in seconds), with their defaults:\n{settings}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "--lane",
        action="append",
        choices=LANES,
        help="a lane to serve; again for more, the first served first (default: all)",
    )
    found.add_argument("--streams", type=int, metavar="N", help="jobs at once (default: MILLSTREAM_STREAMS)")
    found.add_argument("--burst", action="store_true", help="end when the lanes are empty and every job has ended")
    found.add_argument("--name", help="the worker's name in RQ (default: random)")
    found.add_argument("--version", action="version", version=f"millstream-worker {millstream.__version__}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker; the exit status."""
    asked = parser().parse_args(argv)
    # Until the loop has its own: as pid 1 of a container, a process ignores what it has no handler for. At once, as
    # nothing is held yet, and not by an exception, which is lost where it meets somebody's clearing up.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda number, _frame: os._exit(128 + number))
    try:
        check_release()
        if asked.streams is not None and not 1 <= asked.streams <= 10_000:
            return _say(f"--streams: found {asked.streams}, expected 1 to 10000", USAGE)
        settings = Settings.from_env(streams=asked.streams)
        upstreams = load(settings, os.environ)  # which names the variables that hold the keys
        log_lines.configure(settings.log)
        for name, meant in misspelled(os.environ):
            log.warning("settings.unknown", variable=name, meant=meant)
        for upstream in upstreams:
            if upstream.has_no_credentials:
                variable = "OPENAI_API_KEY" if settings.upstreams is None else "api_key_env"
                log.warning("upstream.no_key", upstream=upstream.name, remedy=f"set {variable} if it asks for one")
        connection = connect(settings.redis_url)
        redis_checks.check(connection, settings)
        lanes = dict.fromkeys(asked.lane or LANES)
        with translated(settings.redis_url):
            worker = StreamWorker([settings.keys.queue(lane) for lane in lanes], connection, asked.name)
        _spare_the_collector()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            sound = runner.run(_run(worker, settings, upstreams, burst=asked.burst))
    except RedisUnavailable as error:
        return _say(str(error), UNREACHABLE)
    except MillstreamError as error:
        return _say(str(error), USAGE)
    except ValueError as error:  # RQ: a worker of this name is active
        return _say(str(error), USAGE)
    return 0 if sound else 1


async def _run(worker: StreamWorker, settings: Settings, upstreams: Sequence[UpstreamSettings], *, burst: bool) -> bool:
    return await Process(worker, settings, upstreams).run(burst=burst)


def _spare_the_collector() -> None:
    """What start-up made stays anyway, and streaming makes no cycles: look less often for what can be freed."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _loop_factory() -> Callable[[], Any] | None:
    """uvloop where there is one: it saves 13 to 15 us per wake-up at a paced load."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _say(line: str, status: int) -> int:
    sys.stderr.write(f"millstream-worker: {line}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
