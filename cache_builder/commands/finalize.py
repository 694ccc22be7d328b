"""`cache-builder finalize`: write the manifest of a cache whose shards are all there."""

from collections.abc import Sequence

from cache_builder.commands.cache_parser import cache_parser
from storage_specs.command_line import parse


def run(arguments: Sequence[str]) -> int:
    """Finish the cache, and name it."""
    namespace, _ = parse(cache_parser("finalize"), arguments)
    from storage_specs.finalization import finalize_cache

    manifest = finalize_cache(namespace.cache)
    print(f"finished: {namespace.cache}, cache_id {manifest.cache_id}")
    return 0
