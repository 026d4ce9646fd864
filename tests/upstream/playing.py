"""One script played to one client: steps into time and packets."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable, Mapping
from typing import Protocol

from .journal import Exchange, Journal
from .rendering import Body, Identity, Renderer, body_length, head, to_json
from .script import (
    BodyStep,
    Chunk,
    Close,
    Comment,
    CutChunked,
    Finish,
    Headers,
    Pause,
    Reset,
    Script,
    Split,
    Stall,
    Status,
    Text,
    Usage,
    WaitFor,
    Wire,
)

# A paced text that is late sends at most so many overdue chunks in one write, so that it cannot hog the loop.
_OVERDUE_PER_WRITE = 64


class Line(Protocol):
    """The connection to the client, as a script may use it."""

    async def write(self, data: bytes) -> None:
        """Sends; returns when the kernel has taken all of it."""

    async def handed_over(self) -> None:
        """Returns when the client's kernel has been sent everything."""

    def reset(self) -> None:
        """Ends the connection with a RST."""

    def close(self) -> None:
        """Ends the connection with a FIN."""


class Gates:
    """Named gates that scripts wait at and tests open, from whatever thread."""

    def __init__(self) -> None:
        """All gates are shut."""
        self._opened: set[str] = set()
        self._events: dict[str, asyncio.Event] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """The server runs on this loop from now on, or on none. What was open stays open."""
        self._loop = loop
        self._events.clear()

    def open(self, gate: str) -> None:
        """Lets everyone through from now on."""
        # First the name, then the wake-up: whoever looked before has its event registered when the wake-up runs.
        self._opened.add(gate)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake, gate)

    def _wake(self, gate: str) -> None:
        if gate in self._events:
            self._events[gate].set()

    def is_open(self, gate: str | None) -> bool:
        """Whether scripts go through; no gate is never open."""
        return gate in self._opened

    async def wait(self, gate: str) -> None:
        """Returns when the gate is open. To be called on the server's loop."""
        if gate not in self._opened:
            await self._events.setdefault(gate, asyncio.Event()).wait()


