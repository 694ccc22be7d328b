"""`cache-builder verify`: check every stored byte of a cache."""

import sys
from collections.abc import Sequence

from cache_builder.commands.cache_parser import cache_parser, shard_bar
from storage_specs.command_line import parse


def run(arguments: Sequence[str]) -> int:
    """Print the report; exit code 2 where something is wrong."""
    parser = cache_parser("verify")
    parser.add_argument("--fast", action="store_true", help="compare sizes only; read no shard")
    namespace, _ = parse(parser, arguments)
    from storage_specs.verification import verify_cache

    with shard_bar("verify") as progress:
        report = verify_cache(namespace.cache, fast=namespace.fast, progress=progress)
    print(report, file=sys.stdout if report.ok else sys.stderr)
    return 0 if report.ok else 2
