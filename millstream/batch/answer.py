"""What became of one row, and its line in a batch's output: the format of the OpenAI Batch API. Pure."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

ANSWERED = ("completed", "incomplete")


class Answer(Struct, frozen=True, kw_only=True):
    """One row of a batch after its end.

    `status`: completed or incomplete (`completion` is an OpenAI chat.completion), failed or cancelled (`error` has
    `code`, `message` and, where an upstream answered, its HTTP `status`), or refused: a line that could not be asked.
    `number` counts the input's lines from 1.
    """

    custom_id: str | None
    job_id: str
    number: int
    status: str
    completion: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    attempts: int = 0

    @property
    def answered(self) -> bool:
        """Whether there is an answer, be it one that the model stopped early."""
        return self.status in ANSWERED

    @property
    def text(self) -> str:
        """The content of the first choice; empty when there is none."""
        choices = (self.completion or {}).get("choices") or [{"message": {}}]
        return choices[0]["message"].get("content") or ""

    @property
    def line_id(self) -> str:
        """The `id` of its line: `batch_req_` and the job's id; `batch_line_` and a digest where there was no job."""
        return f"batch_{'line' if self.status == 'refused' else 'req'}_{self.job_id}"

    def line(self) -> dict[str, Any]:
        """The row's output: an answer is a `response` with status 200, what an upstream refused one with its status.

        Everything else that is no answer is an `error`.
        """
        response: dict[str, Any] | None = None
        error = None if self.answered else {"code": "unknown", "message": "no reason was given", **(self.error or {})}
        if self.answered:
            response = {"status_code": 200, "request_id": self.job_id, "body": self.completion}
        elif error and isinstance(status := error.get("status"), int):
            body = {
                "message": error["message"], "type": "server_error" if status >= 500 else "invalid_request_error",
                "param": None, "code": error["code"],
            }  # fmt: skip
            response, error = {"status_code": status, "request_id": self.job_id, "body": {"error": body}}, None
        return {"id": self.line_id, "custom_id": self.custom_id, "response": response, "error": error}
