"""The connections to an upstream and the transport over them, against small servers on 127.0.0.1, on both loops."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
import uvloop

from worker.upstream import connection, pool
from worker.upstream.pool import Origin, Pool
from worker.upstream.response import BrokenError
from worker.upstream.transport import RawBodyTransport, body_of

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
REQUEST = b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n"
Play = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def play(request: pytest.FixtureRequest) -> Play:
    def run(story: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(story)

    return run


class Server:
    """Answers each request by the next reply of its script, the last of which stays; None closes without one."""

    def __init__(self, *replies: bytes | None) -> None:
        self._replies = list(replies)
        self.requests: list[bytes] = []
        self.connections = 0
        self.port = 0
        self.gone = asyncio.Event()
        """Set when a client has closed its connection."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
                )
                self.requests.append(head + await reader.readexactly(length))
                reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
                if reply is None:
                    return
                writer.write(reply)
        except (asyncio.IncompleteReadError, ConnectionResetError):
            self.gone.set()
        finally:
            writer.close()
            with suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()


@asynccontextmanager
async def serving(
    *replies: bytes | None, connections: int = 4, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[Server, Pool, Origin]]:
    server, connected = Server(*replies), Pool(connections, 5.0)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server, connected, Origin(tls is not None, "127.0.0.1", server.port)
    finally:
        connected.close()
        listening.close()
        await listening.wait_closed()


async def text(connected: Pool, origin: Origin) -> bytes:
    response = await connected.ask(origin, REQUEST)
    return await response.read(1000, 5.0)


