"""What a batch's output holds, in 16 bytes a row: which rows have their line, and which were met in the input. Pure."""

from __future__ import annotations

from collections import Counter
from typing import Final

from millstream.batch.answer import Answer
from millstream.batch.ledger import Ledger, fingerprint
from millstream.batch.row import job_id

KINDS: Final = ("", "answered", "failed", "cancelled")
"""What a line can say of a row: nothing yet, an answer, an error, that it was cancelled."""
MAX_TURNS: Final = 8
"""How many earlier jobs of a row are recognised."""

_MET: Final = 1
_KIND: Final = 1


def kind_of(answer: Answer) -> str:
    """The kind of line an answer becomes."""
    return "answered" if answer.answered else "cancelled" if answer.status == "cancelled" else "failed"


class Lines:
    """Notes each line of the output and each row of the input; says which rows are done.

    Under a custom_id's fingerprint: 61 bits of the job whose line it is, 2 for the kind, 1 for "met in the input".
    """

    def __init__(self) -> None:
        self._ledger = Ledger()
        self.before: Counter[str] = Counter()
        """Rows of the input that had their line before this run, by kind."""
        self.stale = 0
        """Lines that another line, or an edited row, has made void."""
        self._refused = 0

    def written(self, custom_id: str, job: str, kind: str) -> None:
        """A row's line is in the output; the last one counts."""
        name = fingerprint(custom_id)
        value = self._ledger.get(name)
        self.stale += bool(value >> _KIND & 3)
        self._ledger.put(name, _short(job) << 3 | KINDS.index(kind) << _KIND | value & _MET)

    def written_refused(self, line_id: str) -> None:
        """A line of the output is about a line of the input that was not asked."""
        name = fingerprint(line_id)
        if self._ledger.get(name):
            self.stale += 1
            return
        self._refused += 1
        self._ledger.put(name, KINDS.index("failed") << _KIND)

    def void(self, custom_id: str) -> None:
        """A line's row is to be asked again: its line goes when there is a new one."""
        name = fingerprint(custom_id)
        if not self._ledger.get(name):
            self._ledger.put(name, KINDS.index("failed") << _KIND)

    def met(self, custom_id: str, content: bytes) -> str:
        """A row of the input: `done`, `duplicate`, or empty when it is to be asked."""
        name = fingerprint(custom_id)
        value = self._ledger.get(name)
        if value & _MET:
            return "duplicate"
        self._ledger.put(name, value | _MET)
        if not value >> 3 or not any(_short(job_id(content, turn)) == value >> 3 for turn in range(MAX_TURNS)):
            return ""
        self.before[KINDS[value >> _KIND & 3]] += 1
        return "done"

    def met_refused(self, answer: Answer) -> bool:
        """A line of the input that cannot be asked: whether the output says so already."""
        name = fingerprint(answer.line_id)
        value = self._ledger.get(name)
        if value & _MET or not value:
            self._ledger.put(name, value | _MET)
            return False
        self._ledger.put(name, value | _MET)
        self._refused -= 1
        self.before["failed"] += 1
        return True

    @property
    def unmet_refused(self) -> int:
        """Lines about lines that are not in the input any more."""
        return self._refused

    def keeps_refused(self, line_id: str) -> bool:
        """Whether a line about a line that was not asked is still true of the input."""
        return bool(self._ledger.get(fingerprint(line_id)) & _MET)


def _short(job: str) -> int:
    return int(job[:16], 16) >> 3
