"""`python -m local demo`: start it all, show a few answers streaming side by side, check them, and leave nothing."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final

from rich.console import Console
from rich.live import Live

from millstream import Client, Event, Settings

from . import board, parts
from .board import PlainLines, Row
from .errors import PartFailed
from .plan import Plan
from .supervise import Stack, signals_interrupt
from .up import say

PROMPTS: Final = (
    "In a few sentences, how does a water mill turn a river into flour?",
    "Write a short poem about a river that carries words instead of water.",
    "List five things a baker does before sunrise.",
)
_MAX_TOKENS: Final = 140  # an answer of 5 to 10 s from the local model on two cores
_PATIENCE: Final = 120.0  # seconds for all answers; the whole command has 3 minutes
_FRAME: Final = 0.08  # seconds between two pictures
_DRAIN: Final = 5.0  # seconds for the worker, which has nothing left to do, to end
_NARROWEST: Final = 72  # columns; below that, side by side is unreadable

News = tuple[str, Event] | BaseException  # a job's event, or what broke the following
Show = Callable[[Row, Event], None]


def demo(
    environ: Mapping[str, str], worker_command: Sequence[str] = parts.WORKER_COMMAND, prompts: Sequence[str] = PROMPTS
) -> int:
    """0 when every answer came whole and as the log has it, else 1. Raises LocalError when it cannot run.

    The server is always one of its own, REDIS_URL or not: its worker must not take jobs that are meant for others.
    """
    plan = Plan.from_environ({name: value for name, value in environ.items() if name != "REDIS_URL"})
    with signals_interrupt(), tempfile.TemporaryDirectory(prefix="millstream-demo-") as data:
        stack = Stack(plan, Path(data), port=None, worker_command=worker_command, say=say)
        try:
            say(f"The model: {plan.upstream}")
            stack.start()
            return _stream(stack, prompts)
        finally:
            stack.stop(drain=_DRAIN)


def _stream(stack: Stack, prompts: Sequence[str]) -> int:
    with Client(settings=Settings.from_env(stack.environ)) as client:
        began = time.monotonic()
        rows = [Row(client.submit(prompt, max_tokens=_MAX_TOKENS).id, prompt) for prompt in prompts]
        with _display(rows) as show:
            _follow(stack, client, rows, began, show)
        same = [_is_as_in_the_log(client, row) for row in rows]
    for number, (row, is_same) in enumerate(zip(rows, same, strict=True), 1):
        say(board.outcome(number, row, same_as_log=is_same))
    return 0 if all(same) and all(row.status in ("completed", "incomplete") for row in rows) else 1


def _follow(stack: Stack, client: Client, rows: Sequence[Row], began: float, show: Show) -> None:
    """Feed and show the rows until all have ended, and tend the parts meanwhile."""
    by_id = {row.job_id: row for row in rows}
    inbox: SimpleQueue[News] = SimpleQueue()
    # In a thread, because following blocks: so a part that dies is seen at once, and the time can run out.
    threading.Thread(target=_read, args=(client, list(by_id), inbox), daemon=True).start()
    while not all(row.ended for row in rows):
        if time.monotonic() > began + _PATIENCE:
            tail = stack.worker.tail() if stack.worker else ""
            raise PartFailed(f"not every answer ended within {_PATIENCE:g} s; the worker's log says:", tail)
        stack.tend()
        try:
            news = inbox.get(timeout=_FRAME)
        except Empty:
            continue
        if isinstance(news, BaseException):
            raise news
        job_id, event = news
        by_id[job_id].feed(event, time.monotonic() - began)
        show(by_id[job_id], event)


def _read(client: Client, job_ids: Sequence[str], inbox: SimpleQueue[News]) -> None:
    try:
        for news in client.follow_many(job_ids):
            inbox.put(news)
    except BaseException as error:  # noqa: BLE001 - it is raised where somebody sees it
        inbox.put(error)


def _is_as_in_the_log(client: Client, row: Row) -> bool:
    """Whether the text that was shown live is what the log holds, read anew."""
    return client.outcome(row.job_id, timeout=10)[0].text == row.transcript.text


@contextmanager
def _display(rows: Sequence[Row]) -> Iterator[Show]:
    """How to show an event: as panels on a terminal that is wide enough, else as lines."""
    console = Console()
    if not console.is_terminal or console.width < _NARROWEST:
        lines = {row.job_id: PlainLines(f"[{number}]") for number, row in enumerate(rows, 1)}
        for number, row in enumerate(rows, 1):
            say(f"[{number}] > {row.prompt}")

        def print_lines(row: Row, event: Event) -> None:
            for line in lines[row.job_id].feed(event):
                say(line)

        yield print_lines
        return
    with Live(console=console, get_renderable=lambda: board.panels(rows, console), auto_refresh=False) as live:
        drawn_at = 0.0

        def draw(_row: Row, _event: Event) -> None:
            # Here and not in rich's own thread, which could look at a row while it changes. Leaving draws the last.
            nonlocal drawn_at
            if time.monotonic() - drawn_at > _FRAME:
                live.refresh()
                drawn_at = time.monotonic()

        yield draw
