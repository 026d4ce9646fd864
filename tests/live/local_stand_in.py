"""Stands in for `python -m worker` where a test is about what runs it: registers as RQ's workers do, answers every job
with a text of its own, and on SIGTERM proves that Redis is still there.

Arguments before RQ's: `--text TEXT` is streamed word by word; `--fail` ends jobs as failed; `--deaf` never registers.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from types import FrameType

from millstream import Client
from millstream.testing import ScriptedChannel

STOPPED_KEY = "stand-in:stopped"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--text", default="One word after the other.")
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--deaf", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    with Client.from_env() as client:
        try:
            if not options.deaf:
                client.redis.hset(f"rq:worker:{options.name}", "birth", "now")
            sys.stdout.write(f"pid {os.getpid()} serves\n")
            while True:
                for status in client.list("queued"):
                    _answer(ScriptedChannel(client), status.id, options.text, fail=options.fail)
                time.sleep(0.01)
        except KeyboardInterrupt:
            client.redis.set(STOPPED_KEY, options.name)
            sys.stdout.write("stopped in order\n")
    return 0


def _answer(channel: ScriptedChannel, job_id: str, text: str, *, fail: bool) -> None:
    channel.start(job_id)
    for piece in text.split(" "):
        channel.chunk(job_id, piece + " ")
    if fail:
        channel.fail(job_id, message="it was asked to")
    else:
        channel.complete(job_id)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
