"""One HTTP/1.1 connection, fed by hand: framing, caps, ends, and when it may be used again."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from worker.upstream import connection
from worker.upstream.connection import SURELY_SENT, Connection
from worker.upstream.response import MAX_HEAD, MAX_HELD, BrokenError, Response, StaleError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
WITHOUT_LENGTH = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Wire:
    """A transport that only notes what is done to it."""

    def __init__(self) -> None:
        self.written = b""
        self.paused = self.aborted = False
        self.unsent = 0

    def write(self, data: bytes) -> None:
        self.written += data

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused
        self.paused = False

    def is_closing(self) -> bool:
        return self.aborted

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.aborted = True


class Reader:
    """A sink that keeps what comes, and pauses where told."""

    def __init__(self, response: Response | None = None, pause_at: bytes | None = None) -> None:
        self.pieces: list[bytes] = []
        self.ended = False
        self.error: Exception | None = None
        self._response = response
        self._pause_at = pause_at

    def data(self, data: bytes) -> None:
        assert not self.ended
        self.pieces.append(data)
        if data == self._pause_at and self._response is not None:
            self._response.pause()

    def end(self, error: Exception | None) -> None:
        assert not self.ended
        self.ended, self.error = True, error

    @property
    def text(self) -> bytes:
        return b"".join(self.pieces)


class Desk:
    """A connection with its fake transport, and a request on it."""

    def __init__(self) -> None:
        self.idle: list[Connection] = []
        self.lost: list[Connection] = []
        self.wire = Wire()
        self.connection = Connection(self.idle.append, self.lost.append)
        self.connection.connection_made(cast("asyncio.Transport", self.wire))
        self.ask()

    def ask(self) -> None:
        self.response = self.connection.ask(b"POST / HTTP/1.1\r\n\r\n")
        self.reader = Reader(self.response)

    def feed(self, *packets: bytes) -> None:
        for packet in packets:
            self.connection.data_received(packet)

    def read(self, pause_at: bytes | None = None) -> Reader:
        self.reader = Reader(self.response, pause_at)
        self.response.start(self.reader)
        return self.reader

    async def failure(self) -> BrokenError:
        """What the wait for the head ends with."""
        with pytest.raises(BrokenError) as caught:
            await self.response.head()
        return caught.value


@pytest.fixture
async def desk() -> Desk:
    return Desk()


# Framing -------------------------------------------------------------------------------------------------------------


async def test_a_body_arrives_in_the_very_call_that_brought_it(desk: Desk) -> None:
    """No task is woken for a packet."""
    desk.feed(HEAD)
    reader = desk.read()
    desk.feed(chunk(b"one"))
    assert reader.pieces == [b"one"]
    desk.feed(chunk(b"two") + chunk(b"three"))
    assert reader.pieces == [b"one", b"two", b"three"]
    desk.feed(b"0\r\n\r\n")
    assert (reader.ended, reader.error, desk.idle) == (True, None, [desk.connection])


async def test_a_response_may_be_cut_anywhere() -> None:
    """Head, chunk frames, trailers: every cut in two gives the same response."""
    whole = b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + chunk(b"data: a\n\n") + b"3;x=y\r\nabc\r\n0\r\nTrailer: t\r\n\r\n"
    for cut in range(1, len(whole)):
        desk = Desk()
        reader = desk.read()
        desk.feed(whole[:cut], whole[cut:])
        await desk.response.head()
        assert (desk.response.status, reader.text, reader.error) == (200, b"data: a\n\nabc", None), cut
        assert [name for name, _ in desk.response.headers] == [b"Content-Type", b"Transfer-Encoding"], cut
        assert desk.idle == [desk.connection], cut


async def test_byte_by_byte_is_the_same(desk: Desk) -> None:
    """Nothing depends on how the network cuts."""
    reader = desk.read()
    desk.feed(*(bytes([each]) for each in HEAD + chunk(b"data: a\n\n") + b"0\r\n\r\n"))
    assert (reader.text, reader.error, desk.idle) == (b"data: a\n\n", None, [desk.connection])


async def test_interim_responses_are_skipped(desk: Desk) -> None:
    """100 and 103 announce; the status is the one that follows."""
    desk.feed(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", PLAIN + b"hello")
    await desk.response.head()
    assert desk.response.status == 200
    assert desk.response.headers == [(b"Content-Length", b"5")]
    assert desk.read().text == b"hello"


async def test_a_body_without_length_ends_with_the_connection(desk: Desk) -> None:
    """It is whole when the other end closes in order, and its connection is not used again."""
    desk.feed(WITHOUT_LENGTH, b"data")
    reader = desk.read()
    desk.connection.connection_lost(None)
    assert (reader.text, reader.ended, reader.error, desk.idle) == (b"data", True, None, [])


async def test_a_body_without_length_that_is_reset_is_broken(desk: Desk) -> None:
    """A reset is no end."""
    desk.feed(WITHOUT_LENGTH, b"data")
    reader = desk.read()
    desk.connection.connection_lost(ConnectionResetError(104, "reset"))
    assert isinstance(reader.error, BrokenError)
    assert "ConnectionResetError" in str(reader.error)


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_a_status_without_a_body_has_none(desk: Desk, status: bytes) -> None:
    """What follows it would be another response."""
    desk.feed(b"HTTP/1.1 " + status + b"\r\n\r\n")
    await desk.response.head()
    assert (desk.read().ended, desk.idle) == (True, [desk.connection])


async def test_another_protocol_is_not_spoken(desk: Desk) -> None:
    """101 is a status like another, and the end of its connection."""
    desk.feed(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\nx")
    await desk.response.head()
    assert (desk.response.status, desk.wire.aborted, desk.idle) == (101, True, [])


# What is no response --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "packets",
    [
        [b"data: no head\n\n"],
        [b"\x16\x03\x01\x02\x00\x01\x00"],
        [b"HTTP/2 200\r\n\r\n"],
        [b"HTTP/1.1 abc\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\nhello"],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * MAX_HEAD + b"\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\n", *([b"X: " + b"x" * 1000 + b"\r\n"] * 70)],
        [b"HTTP/1.1 200 OK\r\n", *([b"a" * 1000] * 70)],
        [b"HTTP/1.1 100 Continue\r\n\r\n"] * 3000,
    ],
    ids=lambda packets: packets[0][:50].decode("latin-1").split("\r\n")[-1] or packets[0][:20].decode("latin-1"),
)
async def test_what_is_no_response_is_refused_and_its_connection_closed(desk: Desk, packets: list[bytes]) -> None:
    """Garbage, other protocols, contradicting lengths, heads without end: an error that says so, in bounded memory."""
    desk.feed(*packets)
    assert str(await desk.failure())
    assert desk.wire.aborted
    assert desk.lost
    assert not desk.idle


@pytest.mark.parametrize(
    "rest",
    [
        [b"zz\r\nhello\r\n"],
        [b"-5\r\nhello\r\n"],
        [b"5\r\nhelloo\r\n"],
        [b"fffffffffffffffff\r\nhello\r\n"],
        [b"5;", *([b"x" * 1000] * 70)],
        [b"0\r\n", *([b"X: " + b"x" * 1000 + b"\r\n"] * 70)],
        [b"0\r\nX: ", *([b"x" * 1000] * 70)],
    ],
    ids=["no number", "negative", "longer than said", "too large a number", "extension", "trailers", "one trailer"],
)
async def test_a_broken_body_ends_with_what_came_before(desk: Desk, rest: list[bytes]) -> None:
    """Bad chunk sizes, extensions and trailers without end: the reader is told, the connection closed."""
    desk.feed(HEAD, chunk(b"first"))
    reader = desk.read()
    desk.feed(*rest)
    assert reader.text.startswith(b"first")
    assert isinstance(reader.error, BrokenError)
    assert desk.wire.aborted
    assert not desk.idle


@pytest.mark.parametrize("head", [HEAD + b"5\r\nhel", PLAIN + b"hel"], ids=["inside a chunk", "short of its length"])
async def test_an_early_close_is_told_from_an_end(desk: Desk, head: bytes) -> None:
    """What came before it is given first."""
    desk.feed(head)
    desk.connection.connection_lost(None)
    reader = desk.read()
    assert reader.text == b"hel"
    assert str(reader.error) == "the connection was closed in the middle of the body"


async def test_a_close_before_the_head_says_so(desk: Desk) -> None:
    """On a first use it is no stale connection: the request may have been seen."""
    desk.connection.connection_lost(None)
    error = await desk.failure()
    assert not isinstance(error, StaleError)
    assert str(error) == "the connection was closed before a response"


# Using it again -------------------------------------------------------------------------------------------------------


async def test_a_reused_connection_that_closes_without_a_byte_is_stale(desk: Desk) -> None:
    """Only then is it certain enough that the request was never read."""
    desk.feed(PLAIN + b"hello")
    desk.ask()
    desk.connection.connection_lost(None)
    assert isinstance(await desk.failure(), StaleError)


async def test_a_reused_connection_that_sent_a_byte_is_not_stale(desk: Desk) -> None:
    """One byte means that the request was read."""
    desk.feed(PLAIN + b"hello")
    desk.ask()
    desk.feed(b"H")
    desk.connection.connection_lost(None)
    assert not isinstance(await desk.failure(), StaleError)


async def test_nothing_is_asked_of_a_connection_that_is_closing(desk: Desk) -> None:
    """Between its end and the loop's word of it, it is stale already."""
    desk.feed(PLAIN + b"hello")
    desk.wire.aborted, desk.wire.written = True, b""
    desk.ask()
    assert isinstance(await desk.failure(), StaleError)
    assert not desk.wire.written


