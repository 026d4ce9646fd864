"""What upstreams ask for and are told by their settings: waits, models, keys, dialects."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from millstream.events import Retrying, Started
from tests.live.conftest import KEY, World
from tests.upstream import Chunk as Part
from tests.upstream import (
    Comment,
    Done,
    Script,
    ScriptedUpstream,
    Text,
    answer,
    azure,
    expected_text,
    rate_limited,
)
from tests.valkey import Valkey

N: Final = 12
WHOLE: Final = expected_text(N, 1)
GOOD: Final = answer(Text(N, seed=1))
ENVIRON: Final = {
    "MILLSTREAM_IDLE_TIMEOUT": "0.6", "MILLSTREAM_FIRST_TOKEN_TIMEOUT": "1.2", "MILLSTREAM_RETRIES": "2",
}  # fmt: skip


def test_every_form_of_a_wait_is_kept(shared: World) -> None:
    """No request comes sooner than the upstream asked for; exactly one comes then."""
    forms: list[tuple[dict[str, str], float]] = [
        ({"retry-after-ms": "300"}, 0.3),
        ({"retry-after": "1.1"}, 1.1),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "350ms"}, 0.35),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "0m1s"}, 1.0),
    ]
    for number, (headers, least) in enumerate(forms):
        prompt, model = f"form {number}", f"limited-{number}"
        shared.upstream.on(rate_limited(headers), GOOD, prompt=prompt)
        job_id = shared.submit(prompt, model=model)
        assert shared.outcome(job_id).text == WHOLE
        first, second = shared.upstream.requests_for(prompt)
        assert first.ended_at is not None
        assert least <= second.request.arrived_at - first.ended_at < least + 2
        told = [each.delay for each in shared.check(job_id) if isinstance(each, Retrying)]
        assert told == ([pytest.approx(least)] if least > 1 else [])


def test_a_wait_holds_all_jobs_of_the_worker_for_that_model(shared: World) -> None:
    """While one job waits as it was told, another one for the same model is not asked, and one for another model is."""
    shared.upstream.on(rate_limited({"retry-after": "2"}), GOOD, prompt="told to wait")
    shared.upstream.on(GOOD, prompt="the same model")
    shared.upstream.on(GOOD, prompt="another model")
    jobs = [shared.submit("told to wait", model="cool")]
    shared.upstream.journal.wait_for(lambda j: j.requests_for("told to wait")[0].outcome == "finished")
    jobs += [shared.submit("the same model", model="cool"), shared.submit("another model", model="warm")]
    for job_id in jobs:
        assert shared.outcome(job_id).text == WHOLE
    asked = {each.request.prompt: each.request.arrived_at for each in shared.upstream.journal}
    began = shared.upstream.requests_for("told to wait")[0].request.arrived_at
    assert asked["the same model"] - began >= 2
    assert asked["another model"] - began < 1.5


def test_a_long_wait_is_spent_in_the_queue(shared: World) -> None:
    """The job says what it waits for and until when, holds no slot, can be cancelled, and comes back at its time."""
    scripts = (rate_limited({"retry-after": "6"}), GOOD)
    for prompt in ("back later", "cancelled meanwhile"):
        shared.upstream.on(*scripts, prompt=prompt)
    job_id = shared.submit("back later", model="slow")
    shared.wait_for_status(job_id, "in_progress")
    shared.wait_for_status(job_id, "queued")
    wait = shared.client.status(job_id).wait
    assert wait is not None
    assert (wait["what"], wait["upstream"]) == ("upstream", "127.0.0.1")
    assert wait["until"] - time.time() < 6.5
    other = shared.submit("cancelled meanwhile", model="slow")
    shared.wait_for_status(other, "queued")
    began = time.monotonic()
    assert shared.client.cancel(other) == "cancelled"
    assert time.monotonic() - began < 1
    assert shared.outcome(job_id).text == WHOLE
    first, second = shared.upstream.requests_for("back later")
    assert 6 <= second.request.arrived_at - first.request.arrived_at < 12
    log = shared.check(job_id)
    starts = [(each.attempt, each.reason) for each in log if isinstance(each, Started)]
    assert [reason for _, reason in starts] == [None, "released"]
    assert shared.client.status(job_id).broken == 0
    assert shared.check(other)[-1].type == "cancelled"


class Several:
    """Upstreams of their own, named in a file."""

    def __init__(self, make_world: Callable[..., World], url: str, folder: Path, file: str, **environ: str) -> None:
        path = folder / "upstreams.toml"
        path.write_text(file)
        self.world = make_world(url, MILLSTREAM_UPSTREAMS=str(path), SOME_KEY=KEY, **environ)
        self.world.redis.flushdb()
        self.worker = self.world.worker()


@pytest.fixture
def several(make_world: Callable[..., World], valkey: Valkey, tmp_path: Path) -> Callable[..., Several]:
    def make(file: str, **environ: str) -> Several:
        return Several(make_world, valkey.url.removesuffix("0") + "2", tmp_path, file, **environ)

    return make


def test_a_job_goes_to_the_first_upstream_that_serves_its_model(several: Callable[..., Several]) -> None:
    """In the file's order, with the key, headers, query, alias and options of that upstream and of no other."""
    with ScriptedUpstream() as azures, ScriptedUpstream() as others:
        file = f"""
        [upstreams.azure]
        base_url = "{azures.base_url}"
        api_key_env = "SOME_KEY"
        auth = "api-key"
        models = ["gpt-*"]
        aliases = {{ fast = "deployment-7" }}
        query = {{ api-version = "2024-10-21" }}
        [upstreams.other]
        base_url = "{others.base_url}"
        headers = {{ X-Title = "mill" }}
        stream_options = false
        models = ["local-*"]
        """
        world = several(file, OPENAI_ORG_ID="org-secret").world
        for model in ("gpt-4o", "fast", "local-1"):
            assert world.outcome(world.submit(f"for {model}", model=model)).status == "completed"
        for exchange, model in zip(azures.journal, ("gpt-4o", "deployment-7"), strict=True):
            request = exchange.request
            assert (request.model, request.path) == (model, "/v1/chat/completions?api-version=2024-10-21")
            assert request.headers["api-key"] == KEY
            assert not {"authorization", "openai-organization", "x-title"} & set(request.headers)
            assert request.include_usage
        [exchange] = others.journal
        assert exchange.request.headers["x-title"] == "mill"
        assert not {"authorization", "api-key", "openai-organization"} & set(exchange.request.headers)
        assert "stream_options" not in exchange.request.json
        job_id = world.submit("for nobody", model="claude")
        result = world.outcome(job_id)
        assert result.error is not None
        assert result.error["code"] == "model_not_served"
        job_id = world.submit("named by its alias", model="fast")
        world.outcome(job_id)
        [started] = [each for each in world.check(job_id) if isinstance(each, Started)]
        assert (started.upstream, started.model) == ("azure", "fast")


