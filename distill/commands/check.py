"""`distill check`: has quality fallen since a baseline? For jobs that run every night.

distill check --baseline last.json --report now.json --max-drop 1.0
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from storage_specs.command_line import Parser, parse


def check_parser() -> Parser:
    """The flags of `check`."""
    parser = Parser(
        prog="distill check",
        description="Compare two reports of `distill evaluate` over the same cache, task and settings, model by model "
        "and metric by metric. Exit codes: 0 nothing fell by more than --max_drop, 1 something did, 2 the reports "
        "cannot be compared.",
    )
    add = parser.add_argument
    add("--baseline", required=True, type=Path, metavar="FILE", help="the report that counts as good")
    add("--report", required=True, type=Path, metavar="FILE", help="the report to be judged")
    add(
        "--max_drop",
        type=_drop,
        default=1.0,
        metavar="D",
        help="how far a metric may fall: points of a percentage; of bits per byte and the like, percent of the "
        "baseline's (default: 1.0)",
    )
    return parser


def run(arguments: Sequence[str]) -> int:
    """Print a line for every metric; returns 1 where one fell too far. Raises EvaluationError."""
    namespace, _ = parse(check_parser(), arguments)
    from distill.evaluation.comparison import as_text, compared, unlike
    from distill.evaluation.report import read_report

    baseline, report = read_report(namespace.baseline), read_report(namespace.report)
    changes = compared(baseline, report, namespace.max_drop)
    if (why := unlike(baseline, report)) is not None:
        print(f"warning: {why}", file=sys.stderr)
    print(as_text(changes, namespace.max_drop))
    return int(any(change.failed for change in changes))


def _drop(text: str) -> float:
    """A number that is not negative."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text}: must not be negative")
    return value
