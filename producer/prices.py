"""What tokens cost: a TOML file of prices per million tokens, by model."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millstream.errors import SpecError

MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """Money for a million tokens."""

    input: float
    output: float
    cached_input: float

    def of(self, usage: Mapping[str, Any]) -> float:
        """Money for what one answer used."""
        details = usage.get("prompt_tokens_details")
        cached = count(details, "cached_tokens") if isinstance(details, dict) else 0
        fresh = max(0, count(usage, "prompt_tokens") - cached)
        spent = fresh * self.input + cached * self.cached_input + count(usage, "completion_tokens") * self.output
        return spent / MILLION


@dataclass(frozen=True, slots=True)
class Prices:
    """A price table. A model's price is that of the longest name it begins with: of gpt-4o-mini, not of gpt-4o."""

    currency: str
    models: Mapping[str, Price]

    def price(self, model: str) -> Price | None:
        """None for a model that is not in the table."""
        names = [name for name in self.models if model.startswith(name)]
        return self.models[max(names, key=len)] if names else None


def count(usage: Mapping[str, Any] | None, name: str) -> int:
    """A number of tokens in a usage, 0 where there is none."""
    value = (usage or {}).get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def read(path: str) -> Prices:
    """The table in a file. Raises SpecError naming the line or the model."""
    try:
        with Path(path).open("rb") as file:
            found = tomllib.load(file)
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise SpecError(f"--prices {path}: {getattr(error, 'strerror', None) or error}; expected a TOML file") from None
    currency = found.pop("currency", "USD")
    return Prices(str(currency), {name: _price(path, name, entry) for name, entry in found.items()})


def _price(path: str, model: str, entry: Any) -> Price:
    known = {"input", "output", "cached_input"}
    numbers = isinstance(entry, dict) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
        for value in entry.values()
    )
    if not numbers or not {"input", "output"} <= set(entry) <= known:
        raise SpecError(
            f"--prices {path}: [{model}] expected input, output and maybe cached_input, money per million tokens; "
            'a name with dots is written ["gpt-4.1"]'
        )
    return Price(entry["input"], entry["output"], entry.get("cached_input", entry["input"]))
