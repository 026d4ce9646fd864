"""Connections to the server, byte for byte, with the faults a real network has.

A request may be lost or come late, a reply may be lost after the server did what was asked, a connection may break or
fall silent; what the client sent before it gave up may still arrive. Nothing is ever reordered on one connection.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .loop import ACTOR, Actor, VirtualLoop


@dataclass
class Faults:
    """Chances per request of one client, and how long a slow one takes."""

    cut_request: float = 0.0
    cut_reply: float = 0.0
    silence: float = 0.0
    slow: float = 0.0
    slowest: float = 0.0
    latency: float = 0.002

    @property
    def any(self) -> bool:
        return bool(self.cut_request or self.cut_reply or self.silence or self.slow)


@dataclass
class Network:
    """All connections. `serve` makes the server's end of one; `down` refuses new ones."""

    loop: VirtualLoop
    rng: random.Random
    server: Actor
    serve: Callable[[Wire], Any]
    note: Callable[..., None]
    faults: Faults = field(default_factory=Faults)
    down: bool = False
    black_hole: bool = False
    wires: list[Wire] = field(default_factory=list)
    injected: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        self.injected[what] = self.injected.get(what, 0) + 1

    async def connect(self, protocol_factory: Any, host: str) -> Any:
        await asyncio.sleep(self.rng.random() * self.faults.latency)
        if self.down:
            if self.black_hole:
                await asyncio.sleep(3600)
            raise ConnectionRefusedError("nobody listens")
        wire = Wire(self, protocol_factory(), ACTOR.get(), host)
        self.wires.append(wire)
        wire.peer = self.serve(wire)
        wire.protocol.connection_made(wire)
        return wire, wire.protocol

    def cut_all(self, *, of: Actor | None = None, subscribers: bool = False) -> int:
        """Break connections, of one actor, or those that are subscribed; both ends learn it."""
        chosen = [
            wire
            for wire in self.wires
            if not wire.broken and of in (None, wire.owner) and (not subscribers or wire.peer.subscribed)
        ]
        for wire in chosen:
            wire.cut()
        return len(chosen)

    def forget(self, wire: Wire) -> None:
        if wire in self.wires:
            self.wires.remove(wire)


class Wire(asyncio.Transport):
    """One connection: the client's transport, and what is on its way in both directions."""

    def __init__(self, network: Network, protocol: Any, owner: Actor, host: str) -> None:
        super().__init__()
        self._network = network
        self._context = contextvars.copy_context()
        self.protocol, self.owner, self.host = protocol, owner, host
        self.peer: Any = None
        self.broken = False
        self._closing = False
        self._silent = False  # whatever is sent is lost, and nobody is told
        self._lose_reply = False
        self._there = self._back = 0.0
        self._reading = True
        self._unread: list[bytes] = []

    # The client's side -------------------------------------------------------------------------------------------

    def write(self, data: Any) -> None:
        if self._closing or self.broken or self._silent:
            return
        network, faults, rng = self._network, self._network.faults, self._network.rng
        late = rng.random() * faults.latency
        if faults.any:
            chance = rng.random()
            if chance < faults.cut_request:
                network.count("request lost")
                network.note(self.owner, "request lost", self.host)
                self.cut()
                return
            if (chance := chance - faults.cut_request) < faults.cut_reply:
                network.count("reply lost")
                self._lose_reply = True
            elif (chance := chance - faults.cut_reply) < faults.silence:
                network.count("connection fell silent")
                network.note(self.owner, "silence", self.host)
                self._silent = True
                if rng.random() < 0.5:
                    return
            elif chance - faults.silence < faults.slow:
                network.count("request late")
                late += rng.random() * faults.slowest
        self._there = max(self._there, network.loop.time() + late)
        network.loop.call_at(self._there, self._arrive, bytes(data), context=network.server.context)

    def _arrive(self, data: bytes) -> None:
        if not self.broken:  # also when the client has closed meanwhile: it was sent
            self.peer.receive(data)

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        loop = self._network.loop
        loop.call_soon(self.protocol.connection_lost, None, context=self._context)
        self._there = max(self._there, loop.time() + self._network.faults.latency)
        loop.call_at(self._there, self._gone, context=self._network.server.context)

    def abort(self) -> None:
        self.close()

    def _gone(self) -> None:
        self.broken = True
        self.peer.leave()
        self._network.forget(self)

    # The server's side -------------------------------------------------------------------------------------------

    def reply(self, data: bytes) -> None:
        """What the server sends, on its way back."""
        if self.broken or self._closing or self._silent:
            return
        network = self._network
        if self._lose_reply:
            network.note(self.owner, "reply lost", self.host)
            self.cut()
            return
        late = network.rng.random() * network.faults.latency
        self._back = max(self._back, network.loop.time() + late)
        network.loop.call_at(self._back, self._deliver, data, context=self._context)

    def _deliver(self, data: bytes) -> None:
        if self._closing or self.broken:
            return
        if self._reading:
            self.protocol.data_received(data)
        else:
            self._unread.append(data)

    def cut(self) -> None:
        """The connection breaks; what was on its way back is lost."""
        if self.broken:
            return
        self.broken = True
        self.peer.leave()
        self._network.forget(self)
        if not self._closing:
            self._closing = True
            lost = self.protocol.connection_lost
            self._network.loop.call_soon(lost, ConnectionResetError("reset by peer"), context=self._context)

    # What asyncio's streams ask of a transport -------------------------------------------------------------------

    def is_closing(self) -> bool:
        return self._closing

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def get_protocol(self) -> Any:
        return self.protocol

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        unread, self._unread = self._unread, []
        for data in unread:
            self.protocol.data_received(data)

    def is_reading(self) -> bool:
        return self._reading

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def can_write_eof(self) -> bool:
        return False
