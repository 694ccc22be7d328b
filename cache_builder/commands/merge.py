"""`cache-builder merge`: many caches of one teacher become one."""

from collections.abc import Sequence

from cache_builder.commands import SUMMARY
from cache_builder.commands.cache_parser import shard_bar
from storage_specs.command_line import Parser, parse


def parser() -> Parser:
    """The flags of `merge`."""
    flags = Parser(prog="cache-builder merge", description=SUMMARY["merge"].capitalize() + ".")
    flags.add_argument("caches", nargs="+", metavar="CACHE", help="finished caches, in the order of the new one")
    flags.add_argument("--output", required=True, metavar="PLACE", help="the merged cache's folder or URL")
    flags.add_argument("--keep_duplicates", action="store_true", help="keep a document that several caches hold")
    return flags


def run(arguments: Sequence[str]) -> int:
    """Merge, and name the result."""
    namespace, _ = parse(parser(), arguments)
    from storage_specs.merging import merge_caches

    with shard_bar("merge") as progress:
        manifest = merge_caches(
            namespace.caches, namespace.output, keep_duplicates=namespace.keep_duplicates, progress=progress
        )
    print(f"{namespace.output}: {manifest.counts['documents']:,} documents, cache_id {manifest.cache_id}")
    return 0
