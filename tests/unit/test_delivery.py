"""The RQ job that brings a Millstream job to a worker."""

from __future__ import annotations

import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.delivery import deliver, job_of, queue_key
from millstream.job import FUNCTION
from millstream.keys import LANES, Keys

KEYS = Keys("p")
IDS = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)


@given(IDS)
def test_the_job_is_found_in_the_name_of_its_delivery(job_id: str) -> None:
    """Whatever the id holds, dashes at its ends included."""
    assert job_of(deliver(KEYS, job_id, "interactive").rq_id) == job_id


@pytest.mark.parametrize(
    "rq_id", ["", "-", "short", "job-1234567", "job_12345678", "-12345678", "a b-12345678", "é-12345678"]
)
def test_a_foreign_name_is_nobodys(rq_id: str) -> None:
    """RQ jobs that others put into our queue are told from deliveries."""
    assert job_of(rq_id) is None


def test_every_delivery_has_a_name_of_its_own() -> None:
    """A reused RQ id loses the job when RQ expires the hash of an earlier delivery."""
    names = {deliver(KEYS, "job", "interactive").rq_id for _ in range(1000)}
    assert len(names) == 1000


@pytest.mark.parametrize("lane", LANES)
def test_a_delivery_holds_the_id_and_no_prompt(lane: str) -> None:
    """RQ stores and logs a job's arguments: they are the id alone, and the function is the one name we accept."""
    delivery = deliver(KEYS, "job", lane)
    fields = delivery.fields
    assert json.loads(zlib.decompress(fields["data"])) == [FUNCTION, None, ["job"], {}]
    assert fields["description"] == "millstream job job"
    assert (delivery.queue_key, fields["origin"]) == (queue_key(KEYS, lane), f"p-{lane}")
    assert not [name for name, value in fields.items() if value and ("callback" in name or "webhook" in name)]


def test_fields_are_handed_over_in_pairs() -> None:
    """field, value, field, value: what HSET takes."""
    delivery = deliver(KEYS, "job", "batch")
    flat = delivery.flat_fields
    assert dict(zip(flat[::2], flat[1::2], strict=True)) == delivery.fields
