"""How fast the stub is, without anything to test: one process that reads its streams and throws the bytes away.

`python -m bench.drain [CONNECTIONS] [RATE]`, 2,000 and 50 unless told, prints what the stub served, and its CPU for it.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time

from . import proc
from .processes import wait_until
from .world import world

_REQUEST = "POST /v1/chat/completions HTTP/1.1\r\nHost: stub\r\nContent-Length: {}\r\n\r\n{}"


def main(connections: int = 2000, rate: int = 50, seconds: float = 5.0) -> None:
    with world() as here:
        poll = select.epoll()
        open_ones: dict[int, socket.socket] = {}
        body = json.dumps({"model": f"stub:rate={rate},chunks=1000000"})
        for _ in range(connections):
            sock = socket.create_connection(("127.0.0.1", here.stub.port))
            sock.sendall(_REQUEST.format(len(body), body).encode())
            open_ones[sock.fileno()] = sock
            poll.register(sock, select.EPOLLIN)
        wait_until("every stream to run", lambda: here.stub.stats()["running"] == connections, seconds=30)
        here.settle([])
        proc.pin([os.getpid()], here.core)
        into = bytearray(262144)

        def drain(until: float) -> None:
            while time.monotonic() < until:
                for fd, _ in poll.poll(0.1):
                    open_ones[fd].recv_into(into)

        drain(time.monotonic() + 1)
        before, at, mine = here.stub.stats(), time.monotonic(), time.process_time()
        drain(at + seconds)
        after, passed, mine = here.stub.stats(), time.monotonic() - at, time.process_time() - mine
        sent, cpu = after["sent"] - before["sent"], after["cpu_us"] - before["cpu_us"]
        share, late = cpu / passed / 1e4, after["late_max_us"] / 1000
        print(
            f"stub: {sent / passed:,.0f} chunks/s of {connections * rate:,} asked for, at {share:.0f} % of a core"
            f" ({cpu / max(sent, 1):.2f} us a chunk, {sent / max(cpu, 1) * 1e6:,.0f} chunks/s per core);"
            f" at most {late:.1f} ms late; the reader took {mine / passed * 100:.0f} % of the other core"
        )
        for sock in open_ones.values():
            sock.close()


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:3]))
