"""Structured logs on stderr: event names like `job.started`, data as fields; never a prompt, a text or a key."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping, Sequence
from typing import Any, TextIO

import structlog

from millstream.terminal import printable


class Stderr:
    """stderr, be it a pipe that nobody reads any more or a file on a full disk: only lines are lost then."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            self._let_go()
        except (OSError, ValueError):  # the disk is full; it was closed
            pass

    def flush(self) -> None: ...

    def _let_go(self) -> None:
        """Nobody will ever read it: what is still buffered must not spoil the exit status."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def _disarm(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Fields may hold what others wrote, such as the name of a queue entry; on a terminal it must not act."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = printable(value)
    return event


def configure(style: str) -> None:
    """`json`: one object a line, for machines. `console`: for people."""
    render: Sequence[Any] = [structlog.processors.JSONRenderer()]
    if style == "console":
        render = [_disarm, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    first: Sequence[Any] = (
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    )
    last = (structlog.processors.format_exc_info, *render)
    stderr: Any = Stderr(sys.stderr)
    structlog.configure(
        processors=[*first, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=stderr),
        cache_logger_on_first_use=True,
    )
    # RQ and the HTTP libraries speak up only when something is wrong; their lines may not carry our arguments.
    theirs = logging.StreamHandler(stderr)
    theirs.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*first, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[theirs], force=True)
    logging.captureWarnings(capture=True)
    logging.getLogger("rq").setLevel(logging.WARNING)
    logging.getLogger("rq.worker").setLevel(logging.WARNING)
