"""The writer's line on both kinds of loop, a server with a password, and what a server tells of its clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import redis
import uvloop

from millstream import Client
from millstream.calls import Call, claim
from tests.contract.consumers import PATIENCE
from tests.oracle import check_keys
from tests.valkey import Valkey
from worker.line import Line

PASSWORD: Final = "p@ss/w#rd?"
QUOTED: Final = "p%40ss%2Fw%23rd%3F"
"""The same, as a URL has it."""

NOWHERE: Final = "redis://127.0.0.1:1/0"


@asynccontextmanager
async def a_line(url: str) -> AsyncIterator[Line]:
    """A line, closed on the loop it was made on."""
    made = Line(url)
    try:
        yield made
    finally:
        made.close()
        await asyncio.sleep(0)


class Runner:
    """Runs a test on one of the two kinds of loop; what a loop has to complain about fails the test."""

    def __init__(self, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self._loop_factory = loop_factory

    def __call__(self, url: str, test: Callable[[Line], Coroutine[Any, Any, None]]) -> None:
        complaints: list[dict[str, Any]] = []

        async def watched() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
            async with a_line(url) as line:
                await test(line)

        with asyncio.Runner(loop_factory=self._loop_factory) as runner:
            runner.run(watched())
        assert complaints == []


LOOPS: Final = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@contextmanager
def emptied(url: str) -> Iterator[Client]:
    """A client on an empty database, where nothing stays open and no key without a TTL."""
    with Client(url) as made:
        made.redis.flushall()
        yield made
        for job_id in made.redis.zrange(made.keys.open, 0, -1):
            made.cancel(job_id.decode())
        check_keys(made.redis, made.keys)


async def until(holds: Callable[[], bool]) -> None:
    """Poll until it holds, while the loop goes on."""
    async with asyncio.timeout(PATIENCE):
        while not holds():  # noqa: ASYNC110 - what is awaited happens in another process
            await asyncio.sleep(0.001)


def ask(client: Client, job_id: str | None = None, token: str = "t") -> Call[Any]:
    """A call that can be asked again and again, and whose answer is this job's alone."""
    if job_id is None:
        job_id = client.submit("Hi").id
    return claim(client.keys, job_id, token, 15.0)


def connections(redis: Any) -> list[dict[str, Any]]:
    """The connections of lines to this server: whose last command was a script, or part of the greeting."""
    own = redis.client_id()
    last = ("evalsha", "eval", "auth", "select", "NULL")
    return [each for each in redis.client_list() if each["cmd"] in last and int(each["id"]) != own]


def times_called(redis: Any, command: str) -> int:
    return int(redis.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


@contextmanager
def a_locked_server(path: str) -> Iterator[Valkey]:
    """A server with a password, which listens at this unix socket too."""
    server = Valkey.start(options=["--unixsocket", path])
    with redis.Redis.from_url(server.url) as admin:
        admin.config_set("requirepass", PASSWORD)
    try:
        yield server
    finally:
        server.close()


def with_password(url: str, user: str = "") -> str:
    return url.replace("//", f"//{user}:{QUOTED}@")
