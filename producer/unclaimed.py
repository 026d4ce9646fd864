"""A word to whoever waits for a job that nobody takes: at first it is mostly a worker that was not started."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Final

from millstream.client import Client
from millstream.errors import MillstreamError

from .standard import Standard

QUIET: Final = 5.0
"""Seconds after which the job is looked at."""


class Unclaimed:
    """While entered, says once that the job waits for a worker, should none have taken it after QUIET seconds.

    Of one job alone: several may be shown on a board, which a line between would tear.
    """

    def __init__(self, client: Client, job_ids: Sequence[str], standard: Standard) -> None:
        self._client, self._job_ids, self._standard = client, job_ids, standard
        self._timer = threading.Timer(QUIET, self._look)  # of its own thread, since following blocks
        self._timer.daemon = True

    def __enter__(self) -> None:
        if len(self._job_ids) == 1:
            self._timer.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._timer.ident is not None:
            self._timer.join(1.0)  # lest it asks a client that is being closed

    def _look(self) -> None:
        try:
            found = self._client.status(self._job_ids[0])
        except MillstreamError:
            return  # whoever follows hears of it
        if found.status == "queued" and found.wait is None and found.attempt == 0:
            self._standard.say(
                f"no worker has taken the job for {QUIET:g} s: does one run (millstream-worker, or python -m worker) "
                f"that serves the lane {found.lane!r} and has a free slot? The job waits for it"
            )
