"""Addresses that answer nothing: one refuses, one swallows the handshake, one takes the connection and is silent.

For a failing TLS handshake point an `https://` URL at any `ScriptedUpstream`.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_LOCAL = ("127.0.0.1", 0)


def _base_url(sock: socket.socket) -> str:
    return f"http://127.0.0.1:{sock.getsockname()[1]}/v1"


@contextmanager
def refused() -> Iterator[str]:
    """The base URL of a port that is taken but not listened on: connecting is refused at once, by nobody else."""
    with socket.socket() as sock:
        sock.bind(_LOCAL)
        yield _base_url(sock)


@contextmanager
def never_accepted() -> Iterator[str]:
    """The base URL of a listener nobody accepts from: the kernel connects, requests go in, nothing comes out."""
    with socket.create_server(_LOCAL, backlog=1024) as sock:
        yield _base_url(sock)


@contextmanager
def black_hole() -> Iterator[str]:
    """The base URL of a listener whose backlog is full: on Linux a further SYN is dropped, connecting just hangs."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(_LOCAL, backlog=0))
        while True:
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)  # on the loopback a handshake that succeeds has done so when connect returns
            if filler.connect_ex(listener.getsockname()) == errno.EINPROGRESS:
                try:
                    filler.getpeername()
                except OSError:
                    break  # still no peer: its SYN was dropped, the backlog is full
        yield _base_url(listener)
