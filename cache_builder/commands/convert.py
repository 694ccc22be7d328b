"""`cache-builder convert`: the same cache in the other store."""

from collections.abc import Sequence

from cache_builder.commands.cache_parser import cache_parser, shard_bar
from storage_specs.command_line import Parser, parse


def parser() -> Parser:
    """The flags of `convert`."""
    flags = cache_parser("convert")
    flags.add_argument("--store", required=True, metavar="NAME", help="zarr | arrow")
    flags.add_argument("--output", required=True, metavar="PLACE", help="the new cache's folder or URL")
    return flags


def run(arguments: Sequence[str]) -> int:
    """Convert, and name the result."""
    namespace, _ = parse(parser(), arguments)
    from storage_specs.conversion import convert_cache

    with shard_bar("convert") as progress:
        manifest = convert_cache(namespace.cache, namespace.output, namespace.store, progress)
    print(f"{namespace.output}: {manifest.store} store, cache_id {manifest.cache_id}")
    return 0