@pytest.mark.parametrize(
    "response",
    [
        PLAIN + b"helloHTTP/1.1 200 OK\r\n",
        PLAIN + b"hello world",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    ],
    ids=["a second response", "more than was announced", "Connection: close", "HTTP/1.0"],
)
async def test_a_connection_that_cannot_be_trusted_again_is_closed(desk: Desk, response: bytes) -> None:
    """The response itself counts, and whatever follows it is nobody's."""
    desk.feed(response)
    assert desk.read().text == b"hello"
    assert (desk.reader.error, desk.idle, desk.wire.aborted) == (None, [], True)


async def test_bytes_nobody_asked_for_close_an_idle_connection(desk: Desk) -> None:
    """Else they would be taken for the next response."""
    desk.feed(PLAIN + b"hello", PLAIN + b"other")
    assert desk.wire.aborted
    assert desk.lost == [desk.connection]


async def test_an_answer_before_the_request_was_sent_ends_the_connection(desk: Desk) -> None:
    """A 413 to a large prompt: the rest of the request would be read as the next one."""
    desk.wire.unsent = 100_000
    desk.feed(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
    assert (desk.read().text, desk.response.status, desk.wire.aborted, desk.idle) == (b"no", 413, True, [])


async def test_a_refusal_of_a_large_request_ends_the_connection(desk: Desk) -> None:
    """Under TLS, and in the system's buffers, nobody sees what is unsent: who refuses may never read the rest."""
    desk.feed(PLAIN + b"hello")
    desk.response = desk.connection.ask(b"x" * (SURELY_SENT + 1))
    desk.feed(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\n\r\nno")
    assert (desk.read().text, desk.wire.aborted, desk.idle) == (b"no", True, [desk.connection])


async def test_an_orderly_end_is_told_at_once(desk: Desk) -> None:
    """Not after the request was sent wholly, to somebody who reads no more, nor as the error that this ends with."""
    desk.wire.unsent = 100_000
    desk.feed(b"HTTP/1.1 413 Too Large\r\n\r\nno")
    reader = desk.read()
    desk.connection.eof_received()
    assert (reader.text, reader.ended, reader.error, desk.wire.aborted) == (b"no", True, None, True)


async def test_an_orderly_end_of_an_idle_connection_makes_the_next_request_stale(desk: Desk) -> None:
    """Even if sending to it fails afterwards."""
    desk.feed(PLAIN + b"hello")
    desk.ask()
    desk.connection.eof_received()
    desk.connection.connection_lost(BrokenPipeError())
    assert isinstance(await desk.failure(), StaleError)


async def test_a_connection_that_nobody_waits_for_any_more_is_closed_when_it_is_made() -> None:
    """Who waited was cancelled meanwhile."""
    wire, connected = Wire(), Connection(lambda _: None, lambda _: None)
    connected.wanted = False
    connected.connection_made(cast("asyncio.Transport", wire))
    assert wire.aborted


# Pausing, finishing, leaving ------------------------------------------------------------------------------------------


async def test_a_pause_holds_even_what_came_in_the_same_packet(desk: Desk) -> None:
    """Back-pressure is exact: nothing is given after the call that paused."""
    desk.feed(HEAD)
    reader = desk.read(pause_at=b"two")
    desk.feed(chunk(b"one") + chunk(b"two") + chunk(b"three") + b"0\r\n\r\n")
    assert (reader.pieces, reader.ended) == ([b"one", b"two"], False)
    desk.response.resume()
    assert (reader.pieces, reader.ended, reader.error) == ([b"one", b"two", b"three"], True, None)


async def test_a_pause_reaches_the_socket_and_ends_with_the_response(desk: Desk) -> None:
    """An idle connection is read, to notice its end."""
    desk.feed(HEAD)
    reader = desk.read(pause_at=b"one")
    desk.feed(chunk(b"one"))
    paused = desk.wire.paused
    desk.response.resume()
    assert (paused, desk.wire.paused) == (True, False)
    desk.feed(chunk(b"one") + b"0\r\n\r\n")
    assert (desk.idle, desk.wire.paused) == ([desk.connection], False)
    desk.response.resume()
    assert reader.ended


async def test_a_body_nobody_reads_is_held_up_to_a_limit(desk: Desk) -> None:
    """Between the head and its reader the other end may not fill our memory."""
    desk.feed(HEAD)
    desk.feed(*[chunk(b"x" * 10_000)] * (MAX_HELD // 10_000 + 1))
    paused = desk.wire.paused
    assert len(desk.read().text) == 10_000 * (MAX_HELD // 10_000 + 1)
    assert (paused, desk.wire.paused) == (True, False)


async def test_a_loss_while_paused_comes_after_what_was_held(desk: Desk) -> None:
    """Nothing that arrived is dropped."""
    desk.feed(HEAD)
    reader = desk.read(pause_at=b"one")
    desk.feed(chunk(b"one") + chunk(b"two"))
    desk.connection.connection_lost(None)
    assert not reader.ended
    desk.response.resume()
    assert reader.pieces == [b"one", b"two"]
    assert isinstance(reader.error, BrokenError)


async def test_a_finished_body_is_drained_in_silence(desk: Desk) -> None:
    """After [DONE] only the end of the body is missing: the connection is used again."""
    desk.feed(HEAD)
    reader = desk.read()
    desk.feed(chunk(b"[DONE]"))
    desk.response.finish()
    assert desk.connection.draining
    desk.feed(chunk(b"more") + b"0\r\n\r\n")
    assert (reader.pieces, reader.ended) == ([b"[DONE]"], False)
    assert (desk.idle, desk.connection.draining) == ([desk.connection], False)


async def test_a_body_that_does_not_end_is_drained_for_a_moment_only(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the connection is closed."""
    monkeypatch.setattr(connection, "DRAIN", 0.0)
    desk.feed(HEAD, chunk(b"[DONE]"))
    desk.response.finish()
    async with asyncio.timeout(5):
        while not desk.wire.aborted:  # noqa: ASYNC110 - a timer of the loop sets it
            await asyncio.sleep(0)
    assert not desk.idle


async def test_closing_closes_the_socket_at_once_and_says_nothing_more(desk: Desk) -> None:
    """A cancelled stream costs the upstream no further token."""
    desk.feed(HEAD)
    reader = desk.read()
    desk.response.close()
    assert desk.wire.aborted
    desk.connection.connection_lost(None)
    assert (reader.pieces, reader.ended) == ([], False)


async def test_who_stops_waiting_for_the_head_closes_the_connection(desk: Desk) -> None:
    """A cancel before the first token."""
    waiting = asyncio.create_task(desk.response.head())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    assert desk.wire.aborted


async def test_a_fault_of_ours_in_the_reader_is_raised_not_hidden(desk: Desk) -> None:
    """It is no broken stream, and must not be retried as one."""

    class Faulty(Reader):
        def data(self, data: bytes) -> None:
            raise KeyError(data)

    desk.feed(HEAD)
    reader = Faulty()
    desk.response.start(reader)
    desk.feed(chunk(b"one"))
    assert isinstance(reader.error, KeyError)
    assert desk.wire.aborted


async def test_the_start_of_a_body_can_be_waited_for(desk: Desk) -> None:
    """An error page: its end, so many bytes, or so much time, whichever is first."""
    desk.feed(HEAD, chunk(b"page"))
    assert await desk.response.read(100, 0.01) == b"page"
    assert await desk.response.read(2, 0.01) == b""
