"""A task that is to end has ended."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from worker.ending import end


async def test_a_task_that_loses_a_cancellation_is_cancelled_again() -> None:
    """As one inside `asyncio.wait_for` may on Python 3.11; and one that has ended is left alone."""

    async def deaf() -> None:
        for _ in range(3):
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        await asyncio.Event().wait()

    async def done() -> int:
        return 7

    tasks = [asyncio.create_task(deaf()), asyncio.create_task(done())]
    await asyncio.sleep(0)
    await end(tasks)
    assert tasks[0].cancelled()
    assert tasks[1].result() == 7
