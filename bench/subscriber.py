"""A live consumer that costs little: reads every chunk's age off the text, and checks each job's seqs.

`python -m bench.subscriber HOST PORT PATTERN` subscribes, prints "ready", then answers each line on its stdin with one
line of JSON: `look` tells the counts, `take` tells them and begins anew. It ends when its stdin does. It speaks RESP
over a plain socket with hiredis' reader, because redis-py's own pub/sub costs five times as much per message.
"""

from __future__ import annotations

import select
import socket
import sys
import time

import hiredis
import msgspec

from . import stamps
from .histogram import Histogram

TERMINAL = frozenset({"completed", "incomplete", "failed", "cancelled"})


class Delta(msgspec.Struct):
    content: str | None = None


class Event(msgspec.Struct):
    """The fields that count here, of Millstream's events and of the baseline's own (which has `content` at the top)."""

    type: str
    seq: int = 0
    delta: Delta | None = None
    content: str = ""


class Tally:
    """Pure: what one consumer knows after some messages."""

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(Event).decode
        self._last: dict[bytes, int] = {}
        self.ended = self.completed = self.gaps = self.duplicates = self.odd = 0
        self.begin()

    def begin(self) -> None:
        """Forgets the counts and latencies, not the seqs."""
        self.chunks = self.events = 0
        self.latencies = Histogram()

    def message(self, channel: bytes, data: bytes, at: int) -> Event:
        """Counts one message of a job's channel, which came in at `at` (stamps.now)."""
        event = self._decode(data)
        self.events += 1
        last = self._last.get(channel, 0)
        if event.seq:
            if event.seq <= last:
                self.duplicates += 1
                return event
            self.gaps += event.seq != last + 1
        self._last[channel] = event.seq
        if event.type == "chunk":
            text = event.delta.content or "" if event.delta else event.content
            try:
                ages = stamps.ages(text, at)
            except ValueError:
                self.odd += 1
            else:
                self.chunks += len(ages)
                self.latencies.add_all(ages)
        elif event.type in TERMINAL:
            self.ended += 1
            self.completed += event.type == "completed"
        return event

    def report(self) -> dict[str, int]:
        unit = stamps.UNIT_US
        return {
            "chunks": self.chunks,
            "events": self.events,
            "p50_us": self.latencies.quantile(0.5) * unit,
            "p99_us": self.latencies.quantile(0.99) * unit,
            "max_us": self.latencies.largest * unit,
            "jobs": len(self._last),
            "ended": self.ended,
            "completed": self.completed,
            "gaps": self.gaps,
            "duplicates": self.duplicates,
            "odd": self.odd,
            "cpu_us": time.process_time_ns() // 1000,
        }


class Subscription:
    """PSUBSCRIBE over a plain socket; returns from the constructor once the server has acknowledged it."""

    def __init__(self, host: str, port: int, pattern: str) -> None:
        self.socket = socket.create_connection((host, port), timeout=30)
        self._reader = hiredis.Reader()
        self.socket.sendall(b"*2\r\n$10\r\nPSUBSCRIBE\r\n$%d\r\n%s\r\n" % (len(pattern), pattern.encode()))
        self._waiting: list[tuple[bytes, bytes]] = []
        while self._receive() == 0:
            pass

    def _receive(self) -> int:
        """Reads once; returns how many replies came, of which the messages are kept in `_waiting`."""
        data = self.socket.recv(262144)
        if not data:
            raise ConnectionError("the server closed the subscription: its output buffer limit, or its end")
        self._reader.feed(data)
        replies = 0
        while (reply := self._reader.gets()) is not False:
            replies += 1
            if isinstance(reply, Exception):
                raise reply
            if reply[0] == b"pmessage":
                self._waiting.append((reply[2], reply[3]))
        return replies

    def messages(self) -> list[tuple[bytes, bytes]]:
        """Channel and data of what arrives next; may be empty. Raises TimeoutError by the socket's own timeout."""
        if not self._waiting:
            self._receive()
        messages, self._waiting = self._waiting, []
        return messages

    def close(self) -> None:
        self.socket.close()


def main(host: str, port: str, pattern: str) -> None:
    tally, subscription = Tally(), Subscription(host, int(port), pattern)
    print("ready", flush=True)
    poll = select.poll()
    poll.register(subscription.socket, select.POLLIN)
    poll.register(sys.stdin, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == subscription.socket.fileno():
                messages = subscription.messages()
                at = stamps.now()  # once per read: all of it is here now
                for channel, data in messages:
                    tally.message(channel, data, at)
                continue
            word = sys.stdin.readline().strip()
            if not word:
                return
            print(msgspec.json.encode(tally.report()).decode(), flush=True)
            if word == "take":
                tally.begin()


if __name__ == "__main__":
    main(*sys.argv[1:])
