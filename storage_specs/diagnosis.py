"""What is wrong with a damaged cache, and what of it follows from what is left.

Small objects say the same things twice: plan, shard table, commit records and manifest can be rebuilt from one another.
`repairing` puts that back; what was measured, a shard's data, must be measured again.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from storage_specs import manifest as manifest_json
from storage_specs import plan as plan_json
from storage_specs import shard_table, vocabulary_table
from storage_specs.errors import CorruptCacheError, MalformedObjectError, SpecVersionError
from storage_specs.finalization import verified_records
from storage_specs.generated import generation_record
from storage_specs.manifest import Manifest
from storage_specs.object_roots import open_objects
from storage_specs.objects import Objects
from storage_specs.plan import Plan, plan_from_bytes, plan_to_bytes
from storage_specs.revisions import newest_record, record_revisions
from storage_specs.sealed_json import SPEC_VERSION
from storage_specs.shard_reading import ShardReader
from storage_specs.shard_record import ShardRecord, described
from storage_specs.shard_table import ShardTable
from storage_specs.stored_object import StoredObject
from storage_specs.stored_shard import Selection
from storage_specs.stores import shard_store

Progress = Callable[[int, int], None]
_PLAN_LOST = (
    "plan.json is damaged, and too much else to rebuild it from the cache alone; run `cache-builder repair` with "
    "--teacher, --corpus and all other flags of the build"
)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What is wrong with a cache, and what is left of it.

    manifest: None where it is damaged itself. records: per shard, None where it must be scored again. restorable:
    {name: bytes} of damaged objects that are put back as they were. vocabulary_lost: only the teacher can give it
    again. renewed: an object was rebuilt to other bytes than the manifest names (by another version of Arrow).
    """

    objects: Objects
    manifest: Manifest | None
    table: ShardTable | None
    plan: Plan
    config: dict[str, Any]
    records: tuple[ShardRecord | None, ...]
    restorable: dict[str, bytes]
    vocabulary_lost: bool
    renewed: bool

    @property
    def lost_shards(self) -> list[int]:
        return [shard for shard, record in enumerate(self.records) if record is None]

    @property
    def needs_teacher(self) -> bool:
        return bool(self.lost_shards) or self.vocabulary_lost

    @property
    def is_sound(self) -> bool:
        return not (self.restorable or self.renewed or self.needs_teacher) and self.manifest is not None

    @property
    def replaces(self) -> tuple[str, ...]:
        """What a new revision of the cache replaces."""
        return () if self.manifest is None else (*self.manifest.replaces, self.manifest.cache_id)


def diagnose(
    path: str | os.PathLike[str], progress: Progress | None = None, *, supposed_plan: bytes | None = None
) -> Diagnosis:
    """Read everything of a cache, and tell what can be put back from what must be scored again.

    `progress(done, all)`: called after every shard. supposed_plan: the plan.json that the build would write, for a
    cache that has lost its own; believed only where manifest or records speak for it. Raises NotACacheError,
    IncompleteCacheError (a build that has not finished), SpecVersionError, and MalformedObjectError where too little is
    left to know what the cache was.
    """
    objects = open_objects(path)
    try:
        manifest = manifest_json.read_manifest(objects)
    except (CorruptCacheError, SpecVersionError):  # a flipped bit may be one of the version: the plan knows better
        return _without_manifest(objects, supposed_plan)
    return _with_manifest(objects, manifest, supposed_plan, progress or (lambda done, of: None))


def _without_manifest(objects: Objects, supposed_plan: bytes | None) -> Diagnosis:
    """The manifest follows from plan and records: what a build has left before its last step."""
    restorable = {}
    try:
        planned, config = plan_from_bytes(objects.read_within(plan_json.NAME, plan_json.MAX_BYTES), plan_json.NAME)
        records = verified_records(objects, config, planned)
    except CorruptCacheError:
        planned, config = plan_from_bytes(supposed_plan) if supposed_plan else (Plan(doc_ids=(), shards=()), {})
        records = verified_records(objects, config, planned)
        if not any(records):
            raise MalformedObjectError(f"{objects.place}: manifest.json is damaged, and {_PLAN_LOST}") from None
        restorable[plan_json.NAME] = supposed_plan or b""
    names = sorted(name for name, _ in objects.list("vocabulary"))
    return Diagnosis(
        objects=objects,
        manifest=None,
        table=None,
        plan=planned,
        config=config,
        records=tuple(records),
        restorable=restorable,
        vocabulary_lost=config["vocabulary_digest"] is not None
        and not (names and _is_vocabulary(objects.read_within(names[-1], manifest_json.MAX_OBJECT_BYTES), config)),
        renewed=False,
    )


