"""An answer in one piece, from a server that does not stream although it was asked to. Pure.

It is as good as a streamed one and has been billed like one: asking again would bring the same and cost as much.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from .chunks import Chunks
from .failures import UpstreamFailure
from .stream import Take


class Whole:
    """The body of a `chat.completion`, to be played like a stream."""

    done = False
    """There is no `[DONE]` in it; its finish reasons say whether it is whole."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def play(self, take: Take, room: Callable[[], Awaitable[None]]) -> None:
        """Give all parts to `take` at once. Raises UpstreamFailure."""
        parts = list(Chunks().whole(self._body))
        if not parts:
            raise UpstreamFailure("malformed_stream", "found JSON without an answer, expected an event stream")
        if not take(parts):
            await room()
