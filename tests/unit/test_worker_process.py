"""Decisions of a worker process that need no loop of services."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from millstream import Settings
from millstream.errors import JobNotFound, RedisUnavailable
from worker.process import Process


async def test_a_fault_of_the_intake_hands_the_jobs_over() -> None:
    """As that of any other service: told, and followed by an end in order, not by one that drops what runs."""

    class Intake:
        async def run(self, *, burst: bool) -> None:
            raise ValueError("a bug")

        def stop(self) -> None: ...

    process = Process.__new__(Process)
    process._settings, process._intake, process._running = Settings(), cast("Any", Intake()), {}
    process._stopping, process._hurry, process._broken = asyncio.Event(), asyncio.Event(), False
    await process._work(burst=True)
    assert process._broken
    assert process._hurry.is_set()


class Relayed:
    """A relay that counts how often it is told to look."""

    job_id = "j"
    looks = 0

    def look(self) -> None:
        self.looks += 1


@pytest.mark.parametrize(("error", "looks"), [(JobNotFound("j"), 1), (RedisUnavailable("away"), 0)])
async def test_a_stop_that_finds_no_job_is_no_fault_of_the_worker(error: Exception, looks: int) -> None:
    """A failover may have lost the job, as its relay learns by itself. A service that raises would end the process."""

    class Client:
        async def run(self, call: Any) -> Any:
            raise error

    process, relay = Process.__new__(Process), Relayed()
    process._settings, process._client = Settings(), cast("Any", Client())
    await process._cancel(cast("Any", relay))
    assert relay.looks == looks
