"""The writer's own connection against a real server, and against what only pretends to be one."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final, cast

import pytest

from millstream import Client, RedisUnavailable, Settings
from millstream.calls import claim
from tests.contract.lines import (
    LOOPS,
    NOWHERE,
    PASSWORD,
    QUOTED,
    Runner,
    a_line,
    a_locked_server,
    ask,
    connections,
    emptied,
    times_called,
    until,
    with_password,
)
from tests.valkey import Valkey
from worker import line as line_module
from worker.line import Line


@pytest.fixture(params=LOOPS)
def play(request: pytest.FixtureRequest) -> Runner:
    return Runner(LOOPS[request.param])


@pytest.fixture
def client(valkey: Valkey) -> Iterator[Client]:
    with emptied(valkey.url) as made:
        yield made


@contextmanager
def in_a_hurry() -> Iterator[None]:
    """A server may take 0.3 s, not 5: for as long as it is known not to answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_module, "COMMAND_TIMEOUT", 0.3)
        yield


# What the server says ----------------------------------------------------------------------------------------------


def test_a_script_the_server_does_not_know_is_sent_once(client: Client, valkey: Valkey, play: Runner) -> None:
    """After NOSCRIPT, at first and after SCRIPT FLUSH, the text goes along; from then on its hash is enough."""

    async def body(line: Line) -> None:
        wanted = ask(client)
        for _ in range(2):
            client.redis.script_flush()
            client.redis.config_resetstat()
            for _ in range(5):
                assert (await line.run(wanted)).attempt == 1
            assert (times_called(client.redis, "evalsha"), times_called(client.redis, "eval")) == (5, 1)

    play(valkey.url, body)


def test_an_error_of_the_server_is_raised_and_the_line_goes_on(client: Client, valkey: Valkey, play: Runner) -> None:
    """In words and without a new connection: the next call is served."""

    async def body(line: Line) -> None:
        good = ask(client)
        client.redis.set(client.keys.state("broken"), "no hash", ex=60)
        await line.run(good)
        before = client.redis.info("stats")["total_connections_received"]
        for _ in range(3):
            with pytest.raises(RedisUnavailable, match="does not serve the writer: WRONGTYPE"):
                await line.run(ask(client, "broken"))
            assert (await line.run(good)).outcome == "claimed"
        assert client.redis.info("stats")["total_connections_received"] == before

    play(valkey.url, body)


def test_calls_at_once_get_each_its_own_answer(client: Client, valkey: Valkey, play: Runner) -> None:
    """50 calls without waiting for one another, a tenth of them errors: every answer is its caller's."""

    async def body(line: Line) -> None:
        client.redis.set(client.keys.state("broken"), "no hash", ex=60)
        jobs = [client.submit("Hi").id if number % 10 else "broken" for number in range(50)]
        await line.run(ask(client, jobs[1]))
        for number, job_id in enumerate(jobs):  # job n is at attempt n: the answers differ
            if job_id != "broken":
                client.redis.hset(client.keys.state(job_id), mapping={"attempt": number, "status": "queued"})
        calls = (line.run(ask(client, job_id)) for job_id in jobs)
        found = await asyncio.gather(*calls, return_exceptions=True)
        for number, (job_id, answer) in enumerate(zip(jobs, found, strict=True)):
            if job_id == "broken":
                assert isinstance(answer, RedisUnavailable)
            elif number > 1:
                assert not isinstance(answer, BaseException)
                assert answer.attempt == number + 1

    play(valkey.url, body)


def test_a_demoted_server_is_left(client: Client, valkey: Valkey, play: Runner) -> None:
    """READONLY says that the primary is elsewhere by now: the next call looks for it anew at the same address."""

    async def body(line: Line) -> None:
        wanted = ask(client)
        await line.run(wanted)
        [before] = connections(client.redis)
        client.redis.replicaof("127.0.0.1", "1")
        try:
            with pytest.raises(RedisUnavailable, match="READONLY"):
                await line.run(wanted)
        finally:
            client.redis.replicaof("NO", "ONE")
        assert (await line.run(wanted)).outcome == "claimed"
        [after] = connections(client.redis)
        assert after["id"] != before["id"]

    play(valkey.url, body)


# When the connection goes ------------------------------------------------------------------------------------------


def test_a_dropped_idle_connection_is_made_again(client: Client, valkey: Valkey, play: Runner) -> None:
    """The server closes it between two calls: the second call is served over a new one."""

    async def body(line: Line) -> None:
        wanted = ask(client)
        for _ in range(5):
            await line.run(wanted)
            [ours] = connections(client.redis)
            client.redis.client_kill_filter(_id=ours["id"])
            await until(lambda: line._wire is None or line._wire.lost)
            assert (await line.run(wanted)).outcome == "claimed"

    play(valkey.url, body)


def test_calls_at_once_share_one_connection(client: Client, valkey: Valkey, play: Runner) -> None:
    """Many ask at the same moment once the server is back: whoever opened one of its own would leave it open."""

    async def body(line: Line) -> None:
        for _ in range(2):
            await asyncio.gather(*(line.run(ask(client)) for _ in range(20)))
            [ours] = connections(client.redis)
            client.redis.client_kill_filter(_id=ours["id"])
            await until(lambda: line._wire is None or line._wire.lost)

    play(valkey.url, body)


