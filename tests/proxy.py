"""A TCP proxy between a client and Redis that does what a network does: loses replies, tears, delays and cuts.

    with Proxy(valkey_url) as proxy:
        proxy.lose_every(5)         # every 5th script call is carried out, and its reply never comes
        proxy.tear_every(7)         # of every 7th the first half of the reply comes, then a reset
        proxy.delay(0.02)           # seconds until each reply is passed on
        proxy.cut()                 # a reset of every connection there is; new ones are made
        proxy.refuse(True)          # the same, and nobody gets through until refuse(False)
        proxy.go_deaf()             # half-open: connections stay, nothing is passed on; new ones are accepted, and deaf
        proxy.hear()                # what connects from now on is served; what was deaf stays so
        proxy.lead_to(other_url)    # new connections reach another server: a failover

But for a deaf or cut connection only what comes back is touched, so that every command reaches the server. Script
calls alone lose replies: they are what writes, and a connection needs more than five replies before its first command.
A pipeline counts as one call.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

_BLOCK: Final = 65_536
_SCRIPT_CALL: Final = re.compile(rb"\$\d\r\nEVAL(?:SHA)?\r\n")


class Proxy:
    """Serves in a thread with a loop of its own. `url` is where clients connect; `lost` counts replies that were."""

    def __init__(self, target_url: str) -> None:
        self._target = _address(target_url)
        self._database = urlsplit(target_url).path
        self._lose, self._tear = 0, 0
        self._seconds = 0.0
        self._calls = 0
        self._refuses = self._deaf = False
        self._carried: set[_Carried] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.lost = 0
        self.url = ""
        self._thread: threading.Thread | None = None
        self._stop: Callable[[], object] = lambda: None

    def lose_every(self, nth: int) -> None:
        """Close the connection instead of passing on what comes after every `nth` script call; 0: none."""
        self._lose = nth

    def tear_every(self, nth: int) -> None:
        """Reset the connection in the middle of the reply to every `nth` script call; 0: none."""
        self._tear = nth

    def delay(self, seconds: float) -> None:
        """Pass replies on so much later."""
        self._seconds = seconds

    def cut(self) -> int:
        """Reset every connection; how many there were."""
        return self._do(self._cut)

    def refuse(self, refuses: bool) -> None:
        """Whether to reset every connection, new ones included."""
        self._refuses = refuses
        if refuses:
            self.cut()

    def go_deaf(self) -> None:
        """From now on nothing passes over any connection, in no direction, and none of them ends."""
        self._deaf = True

        def deafen() -> int:
            for each in self._carried:
                each.deaf = True
            return len(self._carried)

        self._do(deafen)

    def hear(self) -> None:
        """Serve new connections again."""
        self._deaf = False

    def lead_to(self, target_url: str) -> None:
        """Lead new connections to another server; those there are end."""
        self._target = _address(target_url)
        self.cut()

    def __enter__(self) -> Self:
        ready: Future[str] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), name="proxy")
        self._thread.start()
        self.url = ready.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread is not None
        self._stop()
        self._thread.join()

    def _do(self, action: Callable[[], int]) -> int:
        """In the proxy's loop; its result."""
        done: Future[int] = Future()
        assert self._loop is not None
        self._loop.call_soon_threadsafe(lambda: done.set_result(action()))
        return done.result()

    def _cut(self) -> int:
        for each in self._carried:
            each.task.cancel()
        return len(self._carried)

    async def _serve(self, ready: Future[str]) -> None:
        told = asyncio.Event()
        self._loop = loop = asyncio.get_running_loop()
        self._stop = lambda: loop.call_soon_threadsafe(told.set)

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if self._refuses:
                writer.transport.abort()
                return
            carried = _Carried(self._deaf)
            carried.task = asyncio.create_task(self._carry(carried, reader, writer))
            self._carried.add(carried)

            def ended(_task: asyncio.Task[None]) -> None:
                self._carried.discard(carried)
                writer.transport.abort()  # also of a task that was cut before its first step

            carried.task.add_done_callback(ended)

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        ready.set_result(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}{self._database}")
        await told.wait()
        server.close()
        tasks = [each.task for each in self._carried]
        self._cut()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry(self, carried: _Carried, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, forth = await asyncio.open_connection(*self._target)
        except BaseException as error:  # cut before it was made, too
            writer.transport.abort()
            if isinstance(error, OSError):
                return
            raise
        ways = [
            asyncio.create_task(self._forward(carried, reader, forth)),
            asyncio.create_task(self._reply(carried, back, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            writer.transport.abort()  # before the first wait, which a second cut would end
            forth.transport.abort()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _forward(self, carried: _Carried, reader: asyncio.StreamReader, forth: asyncio.StreamWriter) -> None:
        while data := await reader.read(_BLOCK):
            if carried.deaf:
                continue
            if _SCRIPT_CALL.search(data):
                self._calls += 1
                carried.loses |= bool(self._lose) and self._calls % self._lose == 0
                carried.tears |= bool(self._tear) and self._calls % self._tear == 0
            forth.write(data)
            await forth.drain()

    async def _reply(self, carried: _Carried, back: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await back.read(_BLOCK):
            if carried.deaf:
                continue
            if carried.loses or carried.tears:
                self.lost += 1
                if carried.tears:
                    writer.write(data[: len(data) // 2])
                    await asyncio.sleep(0)  # out, before the reset
                return
            if self._seconds:
                await asyncio.sleep(self._seconds)
            writer.write(data)
            await writer.drain()


class _Carried:
    """One connection through the proxy, and what shall become of it."""

    task: asyncio.Task[None]

    def __init__(self, deaf: bool) -> None:
        self.deaf = deaf
        self.loses = self.tears = False


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or 6379
