"""The commands that show states: status, list. A table for people, TSV in a pipe, JSON for programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from millstream.client import Client
from millstream.status import Status
from millstream.terminal import printable

from . import exits
from .notices import in_words
from .standard import Standard

COLUMNS: Final = ("id", "status", "lane", "model", "attempt", "seq", "created_at")
"""What `list` shows of each job, in this order."""


def status(arguments: argparse.Namespace, client: Client, standard: Standard) -> int:
    """One job: a line for each thing that is known."""
    found = client.status(arguments.id)
    if arguments.json:
        standard.write_json(found)
        return exits.DONE
    rows = [(name, text) for name in found.__struct_fields__ if (text := _shown(getattr(found, name), standard))]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        standard.write(f"{name:<{width}}  {text}\n" if standard.terminal else f"{name}\t{_cell(text)}\n")
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
            standard.write("\t".join(_cell(_shown(getattr(each, name), standard)) for name in COLUMNS) + "\n")
    if len(found) > len(shown):
        standard.say(f"there are more than these {len(shown)}; --limit N shows more")
    return exits.DONE


def _table(jobs: Sequence[Status], standard: Standard) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    if not jobs:
        standard.say("no jobs")
        return
    table = Table(box=SIMPLE_HEAD)
    for name in COLUMNS:
        table.add_column(name.removesuffix("_at"), overflow="fold", no_wrap=name == "status")
    for each in jobs:
        table.add_row(*[Text(printable(_shown(getattr(each, name), standard))) for name in COLUMNS])
    standard.console().print(table)


def _shown(value: Any, standard: Standard) -> str:
    """A field in words; empty when there is nothing to say. Floats are times: local on a terminal, else UTC."""
    if value is None or value == {}:
        return ""
    if isinstance(value, float):
        at = datetime.fromtimestamp(value, UTC)
        return f"{at.astimezone():%Y-%m-%d %H:%M:%S}" if standard.terminal else f"{at:%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"
    if isinstance(value, dict):
        if "code" in value:
            return in_words(value)
        return msgspec.json.encode(value).decode()
    return str(value)


def _cell(text: str) -> str:
    """One cell of TSV: what would end it is written as an escape."""
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
