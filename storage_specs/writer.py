"""Writing a cache: the plan first, shards in any order, the manifest last. Rerunning resumes what was interrupted."""

import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import Any

from storage_specs import plan as plan_json
from storage_specs import row_coding, shard_table, vocabulary_table
from storage_specs.column_building import columns_of
from storage_specs.document import CachedDocument
from storage_specs.errors import (
    CacheMismatchError,
    ConfigError,
    IncompleteCacheError,
    InvalidDocumentError,
    OutputFolderError,
    StorageFullError,
)
from storage_specs.finalization import commit, finalize_cache, finished_manifest
from storage_specs.l1_errors import L1Errors
from storage_specs.local_objects import writing
from storage_specs.manifest import Manifest
from storage_specs.objects import open_objects
from storage_specs.plan import Plan, differences, plan_from_bytes, plan_to_bytes
from storage_specs.settings import CacheSettings
from storage_specs.shard_record import ShardRecord, described, verified_record
from storage_specs.stores import shard_store, stem_of

__all__ = ["CacheSettings", "CacheWriter", "finalize_cache"]


class CacheWriter:
    """Writes the cache of `plan` at `path` (a folder, or the URL of one), or resumes it there.

    The constructor writes plan.json and the vocabulary, or checks that those in the folder are the same, and removes
    what killed writers left. Raises OutputFolderError (the folder holds something else), CacheMismatchError (a cache of
    other settings or documents), CorruptCacheError's kinds, StorageFullError.
    """

    def __init__(self, path: str | os.PathLike[str], settings: CacheSettings, plan: Plan) -> None:
        self.objects = open_objects(path)
        self.settings, self.plan = settings, plan
        self.config_digest = settings.config_digest
        self._records: dict[int, ShardRecord] = {}
        with writing(self.objects.root):  # looking into a folder may be refused, too
            self._claim()
            self.objects.sweep()
        if settings.vocabulary is not None and self.manifest is None:
            self.objects.write_all({vocabulary_table.NAME: vocabulary_table.vocabulary_to_bytes(settings.vocabulary)})

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of a finished cache, None before. Raises CorruptCacheError's kinds."""
        return finished_manifest(self.objects)

    def missing_shards(self) -> list[int]:
        """Shards still to be written: those without a record, or with an object that does not verify (all are read).

        A finished cache has none, and its objects are only looked at by size; `verify_cache` reads them. Raises
        CorruptCacheError's kinds where a finished cache has lost an object.
        """
        finished = self.manifest
        if finished is not None:
            table = shard_table.table_from_object(self.objects.fetch(finished.shards))
            for stored in chain.from_iterable(table.objects):
                self.objects.check_size(stored)
            return []
        missing = []
        for shard in range(len(self.plan.shards)):
            record = self._records.get(shard) or verified_record(
                self.objects, shard, self.config_digest, self.plan.doc_ids_of(shard)
            )
            if record is None:
                missing.append(shard)
            else:
                self._records[shard] = record
        return missing

    def write_shard(
        self, shard: int, documents: Sequence[CachedDocument], drift: dict[str, Any] | None = None
    ) -> ShardRecord:
        """Write one shard, its record last. `documents`: those of the plan, in its order. drift: see `ShardRecord`.

        Raises InvalidDocumentError before anything is written, ConfigError (no such shard, or a finished cache),
        StorageFullError (what was written of the shard is removed again).
        """
        if not 0 <= shard < len(self.plan.shards):
            raise ConfigError(f"shard {shard} is not in the plan, which has {len(self.plan.shards)}")
        if self.manifest is not None:
            raise ConfigError(f"{self.objects.place} is finished; a finished cache is never written to")
        try:
            shape, doc_ids = self.settings.row_shape, tuple(document.doc_id for document in documents)
            columns = columns_of(documents, shape)
            if doc_ids != self.plan.doc_ids_of(shard):
                raise ValueError("its documents are not those that the plan names")
            stored_shard, l1_error_N = row_coding.encode(columns, shape)
            wanted = row_coding.arrays_of(shape, len(l1_error_N))
            contents = shard_store(self.settings.store).encode(stored_shard, wanted, stem_of(shard))
        except (ValueError, TypeError) as error:  # TypeError: metadata that are no JSON
            raise InvalidDocumentError(f"shard {shard}: {error}; nothing was written") from error
        objects, parts = described(contents)
        record = ShardRecord(
            shard=shard,
            config_digest=self.config_digest,
            doc_ids=doc_ids,
            document_rows=tuple(stored_shard.document_rows.tolist()),
            document_text_bytes=tuple(stored_shard.text_bytes.tolist()),
            end_rows=int(columns.is_end.sum()),
            unscored_bytes=sum(document.unscored_bytes for document in documents),
            l1_errors=L1Errors.of(l1_error_N),
            objects=objects,
            parts=parts,
            drift=drift,
        )
        self._records.pop(shard, None)
        self.objects.delete(record.name)  # from here on the shard counts as missing, until its new record stands
        try:
            self.objects.write_all({name: item.data for name, item in contents.items()})
            self.objects.write_all({record.name: record.to_bytes()})
        except StorageFullError:
            for name in contents:
                with suppress(OSError):  # what cannot be removed is overwritten on resuming
                    self.objects.delete(name)
            raise
        self._records[shard] = record
        return record

    def finalize(self) -> Manifest:
        """Write shards.parquet and, last of all, manifest.json; a finished cache is left as it is.

        Raises IncompleteCacheError, CacheMismatchError (another builder finished it with other bytes).
        """
        finished = self.manifest
        if finished is not None:
            return finished
        missing = self.missing_shards()
        if missing:
            raise IncompleteCacheError(
                f"{self.objects.place}: {len(missing)} of {len(self.plan.shards)} shards are missing "
                f"(the first is {missing[0]}); run the same `cache-builder build` command again"
            )
        records = [self._records[shard] for shard in range(len(self.plan.shards))]
        return commit(self.objects, self.settings.config, self.plan, records)

    def _claim(self) -> None:
        """Make the folder ours: create plan.json, or find our own there."""
        place, ours = self.objects.place, plan_to_bytes(self.plan, self.settings.config)
        if self.objects.size(plan_json.NAME) is None:
            others = [name for name, _ in islice(self.objects.list(), 4)]
            if others:
                raise OutputFolderError(
                    f"{place} holds something else ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}); "
                    "nothing was touched; choose an empty or new output folder"
                )
        if self.objects.create(plan_json.NAME, ours):
            return
        theirs = self.objects.read(plan_json.NAME)
        if theirs != ours:
            plan, config = plan_from_bytes(theirs, f"{place}/{plan_json.NAME}")
            differing = differences(plan, config, self.plan, self.settings.config)
            raise CacheMismatchError(
                f"{place} holds a cache of another build: {differing}; "
                "use the same settings to resume it, or choose another output folder"
            )
