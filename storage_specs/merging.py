"""Shards of finished caches taken over into another: many caches of one teacher become one, or one gets more documents.

Shards keep their documents and bytes; numbers, names and commit records are new. Within one file system they are hard
links, so a merged cache costs no space and outlives the caches that it was made of.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from storage_specs import plan as plan_json
from storage_specs.errors import CacheMismatchError, ConfigError
from storage_specs.lease import lease
from storage_specs.manifest import Manifest
from storage_specs.object_roots import open_objects
from storage_specs.objects import Objects
from storage_specs.plan import Plan, config_differences
from storage_specs.planned_cache import PlannedCache
from storage_specs.reader import Cache, open_cache
from storage_specs.shard_names import stem_of
from storage_specs.shard_record import ShardRecord
from storage_specs.stored_object import remedy_at


@dataclass(frozen=True, kw_only=True)
class Source:
    """A finished cache that others take shards from, with the plan and the settings that it was built by."""

    cache: Cache
    objects: Objects
    plan: Plan
    config: dict[str, Any]

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> "Source":
        """Raises what `open_cache` raises, and CorruptCacheError's kinds."""
        cache, objects = open_cache(path), open_objects(path)
        plan, config = plan_json.plan_from_bytes(objects.fetch(cache.manifest.plan), f"{path}/{plan_json.NAME}")
        return cls(cache=cache, objects=objects, plan=plan, config=config)

    @property
    def vocabulary(self) -> bytes | None:
        """The bytes of vocabulary.parquet, verified; None where no ids are kept."""
        stored = self.cache.manifest.vocabulary
        return None if stored is None else self.objects.fetch(stored)

    def record(self, shard: int) -> ShardRecord:
        """A shard's commit record, held against the shard table."""
        stored = self.cache.table.objects[shard][-1]
        return ShardRecord.from_bytes(self.objects.fetch(stored), stored.name, remedy_at(self.objects.place))


def merge_caches(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    keep_duplicates: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """One cache of all documents of several, in the order given; the same call resumes.

    A document that two of the caches hold is refused unless `keep_duplicates`. `progress(done, all)`: called after
    every shard. Raises CacheMismatchError (other teachers or settings, or duplicates), ConfigError, and what
    `open_cache` and `PlannedCache` raise.
    """
    if len(paths) < 2:
        raise ConfigError(f"merge takes two caches or more, found {len(paths)}")
    sources = [Source.at(path) for path in paths]
    config = common_config([(str(source.cache.path), source.config) for source in sources])
    if not keep_duplicates:
        _refuse_duplicates(sources)
    merged = PlannedCache(output, config, joined_plans([source.plan for source in sources]), sources[0].vocabulary)
    with lease(merged.objects):
        missing = set(merged.missing_shards())
        shard, shards = 0, len(merged.plan.shards)
        for source in sources:
            for number in range(len(source.plan.shards)):
                if shard in missing:
                    take_over(merged, shard, source, number)
                shard += 1
                if progress is not None:
                    progress(shard, shards)
        return merged.finalize()


def take_over(target: PlannedCache, shard: int, source: Source, number: int) -> None:
    """Make shard `number` of a source the shard `shard` of a cache in the making. Raises as `link_shard`."""
    old_stem, new_stem = source.cache.table.stem_of(number), stem_of(shard)
    record = source.record(number)
    names = {new_stem + stored.name.removeprefix(old_stem): stored for stored in record.objects}
    parts = {new_stem + name.removeprefix(old_stem): parts for name, parts in record.parts.items()}
    renamed = replace(
        record,
        shard=shard,
        config_digest=target.config_digest,
        objects=tuple(replace(stored, name=name) for name, stored in names.items()),
        parts=parts,
        replaces=(),
    )
    target.link_shard(renamed, source.objects, names)


def common_config(configs: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The settings that caches have in common; configs: (place, settings) of each. A corpus without chats has no chat
    template, and goes with any. Raises CacheMismatchError naming the setting that differs.
    """
    place, first = configs[0]
    template = next((config["chat_template"] for _, config in configs if config["chat_template"] is not None), None)
    common = first | {"chat_template": template}
    for other_place, config in configs:
        own = common if config["chat_template"] is not None else common | {"chat_template": None}
        differing = config_differences(own, config)
        if differing:
            raise CacheMismatchError(
                f"{place} and {other_place} do not go together: {differing}; one cache has one teacher and one set of "
                "settings (`cache-builder convert` changes the store)"
            )
    return common


def joined_plans(plans: Sequence[Plan]) -> Plan:
    """All documents of several plans, one after the other, in the shards that they have."""
    shards: list[range] = []
    for plan in plans:
        start = shards[-1].stop if shards else 0
        shards += [range(shard.start + start, shard.stop + start) for shard in plan.shards]
    return Plan(doc_ids=tuple(doc_id for plan in plans for doc_id in plan.doc_ids), shards=tuple(shards))


def _refuse_duplicates(sources: Sequence[Source]) -> None:
    places: dict[str, str] = {}
    for source in sources:
        place, doc_ids = str(source.cache.path), set(source.cache.doc_ids)
        twice = sorted(doc_ids & places.keys())
        if twice:
            raise CacheMismatchError(
                f"{place} holds {len(twice)} documents that {places[twice[0]]} holds, too (the first is {twice[0]}): "
                "leave them out, or pass --keep_duplicates to have students learn them twice"
            )
        places |= dict.fromkeys(doc_ids, place)
