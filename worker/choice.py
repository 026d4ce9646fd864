"""Which upstream a request goes to: the first that serves its model and may be asked now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .breaker import Guard, Ticket, Wait
from .upstream import Upstream, UpstreamSettings

PATIENCE: Final = 5.0
"""Seconds that are waited for the first upstream before the next one that serves the model is asked."""


class GuardedUpstream(Upstream):
    """An upstream and what spares it."""

    def __init__(self, settings: UpstreamSettings, *, connections: int, connect_timeout: float) -> None:
        super().__init__(settings, connections=connections, connect_timeout=connect_timeout)
        self.guard = Guard(enabled=settings.breaker)


@dataclass(frozen=True, slots=True)
class Held:
    """No upstream may be asked now; `upstream` is the one that may be soonest."""

    wait: Wait
    upstream: GuardedUpstream


class Upstreams:
    """All upstreams of a process, in the order of the settings."""

    def __init__(self, upstreams: Sequence[GuardedUpstream]) -> None:
        self._upstreams = tuple(upstreams)

    def serving(self, model: str) -> list[GuardedUpstream]:
        """Those that serve this model, the preferred one first."""
        return [each for each in self._upstreams if each.settings.serves(model)]

    async def close(self) -> None:
        """Close every connection."""
        for each in self._upstreams:
            await each.close()


def preferred(serving: Sequence[GuardedUpstream]) -> Sequence[GuardedUpstream]:
    """Those whose breaker is closed; all of them when none is."""
    return [each for each in serving if not each.guard.open] or serving


def admit(serving: Sequence[GuardedUpstream], model: str, *, again: bool) -> tuple[GuardedUpstream, Ticket] | Held:
    """Leave to ask one of these now, or the shortest wait. A breaker that is open, or a long wait, passes on."""
    shortest: Held | None = None
    for upstream in serving:
        found = upstream.guard.admit(model, again=again)
        if isinstance(found, Ticket):
            return upstream, found
        if shortest is None or found.seconds < shortest.wait.seconds:
            shortest = Held(found, upstream)
        if not found.open and found.seconds <= PATIENCE:
            break
    assert shortest is not None, "no upstream serves the model"
    return shortest
