"""The command limits: a row for each meter. A table for people, TSV in a pipe, JSON for programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from millstream.client import Client
from millstream.meters import Gauge, Use

from . import columns, exits
from .standard import Standard

COLUMNS: Final = (
    "upstream", "model", "requests", "tokens", "streams", "waiting", "waiting_batch", "next_at", "cooling_until"
)  # fmt: skip


def run(arguments: argparse.Namespace, client: Client, standard: Standard) -> int:
    """Each meter: what is in use of its limits, how many jobs wait, when the next is due, until when it cools."""
    found = client.limits()
    if arguments.json:
        for each in found:
            standard.write_json(each)
    elif standard.terminal:
        _table(found, standard)
    else:
        for each in found:
            standard.write(columns.tsv(_cells(each, standard)))
    return exits.DONE


def _cells(gauge: Gauge, standard: Standard) -> list[str]:
    interactive, batch = gauge.waiting["interactive"], gauge.waiting["batch"]
    return [
        gauge.upstream, gauge.model, _use(gauge.requests), _use(gauge.tokens), _use(gauge.streams),
        str(interactive), str(batch), _time(gauge.next_at, standard), _time(gauge.cooling_until, standard),
    ]  # fmt: skip


def _use(use: Use) -> str:
    return f"{use.used}/{'-' if use.limit is None else use.limit}"


def _time(at: float | None, standard: Standard) -> str:
    if at is None:
        return ""
    return f"{datetime.fromtimestamp(at, UTC).astimezone():%H:%M:%S}" if standard.terminal else columns.utc(at)


def _table(found: Sequence[Gauge], standard: Standard) -> None:
    if not found:
        standard.say("no limits: none is set for a worker, and no upstream has asked for one")
        return
    head = [name.removesuffix("_at").replace("_", " ") for name in COLUMNS]
    rows = [_cells(each, standard) for each in found]
    lines = columns.aligned([head, *rows])
    if columns.width(lines) > standard.columns:  # below each other then, a line for each thing that is known
        blocks = (columns.aligned([pair for pair in zip(head, row, strict=True) if pair[1]]) for row in rows)
        lines = [line for block in blocks for line in ("", *block)][1:]
    for line in lines:
        standard.write(line + "\n")
