"""What can go wrong between a request and a whole answer, and which of it is worth another try.

The tables follow the OpenAI API reference and what its dialects were seen to send; anything unknown is worth another
try unless its status says that the request itself is at fault.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from .counts import NONE

RETRYABLE_STATUSES: Final = frozenset({408, 409, 425, 429})
"""Besides every 5xx (529, "overloaded", included)."""

FINAL_CODES: Final = frozenset(
    {
        "insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "enforced_spend_limit_reached",
        "access_terminated", "account_deactivated", "invalid_api_key", "model_not_found", "context_length_exceeded",
        "content_policy_violation", "content_filter", "invalid_request_error", "invalid_prompt",
        "unsupported_parameter",
        "string_above_max_length", "invalid_value", "invalid_type", "unsupported_value", "missing_required_parameter",
    }
)  # fmt: skip
"""Codes that never pass by waiting, whatever the status: a 429 for an empty account is still a 429."""

MESSAGE_LIMIT: Final = 1000
SHORTEST_SECRET: Final = 8
"""Characters from which on a key is taken out of messages: `none` or `test` would tear holes into words."""

_CODE: Final = re.compile(r"[^A-Za-z0-9_.:/-]+")
_TAG: Final = re.compile(r"<(script|style)\b.*?</\1\s*>|<[^>]*>", re.DOTALL | re.IGNORECASE)


class UpstreamFailure(Exception):  # noqa: N818 - the failure is the upstream's, not an error of this program
    """An attempt at the upstream came to nothing.

    `code`: one word for the event and the log; `retryable`: whether the same request may succeed later;
    `retry_after`: seconds the upstream asked for, if it did; `status`: the HTTP status, 0 without one.
    """

    def __init__(
        self, code: str, message: str, *, retryable: bool = True, retry_after: float | None = None, status: int = 0
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message[:MESSAGE_LIMIT]
        self.retryable = retryable
        self.retry_after = retry_after
        self.status = status
        self.counts = NONE
        """What the refusal's headers say of the upstream's limits."""

    def without(self, secret: str) -> None:
        """Take a secret out of what is shown, should the upstream have said it."""
        if len(secret) < SHORTEST_SECRET:
            return
        self.code = self.code.replace(secret, "***")
        message = self.message.replace(secret, "***")
        for length in range(len(secret) - 1, SHORTEST_SECRET - 1, -1):  # perhaps cut off at the limit
            message = message.removesuffix(secret[:length])
        self.message = message
        self.args = (f"{self.code}: {self.message}",)

    @property
    def of_the_upstream(self) -> bool:
        """Whether it says that the upstream is unwell: it did not do its part, and did not say when it will."""
        return self.retryable and not (self.status == 429 and self.retry_after is not None)

    @property
    def error(self) -> dict[str, Any]:
        """The `error` of an event."""
        return {"code": self.code, "message": self.message, **({"status": self.status} if self.status else {})}


def from_status(status: int, body: Any, retry_after: float | None = None) -> UpstreamFailure:
    """What a response with an error status means; `body` is its JSON, its text, or None."""
    code, message = describe(body)
    retryable = status >= 500 or (status in RETRYABLE_STATUSES and code not in FINAL_CODES)
    if 300 <= status < 400:
        code, message = "redirect", "the upstream redirects elsewhere; give its final address as its base URL"
    if status == 404 and not code:
        message = f"{message or 'the upstream answered 404'} (is /chat/completions below its base URL? Most end in /v1)"
    return UpstreamFailure(
        code or f"http_{status}", message or f"the upstream answered {status}",
        retryable=retryable, retry_after=retry_after, status=status,
    )  # fmt: skip


def from_error(error: Any) -> UpstreamFailure:
    """What an error inside a stream that began with 200 means: an object, a string, or something else."""
    code, message = describe(error)
    status = _status_in(error)
    retryable = code not in FINAL_CODES and not (400 <= status < 500 and status not in RETRYABLE_STATUSES)
    return UpstreamFailure(
        code or "upstream_error", message or "the upstream reported an error without a message",
        retryable=retryable, status=status,
    )  # fmt: skip


def describe(body: Any) -> tuple[str, str]:
    """The code and message in an error body of any known shape; empty strings where there is none."""
    if isinstance(body, list) and body:  # Gemini wraps its error in a list
        body = body[0]
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, str):
        return "", plain(error)
    if not isinstance(error, dict):
        return "", ""
    said = error.get("message") or error.get("detail") or ""
    message = plain(said if isinstance(said, str) else _dumped(said))
    for name in ("code", "type", "status"):
        value = error.get(name)
        if isinstance(value, str) and value and not value.isdigit():
            return _CODE.sub("_", value)[:64], message
    return "", message


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return ""


def plain(text: str) -> str:
    """Words on one line: no markup of an error page, nothing that would move a terminal's cursor."""
    text = text[: 64 * 1024]
    if text.lstrip()[:1] == "<":
        text = _TAG.sub(" ", text)
    words = "".join(char if char.isprintable() else " " for char in text).split()
    return " ".join(words)[:MESSAGE_LIMIT]


def _status_in(error: Any) -> int:
    inner = error.get("error", error) if isinstance(error, dict) else None
    code = inner.get("code") or inner.get("status") if isinstance(inner, dict) else None
    text = code if isinstance(code, str) else str(code) if isinstance(code, int) and 0 <= code < 1000 else ""
    return int(text) if re.fullmatch(r"[1-5][0-9][0-9]", text) else 0
