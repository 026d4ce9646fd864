"""The parser: what can be typed. Meaning is left to the commands and to the library's own checks."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn

import millstream
from millstream import job
from millstream.keys import LANES
from millstream.terminal import printable

from . import exits, manual

STATES = ("queued", "in_progress", *exits.ENDINGS)


class Parser(argparse.ArgumentParser):
    """argparse, saying what is wrong in one line that a terminal may be shown."""

    def error(self, message: str) -> NoReturn:
        line = printable(" ".join(message.split()))
        shown = line if len(line) <= 400 else line[:400] + " ..."
        self.exit(exits.USAGE, f"{self.prog}: {shown}; see {self.prog} --help\n")


def build(prog: str) -> Parser:
    """The whole parser, for a command that is called `prog`."""
    parser = Parser(
        prog=prog,
        description="Ask for completions through Redis, follow them as they stream, read the answers.",
        epilog=manual.epilog(prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"millstream {millstream.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, does: str) -> Parser:
        return commands.add_parser(name, help=does, description=does[0].upper() + does[1:] + ".", allow_abbrev=False)

    _submit(command("submit", "ask for a completion; prints the job's id"))
    _follow(command("follow", "stream the text of jobs, from their beginning, until they end"))
    _status(command("status", "print a job's state"))
    _result(command("result", "wait for a job's end and print its text"))
    _one_id(command("cancel", "end a job now; prints the status it has then"))
    _list(command("list", "list open jobs, then ended ones with the newest first"))
    _one_id(command("forget", "let Redis drop an ended job in a minute"))
    _limits(command("limits", "print what is in use of each limit, who waits for it and until when"))
    _batch(
        command("batch", "ask every row of a file, at most a window of them at once; again, it does what is missing")
    )
    return parser


def _submit(parser: Parser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt; - reads it from stdin (UTF-8)")
    parser.add_argument("--messages", metavar="FILE", help="a JSON array of messages instead of a prompt; - is stdin")
    parser.add_argument("--model", metavar="M", help="default: MILLSTREAM_MODEL")
    parser.add_argument("--system", metavar="S", help="a system message before the prompt or messages")
    parser.add_argument(
        "--param", metavar="NAME=VALUE", action="append", default=[],
        help="an OpenAI parameter; VALUE is JSON, else text; may be repeated",
    )  # fmt: skip
    parser.add_argument("--lane", metavar="L", choices=LANES, help=f"{' or '.join(LANES)} (default {LANES[0]})")
    parser.add_argument("--id", metavar="ID", help="1 to 64 of A-Z a-z 0-9 _ - (default: 128 random bits)")
    parser.add_argument("--timeout", metavar="S", type=float, help="seconds for the whole answer")
    parser.add_argument("--expires", metavar="S", type=float, help="fail unless it is started within so many seconds")
    parser.add_argument("--retention", metavar="S", type=float, help="seconds the answer is kept after the end")
    parser.add_argument(
        "--on-break", choices=job.ON_BREAK, help=f"what to do when a stream breaks (default {job.ON_BREAK[0]})"
    )
    parser.add_argument("--max-attempts", metavar="N", type=int, help="broken or lost attempts until it fails")
    parser.add_argument(
        "--metadata", metavar="K=V", action="append", default=[], help="kept beside the job; may be repeated"
    )
    parser.add_argument("--follow", action="store_true", help="stream the text; the id goes to stderr")
    parser.add_argument("--json", action="store_true", help='print {"id","created"}; with --follow: one event a line')


def _follow(parser: Parser) -> None:
    parser.add_argument("ids", nargs="+", metavar="ID")
    parser.add_argument("--after", metavar="SEQ", type=_seq, default=0, help="only the events after this one")
    parser.add_argument(
        "--live", action="store_true",
        help="in a pipe too write the text as it comes, and begin a new line at a restart (a terminal always does)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one event a line, as on the channel")


def _status(parser: Parser) -> None:
    _one_id(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _result(parser: Parser) -> None:
    _one_id(parser)
    parser.add_argument(
        "--timeout", metavar="S", type=_patience, help="seconds to wait for the end (default: no limit)"
    )
    parser.add_argument("--json", action="store_true", help="id, status, text, completion, usage, attempts, error")


def _list(parser: Parser) -> None:
    parser.add_argument(
        "--state", choices=STATES, metavar="S", help=f"{', '.join(STATES)}; of the ended, among the newest 10 x N"
    )
    parser.add_argument("--limit", type=_limit, metavar="N", default=100, help="at most so many (default 100)")
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a line with all there is (in a pipe else, between tabs: id, status, lane, model, "
        "attempt, seq, created_at)",
    )


def _limits(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def _batch(parser: Parser) -> None:
    parser.add_argument(
        "input", metavar="IN.jsonl", help="rows as for the OpenAI Batch API: custom_id, method, url, body; - is stdin"
    )
    parser.add_argument(
        "--out", metavar="OUT.jsonl", type=_file, help="where the answers go; OUT.jsonl.batch is kept beside it"
    )
    parser.add_argument(
        "--window", metavar="N", type=_limit, default=1000, help="jobs open at once at most (default 1000)"
    )
    parser.add_argument("--lane", metavar="L", choices=LANES, default=LANES[1], help=f"default {LANES[1]}")
    parser.add_argument("--cancel", action="store_true", help="end what is open; rows without an answer become errors")
    parser.add_argument("--retry-failed", action="store_true", help="ask rows again whose line is an error")
    parser.add_argument("--dry-run", action="store_true", help="validate every row, estimate tokens, submit nothing")
    parser.add_argument("--limit", metavar="N", type=_limit, help="only the first N rows of the input")
    parser.add_argument("--sample", metavar="N", type=_limit, help="only N rows, drawn at random; again, the same ones")
    parser.add_argument("--prices", metavar="FILE", help="TOML: money per million tokens, by model (docs/batch.md)")
    parser.add_argument(
        "--json", action="store_true", help="progress as JSON lines, as it is when stderr is no terminal"
    )


def _one_id(parser: Parser) -> None:
    parser.add_argument("id", metavar="ID")


def _seq(text: str) -> int:
    return _whole(text, 0)


def _limit(text: str) -> int:
    return _whole(text, 1)


def _whole(text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 15 and int(text) >= least):
        raise argparse.ArgumentTypeError(f"found {text[:40]!r}, expected a whole number, {least} or more")
    return int(text)


def _file(text: str) -> str:
    if text == "-":
        raise argparse.ArgumentTypeError(
            "found '-', expected a file: after a stop the batch goes on from what stands in it"
        )
    return text


def _patience(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"found {text[:40]!r}, expected seconds, 0 or more")
    return seconds