class Player:
    """Plays one script as the answer of one exchange."""

    def __init__(self, script: Script, exchange: Exchange, line: Line, journal: Journal, gates: Gates) -> None:
        """Nothing is sent before `play`."""
        self._script, self._exchange, self._line, self._journal, self._gates = script, exchange, line, journal, gates
        self._identity = Identity(f"chatcmpl-{exchange.number:029d}", int(time.time()), exchange.request.model)
        self._renderer = Renderer(script, self._identity)
        self._body = Body(script)
        self._split: Split | None = None
        self._wired = any(isinstance(step, Wire) for step in script.steps)
        self._keep_alive = script.framing != "close" and not exchange.request.says_close

    async def play(self) -> None:
        """Sends all of it and writes in the journal how it ended; the connection is closed unless it may be reused."""
        for step in self._script.steps:
            match step:
                case Status():
                    await self._whole(step)
                    self._finished()
                    return
                case Headers():
                    await self._head(step)
                case Pause():
                    await asyncio.sleep(step.seconds)
                case WaitFor():
                    await self._wait_for(step.gate)
                case Split():
                    self._split = step
                case Stall():
                    await self._stall(step)
                case Reset():
                    await self._line.handed_over()
                    self._journal.end(self._exchange, "reset_by_script")
                    self._line.reset()
                    return
                case Wire():
                    await self._write(step.data)
                case CutChunked():
                    await self._ensure_head()
                    await self._write(b"%x\r\n%b" % (len(step.data) + 100, step.data))
                    self._closed()
                    return
                case Close():
                    self._closed()
                    return
                case _:
                    await self._ensure_head()
                    await self._play_body(step)
        if self._wired:
            self._closed()
            return
        await self._ensure_head()
        await self._write(self._body.end())
        self._finished()

    def _finished(self) -> None:
        self._journal.end(self._exchange, "finished")
        if not self._keep_alive:
            self._line.close()

    def _closed(self) -> None:
        self._journal.end(self._exchange, "closed_by_script")
        self._line.close()

    async def _whole(self, step: Status) -> None:
        body, kind = step.body, "text/plain; charset=utf-8"
        if isinstance(body, str):
            body = body.encode()
        elif not isinstance(body, bytes):
            body, kind = to_json(body), "application/json"
        headers = {"content-type": kind, "content-length": str(len(body)), **step.headers}
        await self._write(self._head_bytes(step.code, headers) + body)

    async def _ensure_head(self) -> None:
        if self._exchange.status is None:
            await self._head(Headers())

    async def _head(self, step: Headers) -> None:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        if self._script.gzip:
            headers["content-encoding"] = "gzip"
        if self._script.framing == "chunked":
            headers["transfer-encoding"] = "chunked"
        elif self._script.framing == "content-length":
            headers["content-length"] = str(body_length(self._script, self._identity))
        await self._write(self._head_bytes(step.code, {**headers, **step.headers}))

    def _head_bytes(self, code: int, headers: Mapping[str, str]) -> bytes:
        if self._exchange.status is not None:
            raise ValueError("the script sends a second head: Headers and Status come first and once")
        self._exchange.status = code
        usual = {"server": "scripted", "x-request-id": f"req_{self._exchange.number:032x}"}
        return head(code, usual | ({} if self._keep_alive else {"connection": "close"}) | dict(headers))

    async def _wait_for(self, gate: str) -> None:
        self._exchange.waiting_for = gate
        self._journal.changed()
        await self._gates.wait(gate)
        self._exchange.waiting_for = None

    async def _stall(self, step: Stall) -> None:
        if step.comment_every is None:
            await asyncio.Event().wait()  # nobody sets it: the connection's end cancels this task
            return
        await self._ensure_head()
        while True:
            await self._play_body(Comment())
            await asyncio.sleep(step.comment_every)

    async def _play_body(self, step: BodyStep) -> None:
        if isinstance(step, Text) and step.pace_seconds > 0:
            await self._play_paced(step)
            return
        is_chunk = isinstance(step, Text | Chunk | Finish | Usage)
        for block in self._renderer.blocks(step):
            # Others' turn, and the client's to be seen leaving. Before the block, not after: between the last one and
            # the body's end there must be no turn, or a client that leaves at [DONE] would at times have left early.
            await asyncio.sleep(0)
            await self._send([block], is_chunk=is_chunk)

    async def _play_paced(self, step: Text) -> None:
        loop = asyncio.get_running_loop()
        start, pace = loop.time(), step.pace_seconds
        overdue: list[bytes] = []
        blocks = self._renderer.blocks(step)
        for i in itertools.count():
            if self._gates.is_open(step.until) or (block := next(blocks, None)) is None:
                break
            due = start + i * pace
            if due > loop.time() or len(overdue) >= _OVERDUE_PER_WRITE:
                await self._send(overdue)
                overdue = []
                await asyncio.sleep(due - loop.time())
            overdue.append(block)
        await self._send(overdue)

    async def _send(self, blocks: Iterable[bytes], *, is_chunk: bool = True) -> None:
        packed = [self._body.compress(block) for block in blocks]
        if self._split is None:
            await self._write(b"".join(map(self._body.frame, packed)))
        else:
            data, every = b"".join(packed), self._split.every
            for at in range(0, len(data), every):
                await asyncio.sleep(self._split.pause_seconds)
                await self._write(self._body.frame(data[at : at + every]))
        if is_chunk and packed:
            self._exchange.chunks_sent += len(packed)
            self._journal.changed()

    async def _write(self, data: bytes) -> None:
        if data:
            await self._line.write(data)
            self._exchange.bytes_sent += len(data)
            self._journal.changed()
