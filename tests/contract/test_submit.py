"""submit: a job is accepted with its first delivery, all at once or not at all."""

from __future__ import annotations

import pytest

from millstream import Client, JobExists, SpecError
from millstream.calls import submit
from millstream.delivery import QUEUES_KEY, job_of, queue_key
from millstream.job import build
from tests.contract.conftest import COMPLETED, DONE, STARTED, Hands


def test_a_job_is_stored_opened_and_delivered(client: Client, hands: Hands) -> None:
    """Spec, state, `open`, RQ's hash, queue and set of queues, in one step."""
    before = hands.now_ms()
    job = client.submit("Hi", id="j", model="m", lane="batch", expires=9, retention=20, max_attempts=7)
    assert (job.id, job.created) == ("j", True)
    keys, redis = client.keys, client.redis
    spec = build("Hi", model="m", lane="batch", expires=9, retention=20, max_attempts=7)
    assert redis.get(keys.spec("j")) == spec.encode()
    state = hands.state("j")
    created = int(state.pop("created"))
    assert before <= created <= hands.now_ms()
    assert state == {
        "status": "queued", "lane": "batch", "model": "m", "attempt": "0", "broken": "0", "seq": "0",
        "retention": "20000", "max_attempts": "7", "expires": str(created + 9000),
    }  # fmt: skip
    assert redis.zscore(keys.open, "j") == created + 60_000
    (rq_id,) = redis.lrange(queue_key(keys, "batch"), 0, -1)
    assert job_of(rq_id.decode()) == "j"
    assert redis.smembers(QUEUES_KEY) == {b"rq:queue:millstream-batch"}
    assert redis.hget(f"rq:job:{rq_id.decode()}", "status") == b"queued"


def test_the_settings_fill_in_what_a_spec_leaves_open(client: Client, hands: Hands) -> None:
    """Retention and attempts; without `expires` a job waits for ever."""
    client.submit("Hi", id="j")
    state = hands.state("j")
    assert (state["retention"], state["max_attempts"]) == ("3600000", "3")
    assert "expires" not in state


@pytest.mark.parametrize("model", [None, "other"])
def test_a_job_without_a_model_gets_the_default_one(client: Client, hands: Hands, model: str | None) -> None:
    """Also when a caller passes an option on that was not given."""
    client.submit("Hi", id="j", model=model)
    client.submit_many([{"prompt": "Hi", "id": "k", "model": model}])
    assert hands.state("j")["model"] == hands.state("k")["model"] == (model or client.settings.model)


def test_a_submit_that_is_retried_is_the_same_job(client: Client, hands: Hands) -> None:
    """The reply was lost, the call is sent again as it was: one job, one delivery."""
    call = submit(client.keys, client.settings, "j", build("Hi", model="m"))
    assert client.run(call) is True
    written = hands.everything()
    assert client.run(call) is False
    assert hands.everything() == written


def test_the_same_spec_under_a_known_id_is_the_same_job(client: Client, hands: Hands) -> None:
    """Also when the caller asks again with other words for it, and when the job has ended."""
    client.submit("Hi", id="j", temperature=0.5, top_p=1)
    written = hands.everything()
    again = client.submit(messages=[{"role": "user", "content": "Hi"}], id="j", top_p=1, temperature=0.5)
    assert not again.created
    assert hands.everything() == written
    hands.begin("j")
    hands.append("j", 2, DONE, ending=COMPLETED)
    assert not client.submit("Hi", id="j", temperature=0.5, top_p=1).created
    assert hands.state("j")["status"] == "completed"


def test_another_spec_under_a_known_id_is_an_error(client: Client, hands: Hands) -> None:
    """Nothing is written."""
    client.submit("Hi", id="j")
    written = hands.everything()
    with pytest.raises(JobExists, match="'j'"):
        client.submit("Ho", id="j")
    assert hands.everything() == written


def test_a_bad_job_writes_nothing(client: Client, hands: Hands) -> None:
    """A batch is checked as a whole before its first job is sent."""
    for asked in ({"id": "../x"}, {"temperature": "hot"}, {"base_url": "http://x"}):
        with pytest.raises(SpecError):
            client.submit_many([{"prompt": "Hi"}, {"prompt": "Hi", **asked}])
    assert hands.everything() == {}


def test_many_jobs_are_accepted_in_one_round_trip(client: Client) -> None:
    """In their order, with their own ids or fresh ones; the lane's queue keeps the order."""
    jobs = client.submit_many([{"prompt": f"job {i}", "id": f"j{i}"} for i in range(50)] + [{"prompt": "Hi"}])
    assert [job.id for job in jobs[:-1]] == [f"j{i}" for i in range(50)]
    assert all(job.created for job in jobs)
    queued = [job_of(rq_id.decode()) for rq_id in client.redis.lrange(queue_key(client.keys, "interactive"), 0, -1)]
    assert queued == [job.id for job in jobs]
    assert not any(
        job.created for job in client.submit_many([{"prompt": f"job {i}", "id": f"j{i}"} for i in range(50)])
    )
    assert client.submit_many([]) == []


def test_prefixes_keep_deployments_apart(client: Client, hands: Hands) -> None:
    """Two prefixes on one server share nothing but RQ's set of queues."""
    other = build("Ho", model="m")
    from millstream import Settings

    there = Settings(prefix="elsewhere")
    client.run(submit(there.keys, there, "j", other))
    client.submit("Hi", id="j")
    assert client.redis.get(there.keys.spec("j")) == other.encode()
    assert hands.state("j")["status"] == "queued"
    client.redis.delete(there.keys.spec("j"), there.keys.state("j"), there.keys.open)


def test_started_is_the_first_event(client: Client, hands: Hands) -> None:
    """Being queued is no event: the log of a fresh job is empty."""
    client.submit("Hi", id="j")
    assert client.redis.exists(client.keys.log("j")) == 0
    hands.claim("j")
    assert hands.append("j", 1, STARTED) == ("ok", 1)
