"""Turns: costly requests one at a time, the others at once."""

from __future__ import annotations

import asyncio

from tests.unit.writer_desk import leaping
from worker.turns import BREATH, COSTLY, Turns


def test_costly_requests_leave_the_loop_time_in_between() -> None:
    """Ten that ask together are made at ten moments, a breath apart, in the order in which they asked."""
    made: list[tuple[int, float]] = []

    async def ask(turns: Turns, number: int) -> None:
        await turns.mine(COSTLY)
        made.append((number, round(asyncio.get_running_loop().time() / BREATH, 3)))

    async def main() -> None:
        turns = Turns()
        await asyncio.gather(*(ask(turns, number) for number in range(10)))

    leaping(main())
    assert made == [(number, number + 1) for number in range(10)]


def test_a_usual_request_waits_for_nobody() -> None:
    """Below the size that counts, not even for a turn of the loop."""

    async def main() -> None:
        turns = Turns()
        waiting = asyncio.create_task(turns.mine(COSTLY))
        await asyncio.sleep(0)
        await turns.mine(COSTLY - 1)
        assert not waiting.done()
        await waiting

    leaping(main())


def test_who_gives_up_holds_up_nobody() -> None:
    """A job that is cancelled while it waits for its turn, or has it, passes it on."""

    async def main() -> None:
        turns = Turns()
        first, second, third = (asyncio.create_task(turns.mine(COSTLY)) for _ in range(3))
        await asyncio.sleep(0)
        first.cancel()
        second.cancel()
        await third

    leaping(main())
