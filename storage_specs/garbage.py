"""What lies in a cache's place and belongs to it no more: orphans of killed builds, and revisions that were replaced.

Removed is only what has a name that caches give, that neither manifest nor plan nor a commit record names, and that is
older than a grace period: a builder on another machine, of which nothing is known here, writes a shard's objects and
their record within minutes. Builders of this machine hold the cache's lease, and nothing is removed beside them.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from storage_specs import manifest as manifest_json
from storage_specs import plan as plan_json
from storage_specs import shard_table, vocabulary_table
from storage_specs.errors import ConfigError, CorruptCacheError, IncompleteCacheError
from storage_specs.lease import lease
from storage_specs.object_roots import open_objects
from storage_specs.objects import Objects
from storage_specs.revisions import record_revisions
from storage_specs.shard_record import read_record, record_name

DEFAULT_GRACE = 3600.0  # seconds
_REVISION = r"(\.r\d+)?"
_OURS = re.compile(
    rf"plan\.json|manifest{_REVISION}\.json|(shards|documents|vocabulary){_REVISION}\.parquet"
    rf"|shards/\d{{6,}}{_REVISION}\.(json|([a-z_]+\.)?parquet|zarr/.+)"
)


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """(name, bytes) each. removable: old enough. young: perhaps a builder's elsewhere. foreign: no cache's names."""

    removable: tuple[tuple[str, int], ...]
    young: tuple[tuple[str, int], ...]
    foreign: tuple[tuple[str, int], ...]


def collect_garbage(path: str | os.PathLike[str], *, grace: float = DEFAULT_GRACE, dry_run: bool = False) -> Garbage:
    """Find what belongs to the cache no more and, unless `dry_run`, remove it. grace: seconds.

    Raises NotACacheError, CacheInUseError (a process of this machine is writing it), CorruptCacheError's kinds (a
    damaged manifest or plan: nobody knows what is garbage), ConfigError, OutputFolderError.
    """
    if not grace >= 0:
        raise ConfigError(f"grace is {grace}, but must be seconds, 0 or more")
    objects = open_objects(path)
    if dry_run:
        return find_garbage(objects, grace)
    with lease(objects):
        garbage = find_garbage(objects, grace)
        for name, _ in garbage.removable:
            objects.delete(name)
        objects.sweep(grace)
        return garbage


def find_garbage(objects: Objects, grace: float) -> Garbage:
    """What would be removed. Raises as `collect_garbage`."""
    named = set(_named(objects))
    removable, young, foreign = list(objects.leftovers(grace)), [], []
    for name, size in sorted(objects.list()):
        if name in named:
            continue
        if not _OURS.fullmatch(name):
            foreign.append((name, size))
        elif (objects.age(name) or 0) < grace:
            young.append((name, size))
        else:
            removable.append((name, size))
    return Garbage(removable=tuple(removable), young=tuple(young), foreign=tuple(foreign))


def _named(objects: Objects) -> Iterator[str]:
    """Everything that belongs to the cache."""
    yield from (manifest_json.NAME, plan_json.NAME)
    try:
        manifest = manifest_json.read_manifest(objects)
    except IncompleteCacheError:
        yield from _named_by_plan(objects)
        return
    yield from (stored.name for stored in manifest.objects)
    table = shard_table.table_from_object(objects.fetch(manifest.shards), manifest.counts["documents"])
    for shard in range(len(table)):
        yield from (stored.name for stored in table.objects[shard])


def _named_by_plan(objects: Objects) -> Iterator[str]:
    """What an unfinished build goes on from: all records of planned shards, and the objects of those that are sound."""
    planned, _ = plan_json.plan_from_bytes(objects.read_within(plan_json.NAME, plan_json.MAX_BYTES))
    for shard, revisions in record_revisions(objects).items():
        for revision in revisions if shard < len(planned.shards) else ():
            yield record_name(shard, revision)
            yield vocabulary_table.name_of(revision)
            try:
                yield from (stored.name for stored in read_record(objects, shard, revision).objects)
            except CorruptCacheError:
                continue
    yield vocabulary_table.name_of(0)
