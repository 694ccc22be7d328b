"""Finishing a cache: the shard table, then the manifest, which makes the folder a cache."""

import os
from collections.abc import Sequence
from typing import Any

from storage_specs import manifest as manifest_json
from storage_specs import plan, shard_table, vocabulary_table
from storage_specs.columns import RowShape
from storage_specs.document import HELD_OUT_RULE, HELD_OUT_RULE_OF_GENERATED, is_held_out
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
from storage_specs.object_roots import open_objects
from storage_specs.objects import Objects
from storage_specs.revisions import newest_record, record_revisions, replaced_by
from storage_specs.sealed_json import digest_of
from storage_specs.shard_record import ShardRecord
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
    planned, config = plan.plan_from_bytes(objects.read_within(plan.NAME, plan.MAX_BYTES))
    return commit(objects, config, planned, verified_records(objects, config, planned))


def verified_records(objects: Objects, config: dict[str, Any], planned: plan.Plan) -> list[ShardRecord | None]:
    """For each shard of the plan its newest record that verifies with all its objects (all are read), or None."""
    revisions, digest = record_revisions(objects), digest_of(config)
    return [
        newest_record(objects, shard, digest, planned.doc_ids_of(shard), revisions.get(shard, ()))
        for shard in range(len(planned.shards))
    ]


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
    data = manifest_bytes(objects, config, planned, records)
    if not objects.create(manifest_json.NAME, data):
        raise CacheMismatchError(
            f"{objects.place}: another builder finished this cache with other bytes; its manifest was left as it is"
        )
    objects.sweep()
    return manifest_json.manifest_from_bytes(data)


def manifest_bytes(
    objects: Objects,
    config: dict[str, Any],
    planned: plan.Plan,
    records: Sequence[ShardRecord | None],
    replaces: tuple[str, ...] | None = None,
) -> bytes:
    """Write the shard table and return manifest.json. `replaces`: what the records say where it is not given.

    Raises IncompleteCacheError, CorruptCacheError's kinds (the vocabulary), StorageFullError.
    """
    missing = [shard for shard, record in enumerate(records) if record is None]
    if missing:
        raise IncompleteCacheError(
            f"{objects.place}: {len(missing)} of {len(records)} shards are missing or damaged (the first is number "
            f"{missing[0]}); {_RESUME}"
        )
    replaces = replaced_by(records) if replaces is None else replaces
    vocabulary, shape = _vocabulary(objects, config, len(replaces)), row_shape_of(config)
    table_name, table = shard_table.name_of(len(replaces)), shard_table.table_to_object(records)
    ids_name, doc_ids = shard_table.documents_name_of(len(replaces)), shard_table.doc_ids_to_object(records)
    objects.write_all({table_name: table, ids_name: doc_ids})
    data = manifest_json.manifest_to_bytes(
        {
            **{name: config[name] for name in ("teacher", "tokenizer", "chat_template", "engine", "windows")},
            **{name: config[name] for name in ("k", "k_ids", "vocab_size", "store", "text")},
            "corpus": {"digest": planned.corpus_digest, "documents": len(planned.doc_ids)},
            "codec": codec_facts(shape, records),
            "held_out": {
                "rule": HELD_OUT_RULE if config["generation"] is None else HELD_OUT_RULE_OF_GENERATED,
                "documents": sum(is_held_out(planned) for record in records for planned in record.planned_ids),
            },
            "drift": worst_drift(record.drift for record in records),
            "rank_edges": shape.rank_edges and list(shape.rank_edges),
            "counts": counts_of(records),
            "plan": StoredObject.of(plan.NAME, objects.read_within(plan.NAME, plan.MAX_BYTES)).to_json(),
            "shards": StoredObject.of(table_name, table).to_json(),
            "documents": StoredObject.of(ids_name, doc_ids).to_json(),
            "vocabulary": vocabulary and vocabulary.to_json(),
            "config_digest": digest_of(config),
            "replaces": list(replaces),
            "generation": generation_of(config, records),
        }
    )
    manifest_json.manifest_from_bytes(data)  # what is refused by readers is not written
    return data


def _vocabulary(objects: Objects, config: dict[str, Any], revision: int) -> StoredObject | None:
    """The newest vocabulary as it lies there, if it is the one that was planned."""
    if config["vocabulary_digest"] is None:
        return None
    names = [vocabulary_table.name_of(number) for number in range(revision, -1, -1)]
    name = next((name for name in names if objects.size(name) is not None), names[-1])
    try:
        data = objects.read_within(name, manifest_json.MAX_OBJECT_BYTES)
        stored = vocabulary_table.vocabulary_from_bytes(data, config["vocab_size"])
    except MissingObjectError:
        raise MissingObjectError(f"{objects.place}: {name} is missing; {_RESUME}") from None
    except ValueError as error:
        raise MalformedObjectError(f"{objects.place}: {name}: {error}; {_RESUME}") from None
    if vocabulary_table.vocabulary_digest(stored) != config["vocabulary_digest"]:
        raise MalformedObjectError(f"{objects.place}: {name} is not the teacher's; {_RESUME}")
    return StoredObject.of(name, data)


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


def generation_of(config: dict[str, Any], records: Sequence[ShardRecord]) -> dict[str, Any] | None:
    """The manifest's `generation`: the settings and what all shards' records count."""
    if config["generation"] is None:
        return None
    return {**config["generation"], "refused": sum((record.generation or {}).get("refused", 0) for record in records)}


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
