"""The floor: the same requests read by a bare loop that only counts, without RQ, Redis, retries or any guarantee.

`python -m bench.floor STREAMS` reads a model's name per line from stdin and streams each, at most STREAMS at a time,
the way the product must at least: the openai package's request over aiohttp, the body as bytes. Ends after its stdin.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop
from openai import AsyncOpenAI, DefaultAioHttpClient


async def main(streams: int) -> None:
    # aiohttp's pool is capped at 100 connections unless told a number; None means that cap too.
    import httpx2

    limits = httpx2.Limits(max_connections=streams, max_keepalive_connections=streams)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    slots = asyncio.Semaphore(streams)
    async with (
        AsyncOpenAI(max_retries=0, http_client=DefaultAioHttpClient(limits=limits)) as client,
        asyncio.TaskGroup() as tasks,
    ):

        async def stream(model: str) -> None:
            async with (
                slots,
                client.chat.completions.with_streaming_response.create(
                    model=model, messages=[{"role": "user", "content": "Write a quicksort"}], stream=True
                ) as response,
            ):
                events = 0
                async for data in response.iter_bytes():
                    events += data.count(b"data: ")

        print("ready", flush=True)
        while line := await lines.readline():
            tasks.create_task(stream(line.decode().strip()))


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