def _with_manifest(objects: Objects, manifest: Manifest, supposed_plan: bytes | None, progress: Progress) -> Diagnosis:
    rebuilt: dict[StoredObject, bytes] = {}
    plan_data, table_data = _fetched(objects, manifest.plan), _fetched(objects, manifest.shards)
    vocabulary = _fetched(objects, manifest.vocabulary)
    planned = None if plan_data is None else plan_from_bytes(plan_data)[0]
    table = None
    if table_data is None:
        records = _records_alone(objects, manifest, planned)
        if all(records):
            rebuilt[manifest.shards] = shard_table.table_to_object([record for record in records if record])
    else:
        table, records = shard_table.table_from_object(table_data, manifest.counts["documents"]), []
        for shard in range(len(table)):
            records.append(_record(objects, manifest, table, shard, rebuilt))
            progress(shard + 1, len(table))
    if _fetched(objects, manifest.documents) is None and all(records):
        rebuilt[manifest.documents] = shard_table.doc_ids_to_object([record for record in records if record])
    if plan_data is None:
        candidates = (_rebuilt_plan(manifest, records, vocabulary), supposed_plan or b"")
        fitting = [data for data in candidates if StoredObject.of(manifest.plan.name, data) == manifest.plan]
        if not fitting:
            raise MalformedObjectError(f"{objects.place}: {_PLAN_LOST}")
        plan_data = rebuilt[manifest.plan] = fitting[0]
    planned, config = plan_from_bytes(plan_data)
    exact = {stored.name: data for stored, data in rebuilt.items() if StoredObject.of(stored.name, data) == stored}
    return Diagnosis(
        objects=objects,
        manifest=manifest,
        table=table,
        plan=planned,
        config=config,
        records=tuple(records),
        restorable=exact,
        vocabulary_lost=manifest.vocabulary is not None and vocabulary is None,
        renewed=len(exact) < len(rebuilt),
    )


def _record(
    objects: Objects, manifest: Manifest, table: ShardTable, shard: int, rebuilt: dict[StoredObject, bytes]
) -> ShardRecord | None:
    """A shard's record, as stored or written again; None where its data are damaged."""
    reader, stored = reader_of(objects, manifest, table), table.objects[shard][-1]
    try:
        columns = reader.columns(shard)
        record = reader.record(shard) if _fetched(objects, stored) is not None else None
        if manifest.text:
            doc_ids = tuple(document.doc_id for document in columns.documents)
        elif record is not None:
            doc_ids = record.doc_ids
        else:
            every = shard_table.doc_ids_from_object(objects.fetch(manifest.documents), len(table.rows))
            doc_ids = tuple(every[table.documents_of(shard)])
        if record is None:
            record = _rebuilt_record(reader, shard, doc_ids)
            if StoredObject.of(stored.name, record.to_bytes()) != stored:
                return None
            rebuilt[stored] = record.to_bytes()
    except CorruptCacheError:
        return None
    return record if record.doc_ids == doc_ids else None


def _rebuilt_record(reader: ShardReader, shard: int, doc_ids: tuple[str, ...]) -> ShardRecord:
    """The record that the shard table and the shard itself speak of; right if its bytes are those that were stored."""
    manifest, table = reader.manifest, reader.table
    stored_shard = reader.stored_shard(shard, reader.stored(shard), Selection.everything(table.size_of(shard)))
    contents = shard_store(manifest.store).encode(stored_shard, reader.arrays_of(shard), table.stem_of(shard))
    objects, parts = described(contents)
    return ShardRecord(
        shard=shard,
        config_digest=manifest.config_digest,
        doc_ids=doc_ids,
        document_rows=tuple(stored_shard.document_rows.tolist()),
        document_text_bytes=tuple(stored_shard.text_bytes.tolist()),
        **table.facts_of(shard),
        objects=objects,
        parts=parts,
        replaces=tuple(manifest.replaces[: table.revision_of(shard)]),
        generation=None if manifest.generation is None else generation_record(stored_shard.documents),
    )


def _records_alone(objects: Objects, manifest: Manifest, planned: Plan | None) -> list[ShardRecord | None]:
    """All shards' newest records, where no table says which they are; None for those that do not verify."""
    revisions = record_revisions(objects)
    shards = max(revisions, default=-1) + 1 if planned is None else len(planned.shards)
    return [
        newest_record(
            objects,
            shard,
            manifest.config_digest,
            None if planned is None else planned.doc_ids_of(shard),
            [number for number in revisions.get(shard, ()) if number <= manifest.revision],
        )
        for shard in range(shards)
    ]


def _rebuilt_plan(manifest: Manifest, records: list[ShardRecord | None], vocabulary: bytes | None) -> bytes:
    """plan.json from all that repeats it, as far as that is there."""
    generation = manifest.generation
    sizes = [len(record.planned_ids) for record in records if record is not None]
    config = {
        "spec_version": SPEC_VERSION,
        **{name: getattr(manifest, name) for name in ("teacher", "tokenizer", "chat_template", "engine", "windows")},
        **{name: getattr(manifest, name) for name in ("k", "k_ids", "vocab_size", "store", "text")},
        "profile": manifest.codec["profile"],
        "parameters": manifest.codec["parameters"],
        "generation": generation and {key: item for key, item in generation.items() if key != "refused"},
        "vocabulary_digest": vocabulary
        and vocabulary_table.vocabulary_digest(vocabulary_table.vocabulary_from_bytes(vocabulary, manifest.vocab_size)),
    }
    plan = Plan(
        doc_ids=tuple(doc_id for record in records if record is not None for doc_id in record.planned_ids),
        shards=tuple(range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)),
    )
    return plan_to_bytes(plan, config)


def reader_of(objects: Objects, manifest: Manifest, table: ShardTable) -> ShardReader:
    """Reads the cache's shards with all their columns."""
    return ShardReader(objects=objects, manifest=manifest, table=table, with_ids=manifest.k_ids > 0)


def _fetched(objects: Objects, stored: StoredObject | None) -> bytes | None:
    """An object's verified bytes; None where it is damaged, or none is named."""
    if stored is None:
        return None
    try:
        return objects.fetch(stored)
    except CorruptCacheError:
        return None


def _is_vocabulary(data: bytes, config: dict[str, Any]) -> bool:
    try:
        words = vocabulary_table.vocabulary_from_bytes(data, config["vocab_size"])
    except ValueError:
        return False
    return vocabulary_table.vocabulary_digest(words) == config["vocabulary_digest"]
