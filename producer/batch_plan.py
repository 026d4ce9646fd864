"""`batch --dry-run`: what a batch would ask, and roughly what it would take. Redis is not asked for anything."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import msgspec

from millstream.batch.answer import Answer
from millstream.batch.row import Reader

from . import exits
from .batch_input import Input, Rows
from .batch_ledger import Lines
from .prices import MILLION, Prices
from .standard import Standard

BYTES_PER_TOKEN = 4
"""OpenAI's rule of thumb for English; for other languages and for code it is nearer to 2 or 3."""


def run(arguments: argparse.Namespace, source: Input, table: Prices | None, standard: Standard) -> int:
    """Validate every row and print what there is; the exit status says whether some row would be refused."""
    rows = Rows(source, Reader("dry-run", lane=arguments.lane), Lines(), limit=arguments.limit, sample=arguments.sample)
    plan = Plan(table)
    while True:
        taken = rows.take(1000)
        for row in taken.rows:
            if isinstance(row, Answer):
                plan.refuse(row, standard)
            else:
                plan.take(msgspec.json.decode(row.body))
        if taken.dry:
            break
        if taken.idle:
            source.wait()
    if arguments.json:
        standard.write_json(plan.figures())
    else:
        for line in plan.in_words():
            standard.write(line + "\n")
    return exits.FAILED if plan.refused else exits.DONE


class Plan:
    """Adds up what rows ask for."""

    def __init__(self, table: Prices | None) -> None:
        self._table = table
        self.rows = 0
        self.refused: Counter[str] = Counter()
        self._models: Counter[str] = Counter()
        self._tokens_in = self._most_out = self._open_end = 0
        self._cost_in = self._cost_out = 0.0
        self._unpriced: set[str] = set()

    def refuse(self, answer: Answer, standard: Standard) -> None:
        """A line that would be an error; the first few are shown."""
        error = answer.error or {}
        self.refused[error["code"]] += 1
        if self.refused.total() <= 10:
            standard.say(f"{error['code']}: {error['message']}")

    def take(self, spec: dict[str, Any]) -> None:
        """A row that would be asked."""
        params = spec.get("params", {})
        tokens = text_bytes([spec["messages"], params.get("tools"), params.get("response_format")]) // BYTES_PER_TOKEN
        longest = params.get("max_completion_tokens") or params.get("max_tokens")
        self.rows += 1
        self._models[spec["model"]] += 1
        self._tokens_in += tokens
        self._open_end += not longest
        most = (longest or 0) * (params.get("n") or 1)
        self._most_out += most
        if self._table:
            price = self._table.price(spec["model"])
            if price is None:
                self._unpriced.add(spec["model"])
            else:
                self._cost_in += tokens * price.input / MILLION
                self._cost_out += most * price.output / MILLION

    def figures(self) -> dict[str, Any]:
        """For programs."""
        found: dict[str, Any] = {
            "rows": self.rows,
            "refused": self.refused.total(),
            "reasons": dict(self.refused.most_common()),
            "models": dict(self._models.most_common()),
            "prompt_tokens": self._tokens_in,
            "completion_tokens_at_most": None if self._open_end else self._most_out,
            "rows_without_max_tokens": self._open_end,
        }
        if self._table:
            found |= {
                "currency": self._table.currency,
                "cost_of_prompts": round(self._cost_in, 6),
                "cost_at_most": None if self._open_end or self._unpriced else round(self._cost_in + self._cost_out, 6),
                "unpriced": sorted(self._unpriced),
            }
        return found

    def in_words(self) -> list[str]:
        """For people."""
        figures = self.figures()
        lines = [
            f"{self.rows:,} rows would be asked, {figures['refused']:,} lines would be refused; nothing was submitted"
        ]
        lines += [f"  {count:,} x {code}" for code, count in figures["reasons"].items()]
        lines += [f"  {count:,} for {model}" for model, count in figures["models"].items()]
        lines.append(f"about {self._tokens_in:,} prompt tokens (text / {BYTES_PER_TOKEN})")
        most = f"at most {self._most_out:,} completion tokens"
        if self._open_end:
            most += f" for those with max_tokens; {self._open_end:,} rows set none"
        lines.append(most)
        if self._table:
            lines.append(
                f"about {self._cost_in:,.4f} {self._table.currency} for prompts, "
                f"at most {self._cost_out:,.4f} {self._table.currency} for completions that are bounded"
            )
        if self._unpriced:
            lines.append(f"no price for: {', '.join(sorted(self._unpriced))}")
        return lines


def text_bytes(value: Any) -> int:
    """Bytes of all text in messages; an image given as data counts as nothing, since its bytes are no tokens."""
    if isinstance(value, str):
        return 0 if value.startswith("data:") else len(value.encode())
    if isinstance(value, dict):
        return sum(map(text_bytes, value.values()))
    return sum(map(text_bytes, value)) if isinstance(value, list) else 0
