"""The baseline: what an average team writes to stream completions through RQ. Kept as plain as it would be there."""

import json
import os

import redis
from openai import OpenAI


def complete(job_id: str, model: str) -> None:
    """Streams one completion and publishes every chunk. Run by a stock `rq worker`."""
    connection = redis.Redis.from_url(os.environ["REDIS_URL"])
    channel = f"naive:{{{job_id}}}:chunks"
    stream = OpenAI().chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Write a quicksort"}], stream=True
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            connection.publish(channel, json.dumps({"type": "chunk", "content": chunk.choices[0].delta.content}))
    connection.publish(channel, json.dumps({"type": "completed"}))
