"""How a reader outlasts a server that goes away while it reads. Pure, but for one line of the log per outage."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from .errors import RedisUnavailable

OUTAGE: Final = 300.0
"""Seconds a reader outlasts a Redis that went away while it read."""

RECONNECT: Final = 0.25
"""Seconds between its tries, beyond those of the connection itself."""

log = logging.getLogger("millstream")
"""Says once per outage that a reader waits; with no handler set, Python shows it on stderr."""


class Outage:
    """For how long a reader had no answer. `until` is its own deadline, by `clock` (seconds)."""

    def __init__(self, clock: Callable[[], float], until: float | None = None) -> None:
        self._clock = clock
        self._until = until
        self._known = False
        self._since: float | None = None

    def answered(self) -> None:
        """The server is there."""
        self._known, self._since = True, None

    def outlast(self, error: RedisUnavailable) -> None:
        """Let the reader try again after RECONNECT seconds. Raises the error when nothing was ever answered, or when it
        has lasted too long.
        """
        now = self._clock()
        if not self._known:
            raise error
        if self._since is None:  # not since the last answer: a reader may sleep over what it was given
            self._since = now
            log.warning("%s; reading goes on when it is back", error)
        if now - self._since > OUTAGE or (self._until is not None and now >= self._until):
            raise error
