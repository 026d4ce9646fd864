"""A TCP proxy between a client and Redis that loses replies, or is slow: what a network does to acknowledged writes.

    with Proxy(valkey_port) as proxy:
        proxy.lose_every(5)         # every 5th script call is carried out, and its reply never comes
        proxy.delay(0.02)           # seconds until each reply is passed on

Only what comes back is touched, so that every command reaches the server. Script calls alone lose replies: they are
what writes, and a connection needs more than five replies before its first command. A pipeline counts as one call.
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
        parts = urlsplit(target_url)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 6379)
        self._database = parts.path
        self._every = 0
        self._seconds = 0.0
        self._calls = 0
        self.lost = 0
        self.url = ""
        self._thread: threading.Thread | None = None
        self._stop: Callable[[], object] = lambda: None

    def lose_every(self, nth: int) -> None:
        """Close the connection instead of passing on what comes after every `nth` script call; 0: none."""
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
        doomed = asyncio.Event()
        ways = [
            asyncio.create_task(self._forward(reader, forth, doomed)),
            asyncio.create_task(self._reply(back, writer, doomed)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            writer.transport.abort()
            forth.close()

    async def _forward(self, reader: asyncio.StreamReader, forth: asyncio.StreamWriter, doomed: asyncio.Event) -> None:
        while data := await reader.read(_BLOCK):
            if _SCRIPT_CALL.search(data):
                self._calls += 1
                if self._every and self._calls % self._every == 0:
                    doomed.set()
            forth.write(data)
            await forth.drain()

    async def _reply(self, back: asyncio.StreamReader, writer: asyncio.StreamWriter, doomed: asyncio.Event) -> None:
        while data := await back.read(_BLOCK):
            if doomed.is_set():
                self.lost += 1
                return
            if self._seconds:
                await asyncio.sleep(self._seconds)
            writer.write(data)
            await writer.drain()