async def until(question: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not question():  # noqa: ASYNC110 - the question is about a server's list
            await asyncio.sleep(0.005)


# Keeping and giving up connections ------------------------------------------------------------------------------------


def test_one_connection_serves_one_request_after_another(play: Play) -> None:
    """A handshake per request would cost a round trip, three with TLS."""

    async def story() -> None:
        async with serving(OK) as (server, connected, origin):
            assert [await text(connected, origin) for _ in range(5)] == [b"hello"] * 5
            assert server.connections == 1

    play(story())


def test_requests_at_the_same_time_have_connections_of_their_own(play: Play) -> None:
    """No request waits for another one's answer."""

    async def story() -> None:
        async with serving(OK, connections=300) as (server, connected, origin):
            found = await asyncio.gather(*(text(connected, origin) for _ in range(200)))
            assert found == [b"hello"] * 200
            assert len(server.requests) == 200

    play(story())


def test_an_idle_connection_that_turns_out_closed_is_asked_again_afresh(play: Play) -> None:
    """The server gave it up between two requests: the caller does not notice."""

    async def story() -> None:
        async with serving(OK, None, OK) as (server, connected, origin):
            assert await text(connected, origin) == b"hello"
            assert await text(connected, origin) == b"hello"
            assert (len(server.requests), server.connections) == (3, 2)

    play(story())


def test_a_fresh_connection_is_not_asked_again(play: Play) -> None:
    """Whoever closes a new connection after a request has read it: asking again is the retries' decision."""

    async def story() -> None:
        async with serving(None) as (server, connected, origin):
            with pytest.raises(BrokenError, match="closed before a response"):
                await text(connected, origin)
            assert len(server.requests) == 1

    play(story())


def test_one_byte_of_response_ends_the_asking_again(play: Play) -> None:
    """The request was read, whatever became of it."""

    async def story() -> None:
        async with serving(OK, b"H", OK) as (server, connected, origin):
            assert await text(connected, origin) == b"hello"
            asking = asyncio.create_task(text(connected, origin))
            await until(lambda: len(server.requests) == 2)
            await asyncio.sleep(0.05)  # for its one byte
            asking.cancel()
            await asyncio.wait([asking])
            assert (len(server.requests), server.connections) == (2, 1)

    play(story())


def test_idle_connections_are_closed_after_a_while(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the server, or something between, does it at a bad moment."""
    monkeypatch.setattr(pool, "KEEP_IDLE", 0.05)

    async def story() -> None:
        async with serving(OK) as (server, connected, origin):
            assert await text(connected, origin) == b"hello"
            async with asyncio.timeout(10):
                await server.gone.wait()
            assert await text(connected, origin) == b"hello"
            assert server.connections == 2

    play(story())


def test_connections_that_only_drain_make_room(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upstream that never ends its bodies cannot make us hold more than so many of them."""
    monkeypatch.setattr(connection, "DRAIN", 60.0)
    endless = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\n[DONE]\r\n"

    async def story() -> None:
        async with serving(endless, connections=3) as (server, connected, origin):
            for _ in range(10):
                response = await connected.ask(origin, REQUEST)
                response.finish()
            assert server.connections == 10
            assert len(connected._open) == 3

    play(story())


def test_a_cancelled_request_closes_its_socket(play: Play) -> None:
    """The server sees the end at once, not with a time-out."""

    async def story() -> None:
        async with serving(b"") as (server, connected, origin):
            asking = asyncio.create_task(text(connected, origin))
            await until(lambda: len(server.requests) == 1)
            asking.cancel()
            async with asyncio.timeout(5):
                await server.gone.wait()
            await asyncio.wait([asking])
            assert asking.cancelled()

    play(story())


# Getting there --------------------------------------------------------------------------------------------------------


def test_nobody_listening_is_an_error_of_the_system(play: Play) -> None:
    """Its words name the address."""

    async def story() -> None:
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            with pytest.raises(OSError, match="onnect"):
                await text(Pool(1, 5.0), Origin(False, "127.0.0.1", held.getsockname()[1]))

    play(story())


def test_who_does_not_shake_hands_in_time_is_given_up(play: Play) -> None:
    """The connect time-out includes TLS."""

    async def story() -> None:
        async with serving(OK) as (_, _, origin):
            connected = Pool(1, 0.1)
            with pytest.raises(BrokenError, match=r"no connection to 127.0.0.1:\d+ within 0.1 s"):
                await text(connected, Origin(True, origin.host, origin.port))
            assert not connected._open

    play(story())


def test_the_next_address_is_tried_when_the_first_is_dead(play: Play) -> None:
    """`localhost` may be ::1 first, where nobody listens."""

    async def story() -> None:
        async with serving(OK) as (_, connected, origin):
            asked = 0

            async def addresses(*_: Any, **__: Any) -> list[Any]:
                nonlocal asked
                asked += 1
                kind = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
                return [
                    (socket.AF_INET6, *kind, ("::1", origin.port, 0, 0)),
                    (socket.AF_INET, *kind, ("127.0.0.1", origin.port)),
                ]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pool, "look_up", addresses)
                both = Origin(False, "both.test", origin.port)
                assert await asyncio.gather(*(text(connected, both) for _ in range(5))) == [b"hello"] * 5
                assert asked == 1, "a name is looked up once for all who wait for it"

    play(story())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of its own authority for 127.0.0.1, with its key."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem"), "-days", "2",
            "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    (folder / "both.pem").write_bytes((folder / "cert.pem").read_bytes() + (folder / "key.pem").read_bytes())
    return folder / "both.pem"


