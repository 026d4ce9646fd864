"""`python -m bench [--quick]`: measures, prints the table of budgets, writes docs/benchmarks.md. See --help."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from local.errors import LocalError

from . import long_run, plan, report
from .servers import ROOT
from .toolchain import BenchError, build_stub


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="What Millstream costs beside a naive baseline."
    )
    parser.add_argument(
        "--quick", action="store_true", help="under a minute: the ratios at 50 and 200 streams; writes nothing"
    )
    parser.add_argument(
        "--long",
        type=float,
        metavar="MINUTES",
        help="only 1,000 streams of 20 chunks/s for so long: does anything grow?",
    )
    parser.add_argument("--rounds", type=int, default=3, help="times every case is measured in a full run (default 3)")
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="length of one measurement in a full run (default 6)"
    )
    parser.add_argument(
        "--only", default="", help="only cases whose label contains this (such as naive, 'product 200', TLS)"
    )
    parser.add_argument(
        "--docs", type=Path, default=ROOT / "docs", help="where a full run writes its report (default docs/)"
    )
    parser.add_argument("--json", type=Path, help="also write all results here")
    return parser.parse_args()


def main() -> int:
    """Exit status: 0 measured, whatever the figures; 1 something was not; 2 cannot run here; 130 Ctrl-C."""
    arguments = _arguments()
    # A supervisor's SIGTERM ends the bench as Ctrl-C does: with everything it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.platform != "linux":
        print("the bench reads /proc and pins processes: it needs Linux", file=sys.stderr)
        return 2
    try:
        build_stub()
        if arguments.long:
            return 0 if long_run.run(arguments.long) else 1
        cases = tuple(case for case in (plan.QUICK if arguments.quick else plan.FULL) if arguments.only in case.label)
        rounds, seconds = (1, 3.0) if arguments.quick else (arguments.rounds, arguments.seconds)
        results = plan.run(cases, rounds=rounds, seconds=seconds, single=not arguments.quick and not arguments.only)
    except (BenchError, LocalError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    partial = arguments.quick or bool(arguments.only)
    print(report.terminal(results, measured_only=partial))
    if not partial:
        print("wrote " + ", ".join(str(path) for path in report.write(results, arguments.docs)), file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(report.as_json(results))
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
