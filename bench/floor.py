"""The floor: the same requests read by a bare loop that only counts, without RQ, Redis, retries or any guarantee.

`python -m bench.floor STREAMS` reads a model's name per line from stdin and streams each, at most STREAMS at a time,
the way the product must at least: the openai package's request over the product's own connections, the body as bytes.
Ends after its stdin.
"""

from __future__ import annotations

import asyncio
import sys

import httpx2
import uvloop
from openai import AsyncOpenAI, AsyncStream

from worker.upstream.transport import RawBodyTransport, body_of


class Counter:
    """Counts the events of one body as it comes."""

    def __init__(self) -> None:
        self.events = 0
        self.ended = asyncio.Event()

    def data(self, data: bytes) -> None:
        self.events += data.count(b"data: ")

    def end(self, error: Exception | None) -> None:  # noqa: ARG002 - the bench sees what is missing
        self.ended.set()


async def main(streams: int) -> None:
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    slots = asyncio.Semaphore(streams)
    over = httpx2.AsyncClient(transport=RawBodyTransport(streams + 16, 30.0), trust_env=False)
    async with AsyncOpenAI(max_retries=0, http_client=over) as client, asyncio.TaskGroup() as tasks:

        async def stream(model: str) -> None:
            body = {"model": model, "messages": [{"role": "user", "content": "Write a quicksort"}], "stream": True}
            async with slots:
                answer = await client.post(
                    "/chat/completions", body=body, cast_to=object, stream=True, stream_cls=AsyncStream[object]
                )
                counter = Counter()
                body_of(answer.response).start(counter)
                await counter.ended.wait()

        print("ready", flush=True)
        while line := await lines.readline():
            tasks.create_task(stream(line.decode().strip()))


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