def test_tls_trusts_the_systems_certificates_and_those_of_the_environment(
    play: Play, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown certificate is refused in words; SSL_CERT_FILE makes it known."""
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(certificate)
    pool._trust.cache_clear()

    async def refused() -> None:
        async with serving(OK, tls=own) as (_, connected, origin):
            with pytest.raises(ssl.SSLCertVerificationError, match="self-signed certificate"):
                await text(connected, origin)
            assert not connected._open

    async def trusted() -> None:
        async with serving(OK, tls=own) as (server, connected, origin):
            assert [await text(connected, origin) for _ in range(3)] == [b"hello"] * 3
            assert server.connections == 1
            wrong = Origin(True, "localhost", origin.port)
            with pytest.raises(ssl.SSLCertVerificationError, match="ostname mismatch"):
                await text(connected, wrong)

    play(refused())
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    pool._trust.cache_clear()
    play(trusted())
    pool._trust.cache_clear()


@pytest.fixture
def tls(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ssl.SSLContext]:
    """A server's side of TLS that the pool trusts."""
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    pool._trust.cache_clear()
    yield own
    pool._trust.cache_clear()


def test_an_idle_connection_closed_under_tls_is_asked_again_afresh(play: Play, tls: ssl.SSLContext) -> None:
    """The loop's own good-bye fails on a closed socket; that is no reset by the other end."""

    async def story() -> None:
        async with serving(OK, None, OK, tls=tls) as (server, connected, origin):
            assert await text(connected, origin) == b"hello"
            assert await text(connected, origin) == b"hello"
            assert (len(server.requests), server.connections) == (3, 2)

    play(story())


@pytest.mark.parametrize("size", [10, 8_000_000])
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_what_was_closed_while_the_loop_was_busy_is_asked_again_afresh(
    play: Play, tls: ssl.SSLContext, size: int, *, secure: bool
) -> None:
    """The request is written before the end is seen, and what of it is unsent then fails: still nobody has read it."""
    closed, done = threading.Event(), threading.Event()

    def serve(listening: socket.socket) -> None:
        for turn in range(2):
            try:
                sock, _ = listening.accept()
            except TimeoutError:
                return
            with tls.wrap_socket(sock, server_side=True) if secure else sock as plain:
                plain.recv(100)
                plain.sendall(OK)
                done.wait(10 * turn)
                if secure and not turn:
                    plain.settimeout(0)
                    with suppress(ssl.SSLError, OSError):
                        cast("ssl.SSLSocket", plain).unwrap()
            closed.set()

    async def story() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.settimeout(5)
            thread = threading.Thread(target=serve, args=[listening])
            thread.start()
            connected = Pool(4, 5.0)
            origin = Origin(secure, "127.0.0.1", listening.getsockname()[1])
            try:
                response = await connected.ask(origin, REQUEST)
                assert await response.read(1000, 5.0) == b"hello"
                closed.wait(5)  # in the loop's own thread: it sees nothing
                async with asyncio.timeout(10):
                    response = await connected.ask(origin, REQUEST + b"x" * size)
                assert response.status == 200
            finally:
                done.set()
                connected.close()
                thread.join()

    play(story())


def test_who_is_cancelled_at_any_moment_of_a_handshake_leaves_no_socket(play: Play, tls: ssl.SSLContext) -> None:
    """Nor a number that the next socket has and the loop takes for this one's."""

    async def story() -> None:
        listening = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0, ssl=tls)
        async with listening:
            connected, origin = Pool(300, 5.0), Origin(True, *listening.sockets[0].getsockname())
            for moment in range(60):
                asking = asyncio.create_task(text(connected, origin))
                for _ in range(moment % 20):
                    await asyncio.sleep(0)
                asking.cancel()
                await asyncio.wait([asking])
                assert asking.cancelled()
            await until(lambda: not connected._open)

    play(story())


def test_a_connection_lost_before_it_was_used_is_not_counted(play: Play) -> None:
    """Else a server that closes every connection would fill the pool with what is none."""

    async def story() -> None:
        async with serving(OK) as (_, connected, origin):
            real = connected._open_socket

            async def lost(origin: Origin) -> Any:
                found = await real(origin)
                found.abort()
                return found

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(connected, "_open_socket", lost)
                with pytest.raises(BrokenError):
                    await text(connected, origin)
            assert not connected._open

    play(story())


# The transport --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def talking(*replies: bytes | None, without: tuple[str, ...] = ()) -> AsyncIterator[tuple[Server, Any]]:
    async with serving(*replies) as (server, _, origin):
        transport = RawBodyTransport(4, 5.0, without)
        async with httpx2.AsyncClient(transport=transport, trust_env=False) as client:

            async def post(**more: Any) -> httpx2.Response:
                return await client.post(f"http://127.0.0.1:{origin.port}/v1/x?q=a%20b", **more)

            yield server, post


