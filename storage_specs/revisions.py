"""Revisions: what a repair writes has names of its own, so that nothing that a manifest names is ever overwritten.

The n-th repair of a cache writes `shards/000003.rN.json`, `shards.rN.parquet`, ... beside what was there. `replaces` in
records and manifest lists the cache_ids of all predecessors, so its length is the revision.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from storage_specs.errors import CacheMismatchError
from storage_specs.objects import Objects
from storage_specs.shard_record import ShardRecord, verified_record

_RECORD = re.compile(r"shards/(\d{6,})(?:\.r([1-9]\d*))?\.json")


def record_revisions(objects: Objects) -> dict[int, list[int]]:
    """{shard: revisions of its commit records, the newest first}, by their names alone."""
    found: defaultdict[int, list[int]] = defaultdict(list)
    for name, _ in objects.list("shards/"):
        match = _RECORD.fullmatch(name)
        if match:
            found[int(match[1])].append(int(match[2] or 0))
    return {shard: sorted(numbers, reverse=True) for shard, numbers in found.items()}


def newest_record(
    objects: Objects, shard: int, config_digest: str, doc_ids: tuple[str, ...] | None, revisions: Iterable[int]
) -> ShardRecord | None:
    """The shard's record of the first of these revisions that verifies with all its objects, or None."""
    records = (verified_record(objects, shard, config_digest, doc_ids, number) for number in revisions)
    return next(filter(None, records), None)


def replaced_by(records: Sequence[ShardRecord]) -> tuple[str, ...]:
    """The predecessors of a cache with these records. Raises CacheMismatchError where they do not form one line."""
    longest = max((record.replaces for record in records), key=len, default=())
    for record in records:
        if record.replaces != longest[: len(record.replaces)]:
            raise CacheMismatchError(
                f"{record.name} comes from another line of repairs than the other shards; run `cache-builder repair`"
            )
    return longest
