"""Finishing a cache: the shard table, then the manifest, which makes the folder a cache."""

import os
from collections.abc import Sequence
from typing import Any

from storage_specs import manifest as manifest_json
from storage_specs import plan, shard_table, vocabulary_table
from storage_specs.columns import RowShape
from storage_specs.document import HELD_OUT_RULE, is_held_out
from storage_specs.drift import worst_drift
from storage_specs.errors import (
    CacheMismatchError,
    IncompleteCacheError,
    MalformedObjectError,
    MissingObjectError,
    NotACacheError,
)
from storage_specs.l1_errors import L1Errors
from storage_specs.manifest import Manifest
from storage_specs.objects import Objects, open_objects
from storage_specs.sealed_json import digest_of
from storage_specs.shard_record import ShardRecord, verified_record
from storage_specs.stored_object import StoredObject

_RESUME = "run the same `cache-builder build` command again"


def finalize_cache(path: str | os.PathLike[str]) -> Manifest:
    """Finish the cache in a folder whose shards are all there; a finished one is left as it is.

    Every object is read and verified. Raises NotACacheError, IncompleteCacheError, CorruptCacheError's kinds.
    """
    objects = open_objects(path)
    finished = finished_manifest(objects)
    if finished is not None:
        return finished
    if objects.size(plan.NAME) is None:
        raise NotACacheError(f"{objects.place}: no cache here, and none begun: expected {plan.NAME}")
    planned, config = plan.plan_from_bytes(objects.read(plan.NAME))
    shards = range(len(planned.shards))
    records = [verified_record(objects, shard, digest_of(config), planned.doc_ids_of(shard)) for shard in shards]
    return commit(objects, config, planned, records)


def finished_manifest(objects: Objects) -> Manifest | None:
    """The manifest, if there is one; what it names is looked at by size. Raises CorruptCacheError's kinds."""
    if objects.size(manifest_json.NAME) is None:
        return None
    manifest = manifest_json.read_manifest(objects)
    for stored in manifest.objects:
        objects.check_size(stored)
    return manifest


def commit(
    objects: Objects, config: dict[str, Any], planned: plan.Plan, records: Sequence[ShardRecord | None]
) -> Manifest:
    """Write shards.parquet, documents.parquet and manifest.json of verified records, one per shard of the plan.

    None stands for a record that is missing. Raises IncompleteCacheError, CacheMismatchError (another builder wrote
    another manifest), StorageFullError.
    """
    missing = [shard for shard, record in enumerate(records) if record is None]
    if missing:
        raise IncompleteCacheError(
            f"{objects.place}: {len(missing)} of {len(records)} shards are missing or damaged (the first is number "
            f"{missing[0]}); {_RESUME}"
        )
    vocabulary = _vocabulary(objects, config)
    table, doc_ids = shard_table.table_to_object(records), shard_table.doc_ids_to_object(records)
    objects.write_all({shard_table.NAME: table, shard_table.DOCUMENTS_NAME: doc_ids})
    shape = row_shape_of(config)
    data = manifest_json.manifest_to_bytes(
        {
            **{name: config[name] for name in ("teacher", "tokenizer", "chat_template", "engine", "windows")},
            **{name: config[name] for name in ("k", "k_ids", "vocab_size", "store")},
            "corpus": {"digest": planned.corpus_digest, "documents": len(planned.doc_ids)},
            "codec": codec_facts(shape, records),
            "held_out": {"rule": HELD_OUT_RULE, "documents": sum(map(is_held_out, planned.doc_ids))},
            "drift": worst_drift(record.drift for record in records),
            "rank_edges": shape.rank_edges and list(shape.rank_edges),
            "counts": counts_of(records),
            "plan": StoredObject.of(plan.NAME, objects.read(plan.NAME)).to_json(),
            "shards": StoredObject.of(shard_table.NAME, table).to_json(),
            "documents": StoredObject.of(shard_table.DOCUMENTS_NAME, doc_ids).to_json(),
            "vocabulary": vocabulary and vocabulary.to_json(),
            "config_digest": digest_of(config),
        }
    )
    manifest = manifest_json.manifest_from_bytes(data)  # what is refused by readers is not written
    if not objects.create(manifest_json.NAME, data) and objects.read(manifest_json.NAME) != data:
        raise CacheMismatchError(
            f"{objects.place}: another builder finished this cache with other bytes; its manifest was left as it is"
        )
    objects.sweep()
    return manifest


def _vocabulary(objects: Objects, config: dict[str, Any]) -> StoredObject | None:
    """The vocabulary's object as it lies there, if it is the one that was planned."""
    if config["vocabulary_digest"] is None:
        return None
    try:
        data = objects.read(vocabulary_table.NAME)
        stored = vocabulary_table.vocabulary_from_bytes(data, config["vocab_size"])
    except MissingObjectError:
        raise MissingObjectError(f"{objects.place}: {vocabulary_table.NAME} is missing; {_RESUME}") from None
    except ValueError as error:
        raise MalformedObjectError(f"{objects.place}: {vocabulary_table.NAME}: {error}; {_RESUME}") from None
    if vocabulary_table.vocabulary_digest(stored) != config["vocabulary_digest"]:
        raise MalformedObjectError(f"{objects.place}: {vocabulary_table.NAME} is not the teacher's; {_RESUME}")
    return StoredObject.of(vocabulary_table.NAME, data)


def row_shape_of(config: dict[str, Any]) -> RowShape:
    """The shape of rows of a plan's `config`."""
    return RowShape(**{name: config[name] for name in ("k", "k_ids", "vocab_size", "profile", "parameters")})


def codec_facts(shape: RowShape, records: Sequence[ShardRecord]) -> dict[str, Any]:
    """The manifest's `codec`: which it is, the proven bound of its L1 error, and what was measured over all shards."""
    errors = L1Errors.merged(record.l1_errors for record in records)
    return {
        "profile": shape.profile,
        "parameters": shape.codec.parameters,
        "bound_l1_error": shape.codec.max_l1_error,
        "max_l1_error": errors.max,
        "p99_l1_error": errors.percentile(0.99),
        "mean_l1_error": errors.mean,
    }


def counts_of(records: Sequence[ShardRecord]) -> dict[str, int]:
    """The manifest's `counts` of all shards' records."""
    rows = [count for record in records for count in record.document_rows]
    return {
        "documents": len(rows),
        "rows": sum(rows),
        "end_rows": sum(record.end_rows for record in records),
        "empty_documents": rows.count(0),
        "text_bytes": sum(sum(record.document_text_bytes) for record in records),
        "unscored_bytes": sum(record.unscored_bytes for record in records),
    }
