"""A row: one line of a batch's input, in the format of the OpenAI Batch API, and the job it becomes. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Final

import msgspec
from msgspec import UNSET, Struct

from millstream import job
from millstream.errors import SpecError
from millstream.job import MAX_METADATA, Spec

from .answer import Answer

URLS: Final = ("/v1/chat/completions", "/chat/completions")
"""OpenAI's name of the endpoint, and Azure's."""

_LONE: Final = re.compile("[\ud800-\udfff]")
"""A half of a pair of surrogates, which no file can hold."""

_encoder: Final = msgspec.json.Encoder(order="deterministic")


@dataclass(frozen=True, slots=True)
class Row:
    """One row that can be asked. `body` is the encoded spec; `spec` lacks its messages and parameters, which are large.

    `content` stands for the batch, the custom_id and what was asked: `job_id` derives from it and `turn`, which counts
    how often an ended job of this row is in the way.
    """

    number: int
    custom_id: str
    content: bytes
    spec: Spec
    body: bytes
    turn: int = 0

    @property
    def job_id(self) -> str:
        """32 hexadecimal digits: the same row of the same batch is the same job."""
        return job_id(self.content, self.turn)

    def again(self) -> Row:
        """The same row as another job."""
        return replace(self, turn=self.turn + 1)


class _Line(Struct):
    """What a line may hold; whatever else is in it is ignored, as by OpenAI."""

    custom_id: Any = None
    method: Any = UNSET
    url: Any = UNSET
    body: Any = None


_decoder: Final = msgspec.json.Decoder(_Line)


class _RefusedError(Exception):
    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.custom_id = code, custom_id


class Reader:
    """Turns the lines of one batch into rows. `lane` and `retention` are those of its jobs."""

    def __init__(self, batch_id: str, *, lane: str = "batch", retention: float | None = None) -> None:
        self.batch_id = batch_id
        self._key = blake2b(batch_id.encode(), digest_size=32).digest()
        self._lane, self._retention = lane, retention

    def read(self, line: bytes, number: int, met: Callable[[str, bytes], str] | None = None) -> Row | Answer | None:
        """The row in a line, or what is wrong with it.

        `met(custom_id, content)` is asked before the costly part: `done` makes it None, `duplicate` an answer.
        """
        try:
            found, custom_id = self._line(line)
            content = _digest(self._key, b"row", custom_id.encode(), _encoder.encode(found.body))
            what = met(custom_id, content) if met else ""
            if what == "done":
                return None
            if what == "duplicate":
                return self.duplicate(content, number, custom_id)
            return self._row(found, custom_id, content, number)
        except _RefusedError as refused:
            return self.refusal(line, number, refused.code, str(refused), refused.custom_id)

    def read_object(self, given: object, number: int) -> Row | Answer:
        """As `read`, for a row that a program gives: a line, or what a line would hold."""
        if not isinstance(given, str | bytes | Mapping):
            return self.refusal(b"", number, "invalid_json_line", f"found {type(given).__name__}, expected a row")
        if isinstance(given, str | bytes):
            return self._read(given.encode(errors="surrogatepass") if isinstance(given, str) else given, number)
        try:
            job.refuse_foreign(dict(given))
            line = _encoder.encode(given)
        except (TypeError, ValueError, RecursionError) as error:
            line = repr(sorted(map(str, given)))[:1000].encode()
            custom_id = given.get("custom_id")
            named = custom_id if isinstance(custom_id, str) and not _LONE.search(custom_id) else None
            return self.refusal(
                line,
                number,
                "invalid_json_line",
                f"it cannot be written as JSON ({error}); send text and numbers",
                named,
            )
        return self._read(line, number)

    def _read(self, line: bytes, number: int) -> Row | Answer:
        found = self.read(line, number)
        assert found is not None  # nobody was asked whether it is done
        return found

    def refusal(self, line: bytes, number: int, code: str, message: str, custom_id: str | None = None) -> Answer:
        """The answer of a line that is not asked."""
        name = _digest(self._key, b"line", number.to_bytes(8), line).hex()
        return Answer(
            custom_id=custom_id, job_id=name, number=number, status="refused",
            error={"code": code, "message": f"line {number}: {message}", "line": number},
        )  # fmt: skip

    def duplicate(self, content: bytes, number: int, custom_id: str) -> Answer:
        """The answer of a row whose custom_id an earlier row has."""
        what = f"custom_id {custom_id[:64]!r} was there before; each row needs its own"
        return self.refusal(content, number, "duplicate_custom_id", what, custom_id)

    @staticmethod
    def _line(line: bytes) -> tuple[_Line, str]:
        try:
            found = _decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0][:200]
            raise _RefusedError("invalid_json_line", f"it is not a JSON object ({what})") from None
        custom_id = found.custom_id
        if not isinstance(custom_id, str) or not custom_id:
            shown = "none" if custom_id is None else repr(custom_id)[:60]
            raise _RefusedError("missing_required_parameter", f"custom_id: found {shown}, expected text")
        return found, custom_id

    def _row(self, found: _Line, custom_id: str, content: bytes, number: int) -> Row:
        try:
            spec = self._spec(found, custom_id)
            body = spec.encode()
        except SpecError as error:
            raise _RefusedError("invalid_request", f"body: {error}", custom_id) from None
        return Row(number, custom_id, content, msgspec.structs.replace(spec, messages=[], params={}), body)

    def _spec(self, found: _Line, custom_id: str) -> Spec:
        if found.method is not UNSET and found.method != "POST":
            raise _RefusedError("invalid_method", f"method: found {str(found.method)[:60]!r}, expected POST", custom_id)
        if found.url is not UNSET and found.url not in URLS:
            raise _RefusedError("invalid_url", f"url: found {str(found.url)[:100]!r}, expected {URLS[0]}", custom_id)
        if not isinstance(found.body, dict):
            raise _RefusedError("missing_required_parameter", "body: expected an object", custom_id)
        body = {name: value for name, value in found.body.items() if value is not None}
        for name in ("model", "messages"):
            if not body.get(name):
                raise _RefusedError("missing_required_parameter", f"body.{name} is missing", custom_id)
        model, messages, metadata = body.pop("model"), body.pop("messages"), body.pop("metadata", {})
        if body.get("stream") is False:
            del body["stream"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise SpecError("messages: expected a list of objects such as {'role': 'user', 'content': '...'}")
        spec = Spec(
            model=model, messages=messages, params=body, lane=self._lane, retention=self._retention, metadata=metadata
        )
        job.check(spec)
        return msgspec.structs.replace(spec, metadata=self._named(metadata, custom_id))

    def _named(self, metadata: dict[str, str], custom_id: str) -> dict[str, str]:
        """The row's metadata and, where there is room, what finds its job: the batch and the custom_id."""
        named = {**metadata, "batch": self.batch_id, "custom_id": custom_id}
        return named if len(named) <= MAX_METADATA and len(custom_id) <= 512 else metadata


def job_id(content: bytes, turn: int = 0) -> str:
    """The job of a row's content."""
    return _digest(content, b"job", turn.to_bytes(4)).hex()


def _digest(key: bytes, *parts: bytes) -> bytes:
    """128 bits of parts that cannot run into each other."""
    digest = blake2b(digest_size=16, key=key)
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.digest()
