"""What upstreams ask for and are told by their settings: waits, models, keys, dialects."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from millstream.events import Retrying, Started
from tests.live.short_answers import GOOD, SHORT_CLOCKS, WHOLE, N
from tests.upstream import Chunk as Part
from tests.upstream import (
    Comment,
    Done,
    Request,
    Script,
    ScriptedUpstream,
    Text,
    answer,
    azure,
    expected_text,
    rate_limited,
)
from tests.worker_process import wait_until
from tests.world import KEY, World

ENVIRON: Final = SHORT_CLOCKS


def until_a_date(_: Request) -> Script:
    """A date has whole seconds: this one is between two and three away."""
    return rate_limited({"retry-after": email.utils.formatdate(time.time() + 3, usegmt=True)})


FORMS: Final[list[tuple[Any, float, float]]] = [
    (rate_limited({"retry-after-ms": "300"}), 0.3, 0.3),
    (rate_limited({"retry-after": "1.1"}), 1.1, 1.1),
    (rate_limited({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "120ms"}), 0.12, 0.12),
    (rate_limited({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1s"}), 1.0, 1.0),
    (rate_limited({"x-ratelimit-remaining-tokens": "9", "x-ratelimit-reset-tokens": "6m0s"}), 0.25, 0.5),  # not it
    (rate_limited(), 0.25, 0.5),
    (until_a_date, 1.9, 3.0),
]


def test_every_form_of_a_wait_is_kept(shared: World, say: Callable[[str], None]) -> None:
    """No request comes sooner than the upstream asked for; exactly one comes then. Without a word: a backoff."""
    jobs = []
    for number, (script, _, _) in enumerate(FORMS):
        shared.upstream.on(script, GOOD, prompt=f"form {number}")
        jobs.append(shared.submit(f"form {number}", model=f"limited-{number}"))
    for number, (job_id, (_, least, most)) in enumerate(zip(jobs, FORMS, strict=True)):
        assert shared.outcome(job_id).text == WHOLE
        first, second = shared.upstream.requests_for(f"form {number}")
        assert least <= second.request.arrived_at - first.request.arrived_at, number
        [waited] = shared.workers[0].said("upstream.retry", job=job_id)
        assert least - 0.001 <= waited["delay"] <= most + 0.001, number  # as the log rounds it
        told = [each.delay for each in shared.check(job_id) if isinstance(each, Retrying)]
        assert len(told) == (least > 1)
        assert all(least <= delay <= most for delay in told)
    say(f"{len(FORMS)} forms of a wait, each kept by exactly one further request")


def test_minutes_are_waited_in_the_queue(shared: World) -> None:
    """`6m0s`: one request, the job says until when it waits, and can be cancelled meanwhile."""
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}
    shared.upstream.on(rate_limited(headers), GOOD, prompt="minutes")
    job_id = shared.submit("minutes", model="limited-by-minutes")
    wait = wait_until(lambda: shared.client.status(job_id).wait, "it waits in the queue")
    assert 350 < wait["until"] - time.time() < 370
    assert shared.client.cancel(job_id) == "cancelled"
    assert len(shared.upstream.requests_for("minutes")) == 1
    shared.check(job_id)


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
    assert asked["another model"] < asked["the same model"]


def test_a_long_wait_is_spent_in_the_queue(shared: World) -> None:
    """The job says what it waits for and until when, holds no slot, can be cancelled, and comes back at its time."""
    scripts = (rate_limited({"retry-after": "6"}), GOOD)
    for prompt in ("back later", "cancelled meanwhile"):
        shared.upstream.on(*scripts, prompt=prompt)
    job_id = shared.submit("back later", model="slow")
    wait = wait_until(lambda: shared.client.status(job_id).wait, "it waits in the queue")
    assert (wait["what"], wait["upstream"]) == ("upstream", "127.0.0.1")
    assert wait["until"] - time.time() < 6.5
    other = shared.submit("cancelled meanwhile", model="slow")
    wait_until(lambda: shared.client.status(other).wait, "the other waits, too")
    assert shared.client.cancel(other) == "cancelled"
    assert shared.status(job_id) == "queued"
    assert shared.outcome(job_id).text == WHOLE
    first, second = shared.upstream.requests_for("back later")
    assert 6 <= second.request.arrived_at - first.request.arrived_at < 12
    log = shared.check(job_id)
    starts = [(each.attempt, each.reason) for each in log if isinstance(each, Started)]
    assert [reason for _, reason in starts] == [None, "released"]
    assert shared.client.status(job_id).broken == 0
    assert shared.check(other)[-1].type == "cancelled"


def test_a_job_goes_to_the_first_upstream_that_serves_its_model(named: Callable[..., World]) -> None:
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
        world = named(file, SOME_KEY=KEY, OPENAI_ORG_ID="org-secret")
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


def test_every_dialect_is_understood_with_its_settings(named: Callable[..., World], say: Callable[[str], None]) -> None:
    """The same text from each, completed; its usage measured, or estimated and marked so."""
    with ScriptedUpstream() as upstream:
        tables = [
            f'[upstreams."{name}"]\nbase_url = "{upstream.base_url}"\nmodels = ["{name}"]\n{fields}\n'
            for name, (fields, _, _) in DIALECTS.items()
        ]
        world = named(*tables, SOME_KEY=KEY)
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


OLLAMA: Final = Script(*[Part(text, finish_reason="") for text in (WHOLE[:5], WHOLE[5:])], Done())
EXAMPLES: Final[dict[str, list[tuple[str, str, str, dict[str, str], Script]]]] = {
    # its file: the model a job names, what it is called there, path, headers; spoken in the server's dialect
    "openai": [("gpt-4o-mini", "gpt-4o-mini", "/v1/chat/completions", {"authorization": f"Bearer {KEY}"},
                answer(Text(N, seed=1), usage=True))],
    "azure": [
        ("gpt-4o-mini", "my-deployment", "/openai/v1/chat/completions", {"api-key": KEY}, azure(Text(N, seed=1))),
        ("gpt-4o", "gpt-4o", "/openai/deployments/my-gpt-4o/chat/completions?api-version=2024-10-21", {"api-key": KEY},
         azure(Text(N, seed=1))),
    ],
    "openrouter": [("gpt-4o-mini", "openai/gpt-4o-mini", "/api/v1/chat/completions",
                    {"authorization": f"Bearer {KEY}", "x-title": "Millstream", "http-referer": "https://example.com"},
                    answer(*[Comment(" OPENROUTER PROCESSING")] * 3, Text(N, seed=1), usage=True))],
    "vllm": [("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", "/v1/chat/completions", {},
              answer(Part(reasoning="Hm.", reasoning_field="reasoning"), Text(N, seed=1), usage=True))],
    "ollama": [("llama3.2", "llama3.2", "/v1/chat/completions", {}, OLLAMA)],
    "llama-cpp": [("smollm2", "smollm2", "/v1/chat/completions", {},
                   answer(*[Comment("")] * 2, Text(N, seed=1), usage=True))],
}  # fmt: skip
FOLDER: Final = Path(__file__).parents[2] / "docs" / "upstreams"


def test_every_example_of_the_docs_works_as_it_stands(named: Callable[..., World], say: Callable[[str], None]) -> None:
    """Only the host is another: the address, headers, key and model are those that the server wants."""
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(EXAMPLES)
    jobs = 0
    for name, cases in EXAMPLES.items():
        with ScriptedUpstream() as upstream:
            place = upstream.base_url.removesuffix("/v1")
            file = re.sub(
                r'(?m)^base_url = "https?://[^/"]+', f'base_url = "{place}', (FOLDER / f"{name}.toml").read_text()
            )
            variables = dict.fromkeys(re.findall(r'api_key_env = "(\w+)"', file), KEY)
            world = named(file, **variables)
            for model, there, path, headers, script in cases:
                upstream.on(script)
                job_id = world.submit(f"{name} {model}", model=model)
                result = world.outcome(job_id)
                assert (result.status, result.text) == ("completed", WHOLE), name
                [exchange] = upstream.requests_for(f"{name} {model}")
                assert (exchange.request.path, exchange.request.model) == (path, there)
                kept = {"authorization", "api-key", "x-title", "http-referer"} & set(exchange.request.headers)
                assert {each: exchange.request.headers[each] for each in kept} == headers
                world.check(job_id)
                jobs += 1
            world.close()
    say(f"{jobs} upstreams of the docs' {len(EXAMPLES)} example files, each asked as it wants to be")
