"""Costly requests take turns: each is made in one go on the loop, and the loop must breathe between two of them.

Measured: a spec of 1.6 MB with 60,000 parameters of a tool takes a third of a second from its JSON to the socket. 40 of
them claimed at once kept the loop busy for 15 s, in which no lease was renewed and no chunk passed on.
"""

from __future__ import annotations

import asyncio
from typing import Final

COSTLY: Final = 64 * 1024
"""Bytes of a request from which it waits for its turn: what costs 1 to 15 ms, by its shape."""

BREATH: Final = 0.05
"""Seconds between two turns: a few calls of the writer."""


class Turns:
    """One costly request at a time, in the order in which they come."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def mine(self, size: int) -> None:
        """Wait until a request of so many bytes may be made; it is to be made before the next pause."""
        if size < COSTLY:
            return
        async with self._lock:
            await asyncio.sleep(BREATH)
