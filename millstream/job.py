"""The job spec: what a producer asks for. Built and checked here, on both sides of the queue.

A spec is JSON in a canonical form (sorted keys), so that "the same spec" is a comparison of bytes.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn

import msgspec
from msgspec import Struct

from . import parameters
from .errors import SpecError
from .keys import LANES

FUNCTION: Final = "millstream.job.complete"
"""The one function a worker accepts from RQ."""

ID_PATTERN: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_SPEC_BYTES: Final = 4 * 1024 * 1024
"""Largest spec. One value in Redis; also what a worker may have to hold per stream while it asks the upstream."""
MAX_MESSAGES: Final = 10_000
MAX_METADATA: Final = 16
"""As in the OpenAI API: 16 pairs, names of 64 and values of 512 characters."""
ON_BREAK: Final = ("restart", "continue", "fail")
ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")

_encoder = msgspec.json.Encoder(order="deterministic")


class Spec(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the producer asked for. Times are seconds.

    None means the setting: of the worker for `timeout`, of whoever submits for `max_attempts` and `retention`.
    """

    model: str
    messages: list[dict[str, Any]]
    params: dict[str, Any] = {}
    lane: str = LANES[0]
    timeout: float | None = None
    max_attempts: int | None = None
    expires: float | None = None
    retention: float | None = None
    on_break: str = ON_BREAK[0]
    metadata: dict[str, str] = {}
    v: int = 1

    def encode(self) -> bytes:
        """The canonical JSON. Raises SpecError for text no JSON can carry, or a spec over MAX_SPEC_BYTES."""
        try:
            refuse_foreign([self.messages, self.params])
            body = _encoder.encode(self)
        except (UnicodeEncodeError, TypeError, ValueError, RecursionError) as error:
            raise SpecError(
                f"the job cannot be written as JSON ({_reason(error)}); send plain text and numbers"
            ) from None
        if len(body) > MAX_SPEC_BYTES:
            raise SpecError(
                f"the job is {len(body):,} bytes, at most {MAX_SPEC_BYTES:,} are taken; shorten the prompt or split it"
            )
        return body


_decoder = msgspec.json.Decoder(Spec)


def new_id() -> str:
    """A fresh job id: 128 random bits, since whoever knows an id can read the job."""
    return secrets.token_hex(16)


def check_id(job_id: str) -> str:
    """The id itself, or SpecError."""
    if not isinstance(job_id, str) or not ID_PATTERN.fullmatch(job_id):
        raise SpecError(f"job id: found {str(job_id)[:60]!r}, expected 1 to 64 of A-Z a-z 0-9 _ -")
    return job_id


def is_id(name: bytes) -> bool:
    """Whether a name found in Redis, which anybody may have written, can be a job's id."""
    return name.isascii() and ID_PATTERN.fullmatch(name.decode()) is not None


def ids_among(names: Iterable[bytes]) -> list[str]:
    """The names found in Redis that can be jobs' ids, in their order."""
    return [name.decode() for name in names if is_id(name)]


def build(prompt: str | None = None, *, messages: Sequence[Mapping[str, Any]] | None = None, **asked: Any) -> Spec:
    """Make a spec from what a caller says: a prompt or messages, a model, options of a job, OpenAI parameters.

    Raises SpecError naming the first thing that is wrong.
    """
    if (prompt is None) == (messages is None):
        raise SpecError("a job needs a prompt or messages, and not both")
    if messages is None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise SpecError("the prompt is empty; say what the model is to complete")
        messages = [{"role": "user", "content": prompt}]
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise SpecError("messages: expected a list of objects such as {'role': 'user', 'content': '...'}")
    options = {"model": "", **{name: asked.pop(name) for name in _OPTIONS if asked.get(name) is not None}}
    params = {name: value for name, value in asked.items() if value is not None and name not in _OPTIONS}
    spec = Spec(
        messages=[dict(m) if isinstance(m, Mapping) else _bad_message(m) for m in messages], params=params, **options
    )
    return check(spec)


_OPTIONS: Final = ("model", "lane", "timeout", "max_attempts", "expires", "retention", "on_break", "metadata")