def test_the_request_is_the_sdks_less_what_it_must_not_say(play: Play) -> None:
    """Target, host, length and body as HTTP wants them; identity encoding only; unwanted headers left out."""

    async def story() -> None:
        async with talking(OK, without=("authorization",)) as (server, post):
            await post(content=b'{"a":1}', headers={"Authorization": "Bearer k", "X-Mine": "m"})
            head, _, body = server.requests[0].partition(b"\r\n\r\n")
            lines = head.lower().split(b"\r\n")
            assert lines[0] == b"post /v1/x?q=a%20b http/1.1"
            assert body == b'{"a":1}'
            assert lines.count(f"host: 127.0.0.1:{server.port}".encode()) == 1
            assert lines.count(b"content-length: 7") == 1
            assert [line for line in lines if line.startswith(b"accept-encoding")] == [b"accept-encoding: identity"]
            assert b"authorization" not in head.lower()
            assert b"x-mine: m" in lines

    play(story())


@pytest.mark.parametrize("value", ["a\r\nX-Other: b", "a\nb", "a\0b"])
def test_a_header_with_a_line_break_is_refused_before_anything_is_sent(play: Play, value: str) -> None:
    """A key read from a file with its newline must not become two headers."""

    async def story() -> None:
        async with talking(OK) as (server, post):
            with pytest.raises(httpx2.LocalProtocolError, match="line break") as caught:
                await post(headers={"X-Key": value})
            assert value not in str(caught.value)
            assert server.requests == []

    play(story())


def test_an_error_body_is_read_up_to_a_limit_and_its_connection_used_again(play: Play) -> None:
    """429 after 429 costs no handshake; a page without end costs 64 KB."""
    error = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 2\r\n\r\n{}"
    endless = b"HTTP/1.1 500 Internal Server Error\r\n\r\n" + b"x" * 200_000

    async def story() -> None:
        async with talking(error, error, endless) as (server, post):
            for _ in range(2):
                response = await post()
                assert (response.status_code, response.content, response.headers["retry-after"]) == (429, b"{}", "1")
            assert server.connections == 1
            response = await post()
            assert (response.status_code, len(response.content)) == (500, 64 * 1024)

    play(story())


def test_no_proxy_of_the_environment_is_asked(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upstream's address is the one in the settings."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")

    async def story() -> None:
        async with talking(OK) as (_, post):
            response = await post()
            assert await body_of(response).read(100, 5) == b"hello"

    play(story())


def test_an_address_that_is_no_http_is_refused_in_words(play: Play) -> None:
    """A typing error in a base URL."""

    async def story() -> None:
        transport = RawBodyTransport(4, 5.0)
        with pytest.raises(httpx2.UnsupportedProtocol, match="found 'ftp', expected http or https"):
            await transport.handle_async_request(httpx2.Request("POST", "ftp://127.0.0.1/"))

    play(story())


def test_an_idle_connection_that_was_reset_is_not_used_before_the_loop_has_seen_it(play: Play) -> None:
    """The reset lies in the socket already: a request over it would fail, and be a request that nobody saw."""
    resets, has_reset = threading.Event(), threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))

    def answer_twice() -> None:
        for number in range(2):
            served, _ = listening.accept()
            with served:
                served.recv(4096)
                served.sendall(OK)
                if number == 0:
                    resets.wait(10)
                    served.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            has_reset.set()

    async def story() -> None:
        connected = Pool(4, 5.0)
        origin = Origin(False, "127.0.0.1", listening.getsockname()[1])
        for _ in range(2):
            response = await connected.ask(origin, REQUEST)
            assert await response.read(100, 5.0) == b"hello"
            resets.set()
            assert has_reset.wait(10)  # the loop stands still, and sees nothing of it
        connected.close()

    server = threading.Thread(target=answer_twice)
    server.start()
    try:
        play(story())
    finally:
        server.join()
        listening.close()
