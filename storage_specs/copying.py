"""Copying a finished cache to another place, verified on the way, its manifest last: pushing it, or pulling it.

Either place may be a folder or an object store. Calling again after an interruption goes on; where the whole cache is
there already nothing is written.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from storage_specs import manifest as manifest_json
from storage_specs import plan, shard_table
from storage_specs.errors import CacheMismatchError, CorruptCacheError, OutputFolderError
from storage_specs.lease import lease
from storage_specs.manifest import Manifest, read_manifest
from storage_specs.object_roots import open_objects
from storage_specs.objects import Objects
from storage_specs.shard_table import ShardTable
from storage_specs.stored_object import StoredObject


@dataclass(frozen=True, kw_only=True)
class CopyReport:
    """The cache's manifest, and how many objects and bytes were written; the others were there, and verified."""

    manifest: Manifest
    objects: int
    written_objects: int
    written_bytes: int


def copy_cache(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
) -> CopyReport:
    """Copy a finished cache; at most one shard of it is in memory. `progress(done, all)`: in bytes, after every shard.

    Raises, of the source, what `open_cache` raises; of the target, OutputFolderError (it holds something else),
    CacheMismatchError (another cache, or another copy was faster), CacheInUseError, StorageFullError,
    StoreUnsupportedError.
    """
    there, here = open_objects(source), open_objects(target)
    manifest = read_manifest(there)
    table = shard_table.table_from_object(there.fetch(manifest.shards), manifest.counts["documents"])
    everything = sum(stored.size for group in _groups(manifest, table) for stored in group)
    with lease(here):
        sizes = dict(here.list())
        _check_target(here, manifest, sizes)
        objects = written = written_bytes = done = 0
        for group in _groups(manifest, table):
            wanted = [stored for stored in group if not _holds(here, stored, sizes.get(stored.name))]
            if wanted:
                contents = there.fetch_all(wanted)
                if plan.NAME in contents and not here.create(plan.NAME, contents[plan.NAME]):
                    raise CacheMismatchError(
                        f"{here.place}: another cache was begun here meanwhile; choose another place"
                    )
                here.write_all({name: data for name, data in contents.items() if name != plan.NAME})
                written, written_bytes = written + len(wanted), written_bytes + sum(stored.size for stored in wanted)
            objects, done = objects + len(group), done + sum(stored.size for stored in group)
            if progress is not None:
                progress(done, everything)
        if not here.create(manifest_json.NAME, there.fetch(manifest.stored)):
            raise CacheMismatchError(f"{here.place}: another cache was finished here meanwhile; choose another place")
        here.sweep()
    new = manifest_json.NAME not in sizes
    return CopyReport(
        manifest=manifest,
        objects=objects + 1,
        written_objects=written + new,
        written_bytes=written_bytes + new * manifest.stored.size,
    )


def _groups(manifest: Manifest, table: ShardTable) -> Iterator[Sequence[StoredObject]]:
    """All objects but the manifest, in the order in which they are written: the plan claims the place."""
    yield [manifest.plan]
    yield from table.objects
    yield [stored for stored in manifest.objects if stored != manifest.plan]


def _holds(objects: Objects, stored: StoredObject, size: int | None) -> bool:
    """Whether an object is there already, every byte of it."""
    try:
        return size == stored.size and objects.fetch(stored) is not None
    except CorruptCacheError:
        return False


def _check_target(objects: Objects, manifest: Manifest, sizes: dict[str, int]) -> None:
    """Raises unless the place is empty, or holds this cache or a part of it."""
    if manifest_json.NAME in sizes:
        other = read_manifest(objects)
        if other.cache_id != manifest.cache_id:
            raise CacheMismatchError(
                f"{objects.place} holds another cache ({other.cache_id}); it was left as it is: choose another place"
            )
    elif plan.NAME in sizes:
        if not _holds(objects, manifest.plan, sizes[plan.NAME]):
            raise CacheMismatchError(f"{objects.place} holds the beginning of another cache; choose another place")
    elif sizes:
        others = sorted(sizes)
        raise OutputFolderError(
            f"{objects.place} holds something else ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}); "
            "nothing was touched; choose an empty or new place"
        )
