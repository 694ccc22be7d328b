"""Writing a cache: the plan first, shards in any order, the manifest last. Rerunning resumes what was interrupted."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from storage_specs import row_coding
from storage_specs.column_building import columns_of
from storage_specs.document import CachedDocument
from storage_specs.errors import ConfigError, InvalidDocumentError
from storage_specs.finalization import finalize_cache
from storage_specs.generated import generation_record
from storage_specs.l1_errors import L1Errors
from storage_specs.plan import Plan
from storage_specs.planned_cache import PlannedCache
from storage_specs.settings import CacheSettings
from storage_specs.shard_names import stem_of
from storage_specs.shard_record import MAX_BYTES, ShardRecord, described
from storage_specs.stores import shard_store
from storage_specs.textless import stripped
from storage_specs.vocabulary_table import vocabulary_to_bytes

__all__ = ["CacheSettings", "CacheWriter", "finalize_cache"]

Encode = Callable[[int, Sequence[CachedDocument], CacheSettings, tuple[str, ...]], tuple[ShardRecord, dict[str, bytes]]]


class CacheWriter(PlannedCache):
    """Writes the cache of `plan` at `path` (a folder, or the URL of one), or resumes it there. Raises as its base."""

    def __init__(self, path: str | os.PathLike[str], settings: CacheSettings, plan: Plan) -> None:
        self.settings = settings
        vocabulary = None if settings.vocabulary is None else vocabulary_to_bytes(settings.vocabulary)
        super().__init__(path, settings.config, plan, vocabulary)

    def write_shard(
        self,
        shard: int,
        documents: Sequence[CachedDocument],
        drift: dict[str, Any] | None = None,
        encode: Encode | None = None,
    ) -> ShardRecord:
        """Write one shard, its record last. `documents`: those of the plan, in its order. drift: see `ShardRecord`.
        encode: what does the work of `encoded_shard`, perhaps elsewhere.

        Raises InvalidDocumentError before anything is written, ConfigError (no such shard, or a finished cache),
        CacheMismatchError (another build was faster to claim the place), StorageFullError (what was written of the
        shard is removed again).
        """
        if not 0 <= shard < len(self.plan.shards):
            raise ConfigError(f"shard {shard} is not in the plan, which has {len(self.plan.shards)}")
        record, contents = (encode or encoded_shard)(shard, documents, self.settings, self.plan.doc_ids_of(shard))
        record = replace(record, drift=drift)
        self.commit_shard(record, contents)
        return record


def encoded_shard(
    shard: int,
    documents: Sequence[CachedDocument],
    settings: CacheSettings,
    planned_ids: tuple[str, ...],
    replaces: tuple[str, ...] = (),
) -> tuple[ShardRecord, dict[str, bytes]]:
    """A shard's commit record and its other objects. planned_ids: what the plan lists for it, its documents or the
    prompts that they answer. replaces: the caches before this one, where it is a repair.

    Raises InvalidDocumentError: documents that break the format's rules, or are not those of the plan.
    """
    shape = settings.row_shape
    try:
        doc_ids = tuple(document.doc_id for document in documents)
        columns = columns_of(documents, shape)
        generation = None if settings.generation is None else generation_record(documents)
        if (doc_ids if generation is None else tuple(generation["prompt_ids"])) != planned_ids:
            raise ValueError("its documents are not those that the plan names")
        if not settings.text:
            columns = replace(columns, documents=tuple(map(stripped, documents)))
        stored_shard, l1_error_N = row_coding.encode(columns, shape)
        wanted = row_coding.arrays_of(shape, len(l1_error_N))
        contents = shard_store(settings.store).encode(stored_shard, wanted, stem_of(shard, len(replaces)))
    except (ValueError, TypeError) as error:  # TypeError: metadata that are no JSON
        raise InvalidDocumentError(f"shard {shard}: {error}; nothing was written") from error
    objects, parts = described(contents)
    record = ShardRecord(
        shard=shard,
        config_digest=settings.config_digest,
        doc_ids=doc_ids,
        document_rows=tuple(stored_shard.document_rows.tolist()),
        document_text_bytes=tuple(stored_shard.text_bytes.tolist()),
        end_rows=int(columns.is_end.sum()),
        unscored_bytes=sum(document.unscored_bytes for document in documents),
        l1_errors=L1Errors.of(l1_error_N),
        objects=objects,
        parts=parts,
        replaces=replaces,
        generation=generation,
    )
    if len(record.to_bytes()) > MAX_BYTES:
        raise InvalidDocumentError(
            f"shard {shard}: {len(documents)} documents are too many for one commit record; use smaller shards"
        )
    return record, {name: item.data for name, item in contents.items()}
