"""The server: fakeredis behind the network's wires, on virtual time, one command after another.

fakeredis makes a Lua chunk of a script, collects garbage and looks at all globals for every call; here a script is
compiled once per process and called, which is what makes thousands of schedules affordable. What a script does is
fakeredis' own code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import fakeredis
import fakeredis._helpers
import fakeredis._socket._base
import fakeredis.commands_mixins.server_mixin
import fakeredis.model._stream
import hiredis
import redis
from fakeredis import _msgs as msgs
from fakeredis._commands import SUPPORTED_COMMANDS
from fakeredis._helpers import NoResponse, SimpleError
from fakeredis._socket._fakesocket import FakeSocket
from fakeredis.commands_mixins.scripting_mixin import LUA_MODULE

from .loop import Actor, VirtualLoop
from .network import Wire

_TIMED: tuple[Any, ...] = (
    fakeredis._helpers, fakeredis._socket._base, fakeredis.commands_mixins.server_mixin, fakeredis.model._stream,
)  # fmt: skip


@contextmanager
def clock(wall: Callable[[], float]) -> Iterator[None]:
    """Have fakeredis tell this time."""
    before = [module.time for module in _TIMED]
    for module in _TIMED:
        module.time = SimpleNamespace(time=wall)
    try:
        yield
    finally:
        for module, real in zip(_TIMED, before, strict=True):
            module.time = real


class Raw(Exception):  # noqa: N818 - a reply, not an error of this program
    """An error reply, as it stands on the wire."""


class _Lua:
    """One interpreter for all servers of this process."""

    def __init__(self) -> None:
        self.runtime = LUA_MODULE.LuaRuntime(encoding=None, unpack_returned_tuples=True)
        self.caller: Peer | None = None
        self._compiled: dict[bytes, Any] = {}
        setup = self.runtime.eval("function(call, pcall) redis = {call = call, pcall = pcall} end")
        setup(self._call, self._pcall)

    def _call(self, op: bytes, *args: Any) -> Any:
        assert self.caller is not None
        return self.caller.call_from_script(op, args)

    def _pcall(self, op: bytes, *args: Any) -> Any:
        try:
            return self._call(op, *args)
        except SimpleError as error:
            return self.runtime.table_from({b"err": error.value.encode()})

    def function(self, script: bytes) -> Any:
        found = self._compiled.get(script)
        if found is None:
            body = script.split(b"\n", 1)[1] if script.startswith(b"#!") else script
            found = self._compiled[script] = self.runtime.execute(b"return function(KEYS, ARGV)\n" + body + b"\nend")
        return found


_lua = _Lua()
_DECODED: dict[bytes, tuple[str, Any]] = {}


class Peer(FakeSocket):
    """The server's end of one connection."""

    def __init__(self, server: Server, wire: Wire | None) -> None:
        super().__init__(server.fake, 0, client_class=redis.Redis)
        self.server, self.wire = server, wire
        self.answers: list[Any] = []
        self._reader = hiredis.Reader()
        self._held: list[list[bytes]] = []
        self.waiting: tuple[Callable[[bool], Any], Any] | None = None
        self.left = False

    @property
    def subscribed(self) -> bool:
        return self._pubsub > 0

    def receive(self, data: bytes) -> None:
        self._reader.feed(data)
        while (fields := self._reader.gets()) is not False:
            self._held.append(fields)
        self.work()

    def work(self) -> None:
        while self._held and self.waiting is None and not self.left:
            self.server.execute(self, self._held.pop(0))

    def leave(self) -> None:
        """The connection is gone."""
        if not self.left:
            self.left = True
            self.server.leave(self)

    # fakeredis' seams --------------------------------------------------------------------------------------------

    def put_response(self, msg: Any) -> None:
        if self.wire is None:
            self.answers.append(msg)
        elif not self.left:
            self.wire.reply(encode(msg))

    def _decode_error(self, error: SimpleError) -> Any:
        return Raw(error.value)

    def publish(self, channel: bytes, message: bytes) -> int:
        """In the order of subscription: fakeredis' sets have another in every process."""
        listeners = sorted(self._server.subscribers.get(channel, ()), key=FakeSocket.fileno)
        for each in listeners:
            each.put_response([b"message", channel, message])
        return len(listeners)

    def _blocking(self, timeout: float | None, func: Callable[[bool], Any], shape: Any = None) -> Any:
        found = func(True)
        if found is not None or self._in_transaction:
            return found if shape is None else shape(found)
        self.waiting = (func, shape)
        self.server.blocked.append(self)
        if timeout:
            self.server.loop.call_later(timeout, self.unblock, self.waiting, None, context=self.server.actor.context)
        return NoResponse()

    def block_move(self, fields: list[bytes]) -> None:
        """fakeredis' BLMOVE does not block on a list that is not there."""
        _, sig = self._name_to_func("lmove")

        def move(_first: bool) -> Any:
            if fields[1] not in self._db:
                return None
            return self._run_command(self.lmove, sig, fields[1:5], False)

        found = self._blocking(float(fields[5]), move)
        if not isinstance(found, NoResponse):
            self.put_response(found)

    def unblock(self, waiting: Any, found: Any) -> None:
        """Answer the command that waits, unless it was answered."""
        if self.waiting is None or self.waiting is not waiting or self.left:
            return
        _, shape = self.waiting
        self.waiting = None
        self.server.blocked.remove(self)
        self.put_response(self._decode_result(found if shape is None else shape(found)))
        self.work()

    # Scripts -----------------------------------------------------------------------------------------------------

    def evalsha(self, sha1: bytes, numkeys: int, *keys_and_args: bytes) -> Any:
        script = self._server.script_cache.get(sha1)
        if script is None:
            raise SimpleError(msgs.NO_MATCHING_SCRIPT_MSG)
        return self._script(script, numkeys, keys_and_args)

    def eval(self, script: bytes, numkeys: int, *keys_and_args: bytes) -> Any:
        self.script_load(script)
        return self._script(script, numkeys, keys_and_args)

    def _script(self, script: bytes, numkeys: int, rest: tuple[bytes, ...]) -> Any:
        function = _lua.function(script)
        before, _lua.caller = _lua.caller, self
        self._script_resp = 2
        table = _lua.runtime.table_from
        try:
            result = function(table(rest[:numkeys]), table(rest[numkeys:]))
        except LUA_MODULE.LuaError as error:
            raise SimpleError(f"ERR {error} script: user_script") from None
        finally:
            _lua.caller = before
            self._script_resp = None
        return self._convert_lua_result(result, nested=False)

    def call_from_script(self, op: bytes, args: tuple[Any, ...]) -> Any:
        known = _DECODED.get(op)
        if known is None:
            sig = SUPPORTED_COMMANDS.get(op.decode().lower())
            if sig is None:
                raise SimpleError(msgs.WRONG_ARGS_MSG7)
            known = _DECODED[op] = (sig.func_name, sig)
        wanted = [each if type(each) is bytes else b"%.17g" % each for each in args]
        result = self._run_command(getattr(self, known[0]), known[1], wanted, True)
        if type(result) is bytes or type(result) is int:
            return result
        return self._convert_redis_result(_lua.runtime, result)


