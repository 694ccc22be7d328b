"""A cache in the other store: the same documents, rows and shards, bit for bit.

Nothing in the new cache says where it came from: a cache is what it holds, so converting there and back gives the very
objects and the very `cache_id` of the beginning (of a repaired cache: those of one that was never damaged).
"""

import os
from collections.abc import Callable
from dataclasses import replace

from storage_specs.errors import ConfigError
from storage_specs.lease import lease
from storage_specs.manifest import Manifest
from storage_specs.merging import Source
from storage_specs.planned_cache import PlannedCache
from storage_specs.shard_names import stem_of
from storage_specs.shard_record import described
from storage_specs.stored_shard import Selection
from storage_specs.stores import STORES, shard_store


def convert_cache(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    store: str,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write the cache at `path` into `output` in the store `store`; the same call resumes.

    `progress(done, all)`: called after every shard. Raises ConfigError (an unknown store, or its own), and what
    `open_cache`, reading and `PlannedCache` raise.
    """
    if store not in STORES:
        raise ConfigError(f"store is {store!r}, but must be {' or '.join(STORES)}")
    source = Source.at(path)
    if store == source.config["store"]:
        raise ConfigError(f"{path} is of the {store} store already; nothing was written")
    converted = PlannedCache(output, source.config | {"store": store}, source.plan, source.vocabulary)
    with lease(converted.objects):
        missing, shards = set(converted.missing_shards()), len(source.plan.shards)
        for shard in range(shards):
            if shard in missing:
                reader = source.cache.reader
                everything = Selection.everything(source.cache.table.size_of(shard))
                stored_shard = reader.stored_shard(shard, reader.stored(shard), everything)
                contents = shard_store(store).encode(stored_shard, reader.arrays_of(shard), stem_of(shard))
                objects, parts = described(contents)
                record = replace(
                    source.record(shard),
                    config_digest=converted.config_digest,
                    objects=objects,
                    parts=parts,
                    replaces=(),
                )
                converted.commit_shard(record, {name: item.data for name, item in contents.items()})
            if progress is not None:
                progress(shard + 1, shards)
        return converted.finalize()
