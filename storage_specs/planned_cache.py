"""A cache in the making: a plan, the shards that are there, and at last the manifest. Rerunning resumes.

What fills the shards is somebody else's business: `writer` encodes documents, `merging` links shards of other caches.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import Any

from storage_specs import manifest as manifest_json
from storage_specs import plan as plan_json
from storage_specs import shard_table, vocabulary_table
from storage_specs.errors import (
    CacheMismatchError,
    ConfigError,
    CorruptCacheError,
    IncompleteCacheError,
    OutputFolderError,
    StorageFullError,
)
from storage_specs.finalization import commit, finished_manifest
from storage_specs.lease import commit_turn
from storage_specs.local_objects import writing
from storage_specs.manifest import Manifest
from storage_specs.object_roots import open_objects
from storage_specs.objects import Objects
from storage_specs.plan import Plan, differences, plan_from_bytes, plan_to_bytes
from storage_specs.revisions import newest_record, record_revisions
from storage_specs.sealed_json import digest_of
from storage_specs.shard_record import ShardRecord
from storage_specs.stored_object import StoredObject


class PlannedCache:
    """The cache of `plan` and `config` (`CacheSettings.config`) at `path`, a folder or the URL of one.

    The constructor looks whether the place is empty or holds this very build, and removes what killed writers left.
    The place is claimed, by plan.json, only with the first shard: a teacher that cannot be loaded leaves nothing that
    would refuse another. vocabulary: the bytes of vocabulary.parquet, None where no ids are kept. Raises
    OutputFolderError (the folder holds something else), CacheMismatchError (a cache of other settings or documents),
    CorruptCacheError's kinds, StorageFullError.
    """

    def __init__(
        self, path: str | os.PathLike[str], config: dict[str, Any], plan: Plan, vocabulary: bytes | None
    ) -> None:
        self.objects = open_objects(path)
        self.config, self.plan = config, plan
        self.config_digest = digest_of(config)
        self._vocabulary = vocabulary
        self._records: dict[int, ShardRecord] = {}
        self._claimed = False
        with writing(self.objects.root):  # looking into a folder may be refused, too
            _check_root(self.objects)
            self._check_plan()
            self.objects.sweep()
        self._was_finished = self.manifest is not None

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of a finished cache, None before. Raises CorruptCacheError's kinds."""
        return finished_manifest(self.objects)

    def absent_shards(self) -> int:
        """How many shards have no record; nothing is read, so that a shard that has one may still be damaged."""
        return len(set(range(len(self.plan.shards))) - record_revisions(self.objects).keys())

    def missing_shards(self, among: Iterable[int] | None = None) -> list[int]:
        """Shards still to be written: those without a record, or with an object that does not verify (all are read).

        `among`: only these shards are looked at. A finished cache has none, and its objects are only looked at by size;
        `verify_cache` reads them. Raises CorruptCacheError's kinds where a finished cache has lost an object.
        """
        finished = self.manifest
        if finished is not None:
            table = shard_table.table_from_object(self.objects.fetch(finished.shards), finished.counts["documents"])
            sizes = dict(self.objects.list())
            for stored in chain.from_iterable(table.objects):
                self.objects.check_size(stored, sizes)
            return []
        among = range(len(self.plan.shards)) if among is None else among
        return self._unrecorded(among, record_revisions(self.objects))

    def _unrecorded(self, among: Iterable[int], revisions: Mapping[int, Sequence[int]]) -> list[int]:
        """Those shards of `among` that have no record, of these revisions of theirs, whose objects all verify; what has
        one is kept in `_records`."""
        missing = []
        for shard in among:
            record = self._records.get(shard) or newest_record(
                self.objects, shard, self.config_digest, self.plan.doc_ids_of(shard), revisions.get(shard, ())
            )
            if record is None:
                missing.append(shard)
            else:
                self._records[shard] = record
        return missing

    def claim(self) -> None:
        """Make the place ours: create plan.json and the vocabulary, or find our own plan there. CacheMismatchError."""
        if self._claimed:
            return
        if not self.objects.create(plan_json.NAME, plan_to_bytes(self.plan, self.config)):
            self._check_plan()
        if self._vocabulary is not None:
            self.objects.write_all({vocabulary_table.NAME: self._vocabulary})
        self._claimed = True

    def commit_shard(self, record: ShardRecord, contents: Mapping[str, bytes]) -> None:
        """Write one shard's objects, its record last; a shard that another worker wrote meanwhile stays as it is.

        Raises ConfigError (a finished cache), CacheMismatchError, StorageFullError (what was written of the shard is
        removed again).
        """
        self._check_open(record.shard, finished=self._was_finished)
        with self.objects.staged(contents) as publish:  # beside others: only names are given in our turn
            self._commit(record, contents, publish)

    def link_shard(self, record: ShardRecord, source: Objects, names: Mapping[str, StoredObject]) -> None:
        """Take over one shard's objects from another cache: {name here: the object there}. Raises as `commit_shard`."""
        self._commit(record, names, lambda: self.objects.link_all(source, names))

    def finalize(self) -> Manifest:
        """Write shards.parquet and, last of all, manifest.json; a finished cache is left as it is.

        Raises IncompleteCacheError, CacheMismatchError (another builder finished it with other bytes).
        """
        with commit_turn(self.objects):
            finished = self.manifest  # looked for in our turn: another builder may have finished it in the turn before
            if finished is not None:
                return finished
            self._check_records()
            missing = self._unrecorded(range(len(self.plan.shards)), record_revisions(self.objects))
            if missing:
                raise IncompleteCacheError(
                    f"{self.objects.place}: {len(missing)} of {len(self.plan.shards)} shards are missing "
                    f"(the first is {missing[0]}); run the same command again"
                )
            self.claim()
            records = [self._records[shard] for shard in range(len(self.plan.shards))]
            return commit(self.objects, self.config, self.plan, records)

    def _commit(self, record: ShardRecord, names: Iterable[str], write: Callable[[], None]) -> None:
        with commit_turn(self.objects):
            if self._written_meanwhile(record.shard):
                return
            self._make_room(record)
            try:
                write()
                self._keep(record)
            except StorageFullError:
                self._remove(names)
                raise

    def _written_meanwhile(self, shard: int) -> bool:
        """Whether a shard that was missing stands now, with a record of this build that verifies.

        Only its first record is looked for: later ones are repairs', of finished caches. To list what is there would
        make every commit slower than the one before.
        """
        if self._was_finished or shard in self._records or not 0 <= shard < len(self.plan.shards):
            return False
        if self.manifest is not None:
            return not self.missing_shards([shard])
        return not self._unrecorded([shard], {shard: [0]})

    def _check_open(self, shard: int, *, finished: bool) -> None:
        if not 0 <= shard < len(self.plan.shards):
            raise ConfigError(f"shard {shard} is not in the plan, which has {len(self.plan.shards)}")
        if finished:
            raise ConfigError(f"{self.objects.place} is finished; a finished cache is never written to")

    def _make_room(self, record: ShardRecord) -> None:
        self._check_open(record.shard, finished=self.manifest is not None)
        self.claim()
        self._records.pop(record.shard, None)
        self.objects.delete(record.name)  # from here on the shard counts as missing, until its new record stands

    def _keep(self, record: ShardRecord) -> None:
        self.objects.write_all({record.name: record.to_bytes()})
        self._records[record.shard] = record

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(OSError):  # what cannot be removed is overwritten on resuming
                self.objects.delete(name)

    def _check_records(self) -> None:
        """Believe none of our records where one is no longer what stands there: another builder came in between."""
        ours = [StoredObject.of(record.name, record.to_bytes()) for record in self._records.values()]
        try:
            self.objects.fetch_all(ours)
        except CorruptCacheError:
            self._records.clear()

    def _check_plan(self) -> None:
        """Raises where the place holds something else than this build."""
        objects, root = self.objects, self.objects.place
        if objects.size(plan_json.NAME) is None:
            others = [name for name, _ in islice(objects.list(), 4)]
            if others:
                if objects.size(plan_json.NAME) is not None:  # a worker of the same build has just claimed the place
                    return self._check_plan()
                some = f"{', '.join(sorted(others)[:3])}{', ...' if len(others) > 3 else ''}"
                raise OutputFolderError(
                    f"{root} holds something else ({some}); nothing was touched; choose an empty or new output folder"
                )
            return
        theirs = objects.read_within(plan_json.NAME, plan_json.MAX_BYTES)
        if theirs != plan_to_bytes(self.plan, self.config):
            plan, config = plan_from_bytes(theirs, f"{root}/{plan_json.NAME}")
            raise CacheMismatchError(
                f"{root} holds a cache of another build: {differences(plan, config, self.plan, self.config)}; "
                "use the same settings to resume it, or choose another output folder"
            )


def _check_root(objects: Objects) -> None:
    """Raises OutputFolderError where a folder cannot be made or written to: better now than after the first shard."""
    root = objects.root
    if isinstance(root, str):
        return
    if root.exists() and not root.is_dir():
        raise OutputFolderError(f"{root} is a file, not a folder; choose another output folder")
    root.mkdir(parents=True, exist_ok=True)
    if objects.size(manifest_json.NAME) is None and not os.access(root, os.W_OK | os.X_OK):
        raise OutputFolderError(f"{root}: cannot be written; make it writable, or choose another output folder")