class Server:
    """One primary. It can be killed, with or without the end of its data, and answer that it is not ready."""

    def __init__(self, loop: VirtualLoop, actor: Actor) -> None:
        self.loop, self.actor = loop, actor
        self.fake = fakeredis.FakeServer(version=(7,))
        self.fake.acl = SimpleNamespace(validate_command=lambda *_: None)  # type: ignore[assignment]
        self.db.condition = SimpleNamespace(notify_all=lambda: None)  # there are no threads here
        self.fake.lock = nullcontext()  # type: ignore[assignment]
        self.blocked: list[Peer] = []
        self.refusal: bytes | None = None
        """What every command is answered instead of being run."""
        self.refuse_scripts_only = False
        self.seen: Callable[[Peer, list[bytes], bool], None] = lambda *_: None
        self.ran: Callable[[list[bytes]], None] = lambda _: None
        """Called after every script, with the command."""
        self.changed = False
        self.db.add_change_callback(self._note_change)
        self.hand = Peer(self, None)

    @property
    def db(self) -> Any:
        return self.fake.dbs[0]

    def _note_change(self) -> None:
        self.changed = True

    def serve(self, wire: Wire) -> Peer:
        return Peer(self, wire)

    def execute(self, peer: Peer, fields: list[bytes]) -> None:
        """Run one command, then whoever was waiting for what it did."""
        script = fields[0] in (b"EVALSHA", b"EVAL")
        if self.refusal is not None and (script or not self.refuse_scripts_only):
            self.seen(peer, fields, True)
            peer.put_response(Raw(self.refusal.decode()))
            return
        self.seen(peer, fields, False)
        if fields[0] == b"BLMOVE":
            peer.block_move(fields)
        else:
            peer._process_command(fields)
        if script:
            self.ran(fields)
        while self.changed and self.blocked:
            self.changed = False
            for each in list(self.blocked):
                waiting = each.waiting
                if waiting is not None and (found := waiting[0](False)) is not None:
                    each.unblock(waiting, found)
        self.changed = False

    def do(self, *fields: str | bytes | int) -> Any:
        """A command by the experimenter's own hand: at once, whatever the weather."""
        before, self.refusal = self.refusal, None
        self.execute(self.hand, [each if isinstance(each, bytes) else str(each).encode() for each in fields])
        self.refusal = before
        answer = self.hand.answers.pop()
        assert not isinstance(answer, Raw), answer
        return answer

    def leave(self, peer: Peer) -> None:
        if peer in self.blocked:
            self.blocked.remove(peer)
        peer._cleanup(self.fake)
        if peer in self.fake.sockets:
            self.fake.sockets.remove(peer)

    # A restart ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> Any:
        """All data as they are now."""
        return copy.deepcopy(self.db._dict)

    def restart(self, data: Any = None) -> None:
        """Begin anew, with all that was written, or with these data."""
        self.fake.script_cache.clear()
        if data is not None:
            self.db._dict = data
            for key, item in data.items():
                self.db.schedule_expiry(key, item.expireat)


def encode(reply: Any) -> bytes:
    """RESP2."""
    if isinstance(reply, bytes):
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, list):
        return b"*%d\r\n%b" % (len(reply), b"".join(map(encode, reply)))
    if isinstance(reply, Raw):
        return b"-%b\r\n" % str(reply).replace("\n", " ").encode()
    raise TypeError(f"{type(reply)} in a reply")
