"""`cache-builder inspect`: say what is in a cache, and what its columns cost."""

import json
import sys
from collections.abc import Sequence

from cache_builder.commands.cache_parser import cache_parser
from storage_specs.command_line import parse


def run(arguments: Sequence[str]) -> int:
    """Print the facts, for people or as JSON."""
    parser = cache_parser("inspect")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--rows", type=int, default=0, metavar="N", help="also show the first N rows of the first document"
    )
    namespace, _ = parse(parser, arguments)
    from cache_builder.inspection import describe, inspect, show_rows

    facts = inspect(namespace.cache)
    sys.stdout.write(json.dumps(facts, indent=2, ensure_ascii=False) + "\n" if namespace.json else describe(facts))
    if namespace.rows and not namespace.json:
        sys.stdout.write(show_rows(namespace.cache, namespace.rows))
    return 0