DIALECTS: Final[dict[str, tuple[str, Script, str]]] = {
    "openai": ("", answer(Text(N, seed=1), usage=True), "measured"),
    "azure": ('auth = "api-key"\napi_key_env = "SOME_KEY"', azure(Text(N, seed=1)), "estimated"),
    "openrouter": ("", answer(Comment(" OPENROUTER PROCESSING"), Text(4, seed=1), Comment(" OPENROUTER PROCESSING"),
                              Part(WHOLE.removeprefix(expected_text(4, 1))), usage=True), "measured"),
    "vllm": ('continue_with = "vllm"', answer(Part(reasoning="Hm.", reasoning_field="reasoning"), Text(N, seed=1),
                                              usage=True), "measured"),
    "deepseek": ("", answer(*[Comment("keep-alive")] * 5, Part(reasoning="Hm."), Text(N, seed=1), usage=True),
                 "measured"),
    "ollama-without-reasons": ('ends_with = "done"', Script(
        *[Part(text, finish_reason="") for text in (WHOLE[:5], WHOLE[5:])], Done()), "estimated"),
    "ollama": ('ends_with = "done"', answer(Text(N, seed=1), usage=True), "measured"),
    "own-finish-reason": ('finish_reasons = ["eos"]', answer(Text(N, seed=1), finish="eos"), "estimated"),
    "no-usage": ("stream_options = false", answer(Text(N, seed=1)), "estimated"),
}  # fmt: skip


def test_every_dialect_is_understood_with_its_settings(
    several: Callable[..., Several], say: Callable[[str], None]
) -> None:
    """The same text from each, completed; its usage measured, or estimated and marked so."""
    with ScriptedUpstream() as upstream:
        tables = [
            f'[upstreams."{name}"]\nbase_url = "{upstream.base_url}"\nmodels = ["{name}"]\n{fields}\n'
            for name, (fields, _, _) in DIALECTS.items()
        ]
        world = several("".join(tables)).world
        for name, (_, script, usage) in DIALECTS.items():
            upstream.on(script, model=name)
            job_id = world.submit(name, model=name)
            result = world.outcome(job_id)
            assert (result.status, result.error, result.text) == ("completed", None, WHOLE), name
            assert result.usage is not None
            assert ("estimated" in result.usage) == (usage == "estimated"), name
            assert 0 < result.usage["completion_tokens"] <= N + 1
            world.check(job_id)
            assert len(upstream.requests_for(name)) == 1
    say(f"{len(DIALECTS)} dialects, each with its settings")
