"""`distill bench WHAT ...`: measures on the user's own machine and cache.

distill bench reader my-cache [--json]
"""

import json
from collections.abc import Sequence
from dataclasses import asdict

from distill.commands.flags import count
from storage_specs.command_line import Parser, parse

WHATS = ("reader",)


def bench_parser() -> Parser:
    """The flags of `bench`."""
    parser = Parser(
        prog="distill bench",
        description="reader: how fast a cache is read here: decoding, checking, one document with its shard cold.",
    )
    add = parser.add_argument
    add("what", choices=WHATS, metavar="WHAT", help="reader")
    add("cache", metavar="CACHE", help="a finished cache: folder or URL (s3://, gs://, az://, hf://)")
    add("--no_ids", action="store_true", help="leave the ids' objects unread")
    add("--repeats", type=count, default=5, metavar="N", help="readings of every rate (default: 5)")
    add("--documents", type=count, default=50, metavar="N", help="documents read one by one (default: 50)")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code. Raises ConfigError, and what reading a cache raises."""
    namespace, _ = parse(bench_parser(), arguments)
    from distill.reader_benchmark import as_text, bench_reader

    figures = bench_reader(
        namespace.cache, ids=not namespace.no_ids, repeats=namespace.repeats, documents=namespace.documents
    )
    print(json.dumps(asdict(figures), indent=2) if namespace.json else as_text(figures))
    return 0