def test_a_connection_dropped_under_a_call_fails_that_call(client: Client, valkey: Valkey, play: Runner) -> None:
    """Whoever waits is told at once that there is no answer, and asks again."""

    async def body(line: Line) -> None:
        wanted = ask(client)
        await line.run(wanted)
        [ours] = connections(client.redis)
        client.redis.execute_command("CLIENT", "PAUSE", "60000", "WRITE")
        try:
            waiting = [asyncio.ensure_future(line.run(wanted)) for _ in range(3)]
            await until(lambda: blocked(ours["id"]))
            client.redis.client_kill_filter(_id=ours["id"])
            for each in waiting:
                with pytest.raises(RedisUnavailable, match="does not serve the writer"):
                    await each
        finally:
            client.redis.execute_command("CLIENT", "UNPAUSE")
        assert (await line.run(wanted)).outcome == "claimed"

    def blocked(number: str) -> bool:
        return any(each["id"] == number and "b" in each["flags"] for each in client.redis.client_list())

    play(valkey.url, body)


@pytest.mark.parametrize("guarded", [False, True], ids=["open", "with a password"])
def test_a_server_that_stands_still_is_given_up(tmp_path: Path, play: Runner, guarded: bool) -> None:
    """After the time a command may take, on an old connection as on a new one; none is left open, and all goes on."""

    async def body(line: Line) -> None:
        wanted = ask(client)
        await line.run(wanted)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            for _ in range(4):
                with in_a_hurry(), pytest.raises(RedisUnavailable, match=r"no answer within 0\.3 s"):
                    await line.run(wanted)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert (await line.run(wanted)).outcome == "claimed"
        await until(lambda: len(connections(client.redis)) == 1)

    with a_locked_server(str(tmp_path / "socket")) as server, Client(with_password(server.url)) as client:
        client.redis.config_set("requirepass", PASSWORD if guarded else "")
        play(with_password(server.url) if guarded else server.url, body)


def test_a_server_that_is_away_is_named_without_its_password(play: Runner) -> None:
    """Where it was looked for; and once it is there, the same line serves."""

    async def body(line: Line) -> None:
        with pytest.raises(RedisUnavailable, match=r"Redis at 127\.0\.0\.1:1 does not serve the writer") as caught:
            await line.run(claim(Settings().keys, "j", "t", 15.0))
        assert PASSWORD not in str(caught.value)
        assert QUOTED not in str(caught.value)

    play(f"redis://:{QUOTED}@127.0.0.1:1/0", body)


def test_a_restarted_server_is_found_again(play: Runner) -> None:
    """Killed and started on its data: the call in between fails, later ones are served by the same line."""
    server = Valkey.start()
    try:
        with Client(server.url) as client:

            async def body(line: Line) -> None:
                wanted = ask(client)
                await line.run(wanted)
                server.kill()
                for _ in range(2):
                    with pytest.raises(RedisUnavailable):
                        await line.run(wanted)
                server.restart()
                assert (await line.run(wanted)).attempt == 1

            play(server.url, body)
    finally:
        server.close()


def test_a_cancelled_caller_does_not_shift_the_answers(client: Client, valkey: Valkey, play: Runner) -> None:
    """Who stops waiting gives up its own answer, and the next caller gets its own, over the same connection."""

    async def body(line: Line) -> None:
        jobs = [client.submit("Hi").id for _ in range(40)]
        await line.run(ask(client, jobs[0], "first"))
        before = client.redis.info("stats")["total_connections_received"]
        for number, job_id in enumerate(jobs):
            client.redis.hset(client.keys.state(job_id), mapping={"attempt": number, "status": "queued", "holder": ""})
        for number in range(0, 40, 2):
            given_up = asyncio.ensure_future(line.run(ask(client, jobs[number])))
            await asyncio.sleep(0)  # it has asked
            given_up.cancel()
            assert (await line.run(ask(client, jobs[number + 1]))).attempt == number + 2
            assert given_up.cancelled()
        assert client.redis.info("stats")["total_connections_received"] == before

    play(valkey.url, body)


# What pretends to be a server --------------------------------------------------------------------------------------


class Pretender(asyncio.Protocol):
    """Answers whatever it hears with the same bytes; or says them at once."""

    def __init__(self, says: bytes, *, unasked: bool) -> None:
        self._says, self._unasked = says, unasked

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of its own class
        if self._unasked:
            self._transport.write(self._says)

    def data_received(self, data: bytes) -> None:
        self._transport.write(self._says)


@asynccontextmanager
async def pretender(says: bytes, *, unasked: bool = False) -> AsyncIterator[str]:
    """The address of a server of Pretenders."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Pretender(says, unasked=unasked), "127.0.0.1")
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    finally:
        server.close()
        await server.wait_closed()


GARBAGE: Final = {
    "http": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "zeros": b"\0" * 1000,
    "random": b"",
    "an integer that is none": b":many\r\n",
    "a length below zero": b"*-7\r\n$-9\r\n",
    "an error in no encoding": b"-ERR \xff\xfe\r\n",
    "an unfinished answer": b"$1000000\r\nabc",
    "an error too many": b"-ERR A\r\n-ERR B\r\n",
}


@pytest.mark.parametrize("unasked", [False, True], ids=["asked", "unasked"])
@pytest.mark.parametrize("says", GARBAGE.values(), ids=GARBAGE.keys())
def test_what_is_no_server_is_unavailable(play: Runner, says: bytes, unasked: bool, seed: int) -> None:
    """Whatever comes back is RedisUnavailable: the writer waits for a better server, and does not break."""

    async def body(_: Line) -> None:
        noise = says or random.Random(seed).randbytes(64)
        async with pretender(noise, unasked=unasked) as url, a_line(url) as line:
            for _try in range(3):
                with in_a_hurry(), pytest.raises(RedisUnavailable):
                    await line.run(claim(Settings().keys, "j", "t", 15.0))

    play(NOWHERE, body)
