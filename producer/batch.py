"""The command `batch`: rows of a file through the queue, their answers into another, bounded and resumable."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import FrameType

from millstream.batch.course import Course
from millstream.batch.row import Reader
from millstream.client import Client
from millstream.errors import SpecError

from . import batch_input, batch_plan, exits, prices
from .batch_input import Rows
from .batch_ledger import Lines
from .batch_output import Output, Written
from .batch_progress import Progress
from .batch_tally import Tally
from .standard import Standard


def run(arguments: argparse.Namespace, client: Client, standard: Standard) -> int:
    """Do what is missing in the output; the exit status."""
    table = prices.read(arguments.prices) if arguments.prices else None
    with closing(batch_input.opened(arguments.input, standard)) as source:
        if arguments.dry_run:
            return batch_plan.run(arguments, source, table, standard)
        if not arguments.out:
            raise SpecError("--out FILE is missing: where the answers go (only --dry-run needs none)")
        if arguments.input != "-" and source.is_same(arguments.out):
            raise SpecError(f"--out {arguments.out} is the input itself; name another file")
        with closing(Output(arguments.out)) as output:
            return _Batch(arguments, client, standard, source, output, Tally(table)).run()


class _Batch:
    def __init__(
        self, arguments: argparse.Namespace, client: Client, standard: Standard, source: batch_input.Input,
        output: Output, tally: Tally,
    ) -> None:  # fmt: skip
        self._client, self._standard, self._output, self._tally = client, standard, output, tally
        self._again: bool = arguments.retry_failed
        self._lines = Lines()
        reader = Reader(output.batch_id, lane=arguments.lane)
        self._rows = Rows(source, reader, self._lines, limit=arguments.limit, sample=arguments.sample)
        self._course: Course = client.course(arguments.window, cancel=arguments.cancel, again=self._again)
        self._progress = Progress(
            standard, self._course, self._rows, self._lines, tally, as_json=arguments.json
        )  # fmt: skip

    def run(self) -> int:
        torn = self._output.read(self._lines, self._saw, again=self._again)
        if torn:
            self._standard.say(f"{self._output.path}: cut off a last line that was not whole ({torn:,} bytes)")
        said = False
        with self._interruptible():
            for answers in self._client.run_batch(self._course, self._rows):
                if answers:
                    self._output.write(answers, self._lines)
                    for answer in answers:
                        self._tally.take(answer)
                if self._course.stopped and not said:
                    said = True
                    self._say_stopping()
                self._progress.turn()
        stopped = self._course.stopped and not self._rows.dry
        if not stopped:
            self._output.tidy(self._lines, whole=self._rows.whole)
        self._progress.end()
        if stopped:
            self._standard.say("stopped before the end of the input; run the same command again for the rest")
            return exits.INTERRUPTED
        answered = self._tally.rows["answered"] + self._lines.before["answered"]
        return exits.DONE if answered == self._tally.written + self._lines.before.total() else exits.FAILED

    def _saw(self, line: Written) -> None:
        body = line.response.body if line.response else None
        self._tally.saw(line.code, body.model if body else "", body.usage if body else None)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C stops submitting, the second stops waiting."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._interrupted)
        try:
            yield
        except KeyboardInterrupt:
            self._progress.end()
            self._standard.say(
                f"stopped; {self._course.window.running:,} open rows go on. Run the same command again to pick them "
                "up, or with --cancel to end them"
            )
            raise
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupted(self, _number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._course.stop()  # what there is to say is said in the loop: a stream cannot be written to from here

    def _say_stopping(self) -> None:
        self._progress.say(
            f"no more rows are submitted; waiting for {self._course.window.running:,} that are open. Ctrl-C again "
            "stops waiting: they go on, and the same command picks them up"
        )
