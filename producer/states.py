"""The commands that show states: status, list. A table for people, TSV in a pipe, JSON for programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from millstream.client import Client
from millstream.status import Status

from . import columns, exits
from .notices import in_words
from .standard import Standard

COLUMNS: Final = ("id", "status", "lane", "model", "attempt", "seq", "created_at")
"""What `list` shows of each job, in this order."""
SPARED: Final = ("lane", "attempt", "seq", "model", "created_at")
"""What a narrow terminal is spared, the first first: an id that is cut or folded can no longer be copied."""


def status(arguments: argparse.Namespace, client: Client, standard: Standard) -> int:
    """One job: a line for each thing that is known."""
    found = client.status(arguments.id)
    if arguments.json:
        standard.write_json(found)
        return exits.DONE
    rows = [(name, text) for name in found.__struct_fields__ if (text := _shown(getattr(found, name), standard))]
    for line in [f"{each}\n" for each in columns.aligned(rows)] if standard.terminal else map(columns.tsv, rows):
        standard.write(line)
    return exits.DONE


def listing(arguments: argparse.Namespace, client: Client, standard: Standard) -> int:
    """Many jobs: a row each."""
    found = client.list(arguments.state, limit=arguments.limit + 1)
    shown = found[: arguments.limit]
    if arguments.json:
        for each in shown:
            standard.write_json(each)
    elif standard.terminal:
        _table(shown, standard)
    else:
        for each in shown:
            standard.write(columns.tsv([_shown(getattr(each, name), standard) for name in COLUMNS]))
    if len(found) > len(shown):
        standard.say(f"there are more jobs; --limit N shows more than {len(shown)}")
    return exits.DONE


def _table(jobs: Sequence[Status], standard: Standard) -> None:
    if not jobs:
        standard.say("no jobs")
        return
    names = list(COLUMNS)
    for spared in ("", *SPARED):
        names = [name for name in names if name != spared]
        head = [name.removesuffix("_at") for name in names]
        lines = columns.aligned([head, *([_shown(getattr(each, name), standard) for name in names] for each in jobs)])
        if columns.width(lines) <= standard.columns:
            break
    for line in lines:
        standard.write(line + "\n")


def _shown(value: Any, standard: Standard) -> str:
    """A field in words; empty when there is nothing to say. Floats are times: local on a terminal, else UTC."""
    if value is None or value == {}:
        return ""
    if isinstance(value, float):
        here = datetime.fromtimestamp(value, UTC).astimezone()
        return f"{here:%Y-%m-%d %H:%M:%S}" if standard.terminal else columns.utc(value)
    if isinstance(value, dict):
        if "code" in value:
            return in_words(value)
        if standard.terminal and "until" in value:
            return _wait(value, standard)
        return msgspec.json.encode(value).decode()
    return str(value)


def _wait(wait: dict[str, Any], standard: Standard) -> str:
    """What a queued job waits for, and until about when."""
    because = f"({wait['because']})" if wait.get("because") else ""
    words = [*(str(wait.get(name) or "") for name in ("what", "upstream", "model")), because]
    until = f"until about {_shown(wait['until'], standard)}" if wait["until"] else ""
    return ", ".join(filter(None, (" ".join(filter(None, words)), until)))
