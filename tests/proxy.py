"""A TCP proxy between a client and Redis that loses replies, or is slow: what a network does to acknowledged writes.

    with Proxy(valkey_port) as proxy:
        proxy.lose_every(5)         # every 5th command of a connection is carried out, and its reply never comes
        proxy.delay(0.02)           # seconds until each reply is passed on

Only what comes back is touched, so that every command reaches the server.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

_BLOCK: Final = 65_536


class Proxy:
    """Serves in a thread with a loop of its own. `url` is where clients connect; `lost` counts replies that were."""

    def __init__(self, target_url: str) -> None:
        parts = urlsplit(target_url)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 6379)
        self._database = parts.path
        self._every = 0
        self._seconds = 0.0
        self._replies = 0
        self.lost = 0
        self.url = ""
        self._thread: threading.Thread | None = None
        self._stop: Callable[[], object] = lambda: None

    def lose_every(self, nth: int) -> None:
        """Close the connection instead of passing on every `nth` packet of replies; 0: none."""
        self._every = nth

    def delay(self, seconds: float) -> None:
        """Pass replies on so much later."""
        self._seconds = seconds

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

    async def _serve(self, ready: Future[str]) -> None:
        told = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._stop = lambda: loop.call_soon_threadsafe(told.set)
        carried: set[asyncio.Task[None]] = set()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._carry(reader, writer))
            carried.add(task)
            task.add_done_callback(carried.discard)

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        ready.set_result(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}{self._database}")
        await told.wait()
        server.close()
        for task in list(carried):
            task.cancel()
        await asyncio.gather(*carried, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, forth = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        ways = [asyncio.create_task(_pump(reader, forth)), asyncio.create_task(self._pump_back(back, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            writer.transport.abort()
            forth.close()

    async def _pump_back(self, back: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await back.read(_BLOCK):
            self._replies += 1
            if self._every and self._replies % self._every == 0:
                self.lost += 1
                return
            if self._seconds:
                await asyncio.sleep(self._seconds)
            writer.write(data)
            await writer.drain()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_BLOCK):
        writer.write(data)
        await writer.drain()
