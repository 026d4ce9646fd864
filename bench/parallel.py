"""What most people run on a file of prompts: one asyncio process, the way of openai-cookbook's parallel processor.

`python -m bench.parallel IN OUT AT_ONCE`: a task per row through the openai package, with capacities for requests and
tokens a minute that refill continuously, a queue of rows to retry, and a result appended to OUT as it comes. Written
anew from the description of `api_request_parallel_processor.py`; that one speaks to aiohttp itself and looks for its
next row 1,000 times a second at most. Here rows are taken as fast as there is room, which can only help it.

It streams nothing, keeps no place to go on from, and loses what is in flight when it dies.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx2
import openai
import uvloop

REQUESTS_PER_MINUTE = TOKENS_PER_MINUTE = 1e9
ATTEMPTS = 5


@dataclass
class Processor:
    client: openai.AsyncOpenAI
    out: TextIO
    requests: float = REQUESTS_PER_MINUTE
    tokens: float = TOKENS_PER_MINUTE
    filled_at: float = field(default_factory=time.monotonic)
    again: deque[tuple[dict[str, Any], int]] = field(default_factory=deque)
    failed: int = 0

    def take(self, row: dict[str, Any]) -> bool:
        """Whether there is capacity for one more now; if so, it is taken."""
        now = time.monotonic()
        passed, self.filled_at = now - self.filled_at, now
        self.requests = min(REQUESTS_PER_MINUTE, self.requests + REQUESTS_PER_MINUTE * passed / 60)
        self.tokens = min(TOKENS_PER_MINUTE, self.tokens + TOKENS_PER_MINUTE * passed / 60)
        wanted = row["body"].get("max_tokens", 15) + len(json.dumps(row["body"]["messages"])) / 4
        if self.requests < 1 or self.tokens < wanted:
            return False
        self.requests, self.tokens = self.requests - 1, self.tokens - wanted
        return True

    async def ask(self, row: dict[str, Any], attempts: int) -> None:
        try:
            answer = await self.client.chat.completions.create(**row["body"])
        except openai.APIError as error:
            if attempts > 1:
                self.again.append((row, attempts - 1))
            else:
                self.failed += 1
                self.out.write(json.dumps([row, str(error)]) + "\n")
            return
        self.out.write(json.dumps([row, answer.model_dump(), row["custom_id"]]) + "\n")
        self.out.flush()


async def main(source: Path, out: Path, at_once: int) -> int:
    limits = httpx2.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    slots = asyncio.Semaphore(at_once)
    with source.open() as rows, out.open("a") as results:
        transport = openai.DefaultAioHttpClient(limits=limits)
        async with openai.AsyncOpenAI(max_retries=0, http_client=transport) as client, asyncio.TaskGroup() as tasks:
            processor = Processor(client, results)

            async def run(row: dict[str, Any], attempts: int) -> None:
                try:
                    await processor.ask(row, attempts)
                finally:
                    slots.release()

            while True:
                await slots.acquire()
                row, attempts = processor.again.popleft() if processor.again else (next_row(rows), ATTEMPTS)
                if row is None:
                    slots.release()
                    break
                while not processor.take(row):  # noqa: ASYNC110 - as it is done there
                    await asyncio.sleep(0.001)
                tasks.create_task(run(row, attempts))
    return processor.failed


def next_row(rows: TextIO) -> Any:
    line = rows.readline()
    return json.loads(line) if line else None


if __name__ == "__main__":
    sys.exit(1 if uvloop.run(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))) else 0)
