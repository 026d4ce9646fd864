"""One measurement's surroundings, started fresh and ended completely."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from local.valkey import Valkey as Server

from . import proc
from .processes import Processes
from .servers import Stub, Subscriber, Valkey


@dataclass(frozen=True)
class World:
    """`core` is the one for the process under test; everything else runs on the other."""

    processes: Processes
    valkey: Valkey
    stub: Stub
    core: int
    helper_core: int

    def settle(self, pids: Iterable[int]) -> None:
        """Confines the processes under test to their core, and the bench itself to the other.

        Only now: starting 25 RQ workers takes 20 s on one core, 10 on two, and is not measured.
        """
        proc.pin(pids, self.core)
        os.sched_setaffinity(0, {self.helper_core})

    def subscribe(self, pattern: str) -> Subscriber:
        return Subscriber(self.processes, self.helper_core, self.valkey, pattern)


@contextmanager
def world(*, tls: bool = False) -> Iterator[World]:
    """Fresh servers in a temporary folder; whatever was started in it is ended with it."""
    helper_core, core = proc.cores()
    before = os.sched_getaffinity(0)
    # Valkey is there before the others and outlasts them: a worker should not see its Redis vanish.
    with (
        tempfile.TemporaryDirectory(prefix="millstream-bench-") as folder,
        Server.start(Path(folder) / "valkey", options=Valkey.OPTIONS) as server,
        Processes(Path(folder)) as processes,
    ):
        try:
            valkey, stub = Valkey(server, helper_core), Stub(processes, helper_core, tls=tls)
            with closing(stub), closing(valkey.client):
                yield World(processes, valkey, stub, core, helper_core)
        finally:
            os.sched_setaffinity(0, before)
