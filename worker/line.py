"""The writer's own connection to Redis: one line, script calls only, RESP by hiredis.

A call through redis-py's asyncio client costs 60 to 100 us of CPU, most of it in layers a single line does not need.
At 400 calls a second that would be a tenth of what the rest of the worker costs. Everything else uses redis-py.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from contextlib import suppress
from typing import Any, cast

import hiredis
from redis.asyncio.connection import SSLConnection, parse_url

from millstream.calls import Call, T
from millstream.errors import RedisUnavailable
from millstream.redis_door import COMMAND_TIMEOUT, place


class KeysBrokenError(RedisUnavailable):
    """A script met a key that is not of its type, or holds what it cannot read: asking again does not mend it."""


class Line:
    """Runs script calls, in order. Connects when it has to; a broken line fails the calls in flight."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._options: dict[str, Any] = dict(parse_url(url))
        self._wire: _Wire | None = None
        self._connecting = asyncio.Lock()

    async def run(self, call: Call[T]) -> T:
        """The call's value. Raises RedisUnavailable when there is no answer, or one that says so; KeysBrokenError."""
        try:
            wire = self._wire
            if wire is None or wire.lost:
                wire = await self._open()
            script = call.load(header=True)
            rest = (len(call.keys), *call.keys, *call.args)
            reply = await _in_time(wire.ask("EVALSHA", script.sha, *rest))
            if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT"):
                reply = await _in_time(wire.ask("EVAL", script.text, *rest))
        except TimeoutError:
            self.close()
            raise self._unavailable(f"no answer within {COMMAND_TIMEOUT:g} s") from None
        except OSError as error:
            self.close()
            raise self._unavailable(str(error)) from None
        if isinstance(reply, hiredis.ReplyError):
            if str(reply).startswith(("READONLY", "MASTERDOWN")):
                self.close()  # demoted: by now its address may lead to another server
            if str(reply).startswith("WRONGTYPE") or (str(reply).startswith("ERR") and "user_script" in str(reply)):
                raise KeysBrokenError(str(self._unavailable(str(reply)[:200])))
            raise self._unavailable(str(reply)[:200])
        return call.decode(reply)

    async def ready(self) -> None:
        """Be connected before a call is urgent; should that fail, the call tries again."""
        with suppress(OSError, TimeoutError):
            await self._open()

    def close(self) -> None:
        """Drop the connection."""
        if self._wire is not None:
            self._wire.abort()
            self._wire = None

    def _unavailable(self, why: str) -> RedisUnavailable:
        return RedisUnavailable(f"Redis at {place(self._url)} does not serve the writer: {why}")

    async def _open(self) -> _Wire:
        async with asyncio.timeout(COMMAND_TIMEOUT), self._connecting:  # calls at once share one, lest others stay open
            if self._wire is None or self._wire.lost:
                self._wire = await self._connect()
            return self._wire

    async def _connect(self) -> _Wire:
        loop, options = asyncio.get_running_loop(), self._options
        if "path" in options:
            _, wire = await loop.create_unix_connection(_Wire, options["path"])
        else:
            host, port = options.get("host", "127.0.0.1"), int(options.get("port", 6379))
            _, wire = await loop.create_connection(_Wire, host, port, ssl=self._tls())
        try:
            if password := options.get("password"):
                user = options.get("username")
                await _expect_ok(wire, "AUTH", *((user, password) if user else (password,)))
            if db := int(options.get("db", 0)):
                await _expect_ok(wire, "SELECT", db)
        except BaseException:
            wire.abort()  # nobody else knows of it yet
            raise
        return wire

    def _tls(self) -> ssl.SSLContext | None:
        options = self._options
        if options.get("connection_class") is not SSLConnection:
            return None
        context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
        if options.get("ssl_cert_reqs") == "none" or options.get("ssl_check_hostname") is False:
            context.check_hostname = False
        if options.get("ssl_cert_reqs") == "none":
            context.verify_mode = ssl.CERT_NONE
        if options.get("ssl_certfile"):
            context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
        return context


async def _in_time(answer: asyncio.Future[Any]) -> Any:
    """What `asyncio.timeout` does, for a future alone and at a quarter of its 11 us."""
    late = asyncio.get_running_loop().call_later(COMMAND_TIMEOUT, _too_late, answer)
    try:
        return await answer
    finally:
        late.cancel()
        if answer.done() and not answer.cancelled():
            answer.exception()  # or asyncio complains, where a cancellation came in the very turn of a lost connection


def _too_late(answer: asyncio.Future[Any]) -> None:
    if not answer.done():
        answer.set_exception(TimeoutError())


async def _expect_ok(wire: _Wire, *command: Any) -> None:
    reply = await wire.ask(*command)
    if isinstance(reply, hiredis.ReplyError):
        raise ConnectionRefusedError(str(reply)[:200])


class _Wire(asyncio.Protocol):
    """Commands out, replies in, in the same order."""

    def __init__(self) -> None:
        self.lost = False
        self._reader = hiredis.Reader()
        self._asked: deque[asyncio.Future[Any]] = deque()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of its own class

    def ask(self, *command: Any) -> asyncio.Future[Any]:
        """Send a command; its reply, which may be an error object, comes by the future."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.lost:
            answer.set_exception(ConnectionResetError("the connection was lost"))
            return answer
        self._asked.append(answer)
        self._transport.write(hiredis.pack_command(command))
        return answer

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not False:
                if not self._asked:
                    self.abort()  # nobody asked: this is no Redis
                    return
                answer = self._asked.popleft()
                if not answer.done():
                    answer.set_result(reply)
        except hiredis.ProtocolError as error:
            self.connection_lost(error)
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        while self._asked:
            answer = self._asked.popleft()
            if not answer.done():
                answer.set_exception(ConnectionResetError(str(error) if error else "the server closed the connection"))

    def abort(self) -> None:
        self.lost = True
        self._transport.abort()
