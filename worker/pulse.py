"""Carries the leases while something keeps the loop busy, and says what it is.

The loop beats a pulse ten times a second; a thread of its own, with a connection of its own, listens. While there is no
pulse the thread sends the heartbeats in the writer's stead, so that a slow step in one job costs no other its lease. A
loop that never comes back is another matter: after STUCK leases the process ends, its jobs go to other workers as
those of any lost one, and whoever watches over the process starts it anew.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Final

import structlog

from millstream.calls import Frame, append
from millstream.client import Client
from millstream.errors import RedisUnavailable
from millstream.settings import Settings

from .writer import MAX_JOBS

BEAT: Final = 0.1
"""Seconds between two beats of the loop."""

STUCK: Final = 4
"""Leases without a pulse after which the process ends: 60 s by default."""

_FRAMES_TOLD: Final = 6

log = structlog.get_logger()


class Pulse:
    """The loop's pulse and the thread that listens. `heartbeats` gives a frame without events for each running job."""

    def __init__(self, settings: Settings, heartbeats: Callable[[], Sequence[Frame]]) -> None:
        self._settings = settings
        self._heartbeats = heartbeats
        self._every = settings.lease / 8
        self._patience = max(settings.lease / 4, 3 * BEAT)
        self._beaten = time.monotonic()
        self._ended = threading.Event()
        self._loop_thread = threading.get_ident()
        self._thread = threading.Thread(target=self._listen, name="pulse", daemon=True)

    async def run(self) -> None:
        """Beat until cancelled."""
        self._beat()
        self._thread.start()
        try:
            while True:
                await asyncio.sleep(BEAT)
                self._beat()
        finally:
            self._ended.set()

    def _beat(self) -> None:
        self._beaten = time.monotonic()

    def _listen(self) -> None:
        with Client(settings=self._settings) as client:
            busy = False
            looked = time.monotonic()
            while not self._ended.wait(self._every):
                now = time.monotonic()
                if now - looked > 2 * self._every:  # the whole process stood still (SIGSTOP): the loop comes first
                    self._beaten = looked = now
                    continue
                looked = now
                silent = now - self._beaten
                if silent < self._patience:
                    if busy:
                        log.info("loop.free")
                    busy = False
                    continue
                if not busy:
                    log.warning("loop.busy", seconds=round(silent, 1), at=_where(self._loop_thread))
                busy = True
                if silent > STUCK * self._settings.lease:
                    log.error("loop.stuck", seconds=round(silent, 1), at=_where(self._loop_thread))
                    os._exit(1)  # nothing in this process can be ended in order any more
                self._carry(client)
                looked = time.monotonic()

    def _carry(self, client: Client) -> None:
        """Renew every lease. Nobody reads the answers: the loop learns from its own calls what has changed."""
        frames = self._heartbeats()
        try:
            for start in range(0, len(frames), MAX_JOBS):
                call = append(self._settings.keys, self._settings.lease, frames[start : start + MAX_JOBS])
                client.run(call)
        except RedisUnavailable as error:
            log.warning("loop.busy_and_redis_away", reason=str(error))


def _where(thread: int) -> list[str]:
    """What this thread executes, the innermost last: places in the code, and nothing of what it works on."""
    frame: FrameType | None = sys._current_frames().get(thread)  # noqa: SLF001 - the documented way to another's stack
    if frame is None:
        return []
    found = traceback.extract_stack(frame)[-_FRAMES_TOLD:]
    return [f"{each.filename.rsplit('/', 1)[-1]}:{each.lineno} {each.name}" for each in found]