def parse(body: bytes) -> Spec:
    """A spec as found in Redis, checked again: a job hash is hostile input. Raises SpecError."""
    if len(body) > MAX_SPEC_BYTES:
        raise SpecError(f"the spec is {len(body):,} bytes, at most {MAX_SPEC_BYTES:,} are taken")
    try:
        spec = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise SpecError(f"the spec is malformed: {_reason(error)}") from None
    return check(spec)


def check(spec: Spec) -> Spec:
    """The spec itself, or SpecError."""
    if not isinstance(spec.model, str) or not 0 < len(spec.model) <= 256 or not spec.model.isprintable():
        raise SpecError(f"model: found {_shown(spec.model)}, expected a name of 1 to 256 printable characters")
    if spec.lane not in LANES:
        raise SpecError(f"lane: found {spec.lane!r}, expected one of {', '.join(LANES)}")
    if spec.on_break not in ON_BREAK:
        raise SpecError(f"on_break: found {spec.on_break!r}, expected one of {', '.join(ON_BREAK)}")
    if spec.v != 1:
        raise SpecError(f"the spec has version {spec.v}, this release knows 1; update the worker")
    _check_range("timeout", spec.timeout, 0.05, 7 * 86400)
    _check_range("expires", spec.expires, 0.05, 30 * 86400)
    _check_range("retention", spec.retention, 1, 30 * 86400)
    _check_range("max_attempts", spec.max_attempts, 1, 100)
    if spec.max_attempts is not None and not isinstance(spec.max_attempts, int):
        raise SpecError(f"max_attempts: found {spec.max_attempts!r}, expected a whole number")
    _check_messages(spec.messages)
    _check_metadata(spec.metadata)
    parameters.check(spec.params)
    return spec


def _check_messages(messages: list[dict[str, Any]]) -> None:
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise SpecError(f"messages: found {len(messages):,}, expected 1 to {MAX_MESSAGES:,}")
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise SpecError(f"messages[{i}].role: found {str(role)[:30]!r}, expected one of {', '.join(ROLES)}")
        content = message.get("content")
        if content is None and role == "assistant":
            continue
        if not isinstance(content, str | list):
            raise SpecError(f"messages[{i}].content: found {type(content).__name__}, expected text or a list of parts")
    if not any(message.get("content") for message in messages):
        raise SpecError("the prompt is empty; say what the model is to complete")


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or len(metadata) > MAX_METADATA:
        found = f"{len(metadata)} pairs" if isinstance(metadata, dict) else type(metadata).__name__
        raise SpecError(f"metadata: found {found}, expected at most {MAX_METADATA} pairs of text")
    for name, value in metadata.items():
        if not (isinstance(name, str) and isinstance(value, str) and 0 < len(name) <= 64 and len(value) <= 512):
            raise SpecError(
                f"metadata {str(name)[:30]!r}: expected a name of 1 to 64 characters and text of at most 512"
            )


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN is in no range
        raise SpecError(f"{name}: found {_shown(value)}, expected {low:g} to {high:g}")


def refuse_foreign(value: Any) -> None:
    """Raise ValueError for what the encoder would turn into something else: NaN into null, bytes into base64."""
    if isinstance(value, list | tuple):
        for each in value:
            refuse_foreign(each)
    elif isinstance(value, dict):
        for name, each in value.items():
            if not isinstance(name, str | int):
                raise TypeError(f"found a name that is {type(name).__name__}")
            refuse_foreign(each)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"found {value}")
    elif value is not None and not isinstance(value, str | int | float):
        raise TypeError(f"found {type(value).__name__}")


def _shown(value: object) -> str:
    try:
        return repr(value)[:60]
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"a {type(value).__name__}"


def _bad_message(message: object) -> NoReturn:
    raise SpecError(
        f"messages: found {type(message).__name__}, expected objects such as {{'role': 'user', 'content': ...}}"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "it holds a lone surrogate, half of a character"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error).splitlines()[0][:200]


def complete(job_id: str) -> NoReturn:
    """What RQ enqueues. Only a Millstream worker runs it; a stock RQ worker fails with these words."""
    raise RuntimeError(
        f"job {job_id} needs a Millstream worker (`millstream-worker`, or `python -m worker` in the checkout); "
        "a stock RQ worker cannot stream it. Nothing is lost: a Millstream worker picks it up again."
    )
