"""The real model once, through everything: submit, queue, worker, llama.cpp, log, channel, consumers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from local import model
from local.errors import LocalError
from local.parts import Model
from millstream.events import Chunk
from tests.contract.consumers import Consumer
from tests.world import World


@pytest.fixture
def real(tmp_path: Path) -> Iterator[str]:
    """The base URL of a real model on this machine. Without one: skip at home, fail in CI."""
    try:
        model.find_model()
    except LocalError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    part = Model(tmp_path / "model.log")
    part.start()
    yield part.url
    part.stop()


def test_a_real_model_streams_through_everything(make_world: Callable[..., World], valkey_url: str, real: str) -> None:
    """Three jobs at once: each arrives token by token, whole, the same for every consumer, with the usage measured."""
    world = make_world(valkey_url, OPENAI_BASE_URL=real, MILLSTREAM_MODEL=model.NAME)
    worker = world.worker()
    prompts = ["Name three colours.", "What is a mill?", "Count to five."]
    jobs = [world.submit(prompt, max_tokens=24, temperature=0, seed=1) for prompt in prompts]
    consumers = [Consumer(world.make_client, [job_id]) for job_id in jobs for _ in range(2)]
    seen = [(job_id, events) for consumer in consumers for job_id, events in consumer.join().items()]
    for job_id, events in seen:
        world.check(job_id, [events])
    for job_id in jobs:
        result = world.outcome(job_id)
        assert result.status in ("completed", "incomplete")
        assert result.text.strip()
        assert result.usage is not None
        assert 0 < result.usage["completion_tokens"] <= 24
        assert "estimated" not in result.usage
        chunks = [event for event in world.client.follow(job_id) if isinstance(event, Chunk)]
        assert len(chunks) > 3
        assert "".join(chunk.content for chunk in chunks) == result.text
    worker.terminate()
    assert worker.wait() == 0
    world.check_left()
