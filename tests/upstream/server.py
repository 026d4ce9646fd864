"""The server: listens, plays scripts, keeps the journal; in the test's own event loop or in a thread with its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

import uvloop

from .answers import good_answer
from .connection import Connection, Service
from .journal import Exchange, Journal
from .playbook import Playbook, Source
from .playing import Gates

_BACKLOG = 4096


class ScriptedUpstream:
    """An OpenAI-compatible API that does what it is told.

    `async with` serves on the running loop; plain `with` serves on a uvloop of its own in a thread. Leaving either
    closes every connection, leaves no task, thread or socket behind, and raises what a script itself did wrong.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        require_key: bool = False,
        default: Source = good_answer,
        keep: int | None = None,
    ) -> None:
        """Port 0 takes a free one. With `require_key`, no key and the key `bad` are refused with 401.

        `default` answers what nothing was ordered for. `keep` bounds the journal (None: all), for runs that last.
        """
        self._port = port
        self.journal = Journal(keep)
        self._playbook = Playbook(require_key=require_key, default=default)
        self._gates = Gates()
        self._service = Service(self._playbook.choose, self.journal, self._gates)
        self._server: asyncio.Server | None = None
        self._thread: threading.Thread | None = None
        self._stop_thread: Callable[[], object] | None = None

    @property
    def origin(self) -> str:
        """`http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def base_url(self) -> str:
        """What an OpenAI client takes as its base_url."""
        return f"{self.origin}/v1"

    @property
    def port(self) -> int:
        """The port listened on; kept after stop, so that `start` comes back on the same one."""
        return self._port

    def script(self, *sources: Source) -> None:
        """Answers the next valid requests with these, one each, first come first served."""
        self._playbook.queue(*sources)

    def on(self, *sources: Source, model: str | None = None, prompt: str | None = None) -> None:
        """Answers requests for this model and prompt (None: any) with these in turn, each prompt on its own.

        The last one stays. A script queued by `script` goes before, an older `on` after.
        """
        self._playbook.rule(model, prompt, *sources)

    def open_gate(self, gate: str) -> None:
        """Lets every script that waits at this gate, or comes to it later, go on. From any thread."""
        self._gates.open(gate)

    @property
    def open_streams(self) -> int:
        """How many requests are being answered."""
        return self.journal.open_streams

    def requests_for(self, prompt: str) -> list[Exchange]:
        """The journal's exchanges whose last user message is exactly this, oldest first."""
        return self.journal.requests_for(prompt)

    async def start(self) -> None:
        """Listens on the running loop."""
        loop = asyncio.get_running_loop()
        self.journal.bind()
        self._service.stopping = False
        self._server = await loop.create_server(
            lambda: Connection(self._service), "127.0.0.1", self._port, backlog=_BACKLOG
        )
        self._gates.attach(loop)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stops listening and closes every connection. Raises the first error a script or its callable made."""
        await self._shut()
        self._raise_broken()

    async def _shut(self) -> None:
        assert self._server is not None, "stop() without start()"
        self._service.stopping = True
        self._server.close()
        leaving = list(self._service.connections)
        for connection in leaving:
            connection.stop()
        await asyncio.gather(*(connection.ended() for connection in leaving))
        await self._server.wait_closed()
        self._server = None
        self._gates.attach(None)

    def _raise_broken(self) -> None:
        for exchange in self.journal:
            if exchange.error is not None:
                error, exchange.error = exchange.error, None
                error.add_note(f"raised by the script of request {exchange.number} to the scripted upstream")
                raise error

    async def __aenter__(self) -> Self:
        """Starts on the running loop."""
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops."""
        await self._shut()
        if error is None:  # a failing test's own error says more
            self._raise_broken()

    def __enter__(self) -> Self:
        """Starts in a thread."""
        ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="scripted-upstream", daemon=True)
        self._thread.start()
        try:
            ready.result()
        except BaseException:
            self._thread.join()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops, and waits for the thread."""
        assert self._thread is not None
        assert self._stop_thread is not None
        self._stop_thread()
        self._thread.join()
        self._thread = None
        if error is None:
            self._raise_broken()

    def _run(self, ready: concurrent.futures.Future[None]) -> None:
        async def serve() -> None:
            told = asyncio.Event()
            self._stop_thread = partial(asyncio.get_running_loop().call_soon_threadsafe, told.set)
            try:
                await self.start()
            except BaseException as error:  # noqa: BLE001 - it is the entering thread's to raise
                ready.set_exception(error)
                return
            ready.set_result(None)
            await told.wait()
            await self._shut()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())
