"""Mending a damaged cache: what is derived is derived again, what was measured must be measured again.

Small objects say the same thing twice: plan, shard table, commit records and manifest can be rebuilt from one another.
Where the rebuilt bytes are those that the manifest names, they are put back and the cache is what it was. A shard with
damaged data must be scored again; its new objects get names of a new revision (`revisions`), and a new manifest
`replaces` the old one, which is kept beside it.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from storage_specs import manifest as manifest_json
from storage_specs import plan as plan_json
from storage_specs import shard_table, vocabulary_table
from storage_specs.columns import Columns
from storage_specs.errors import CorruptCacheError, MalformedObjectError
from storage_specs.finalization import commit, manifest_bytes, verified_records
from storage_specs.generated import generation_record
from storage_specs.manifest import Manifest
from storage_specs.objects import Objects, open_objects
from storage_specs.plan import Plan, plan_from_bytes, plan_to_bytes
from storage_specs.reader import read_columns
from storage_specs.revisions import newest_record, record_revisions
from storage_specs.sealed_json import SPEC_VERSION, digest_of
from storage_specs.shard_record import ShardRecord, read_record
from storage_specs.shard_table import ShardTable
from storage_specs.stored_object import StoredObject


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What is wrong with a cache, and what is left of it.

    records: per shard, None where it must be scored again. restorable: {name: bytes} of damaged objects that are put
    back as they were. manifest: None where it is damaged itself. vocabulary_lost: only the teacher can give it again.
    """

    objects: Objects
    manifest: Manifest | None
    plan: Plan
    config: dict[str, Any]
    records: tuple[ShardRecord | None, ...]
    restorable: dict[str, bytes]
    vocabulary_lost: bool

    @property
    def lost_shards(self) -> list[int]:
        return [shard for shard, record in enumerate(self.records) if record is None]

    @property
    def replaces(self) -> tuple[str, ...]:
        """What a new revision of the cache replaces."""
        return () if self.manifest is None else (*self.manifest.replaces, self.manifest.cache_id)

    @property
    def is_sound(self) -> bool:
        return not (self.restorable or self.lost_shards or self.vocabulary_lost or self.manifest is None)

    def restore(self) -> None:
        """Put back what could be derived; where nothing else is lost, the cache is whole again."""
        self.objects.write_all(self.restorable)
        if self.manifest is None and not self.lost_shards and not self.vocabulary_lost:
            self.objects.delete(manifest_json.NAME)
            commit(self.objects, self.config, self.plan, self.records)


def diagnose(path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> Diagnosis:
    """Read everything of a cache, and tell what can be put back from what must be scored again.

    `progress(done, all)`: called after every shard. Raises NotACacheError, IncompleteCacheError (a build that did not
    finish), SpecVersionError, and MalformedObjectError where too little is left to know what the cache was.
    """
    objects = open_objects(path)
    try:
        manifest = manifest_json.read_manifest(objects)
    except CorruptCacheError:
        return _without_manifest(objects)
    return _with_manifest(objects, manifest, progress or (lambda done, of: None))


def commit_revision(diagnosis: Diagnosis, records: list[ShardRecord]) -> Manifest:
    """Write the manifest of a repaired cache, with all its records. The manifest before it is kept under its own name.

    Raises CorruptCacheError's kinds, StorageFullError, OutputFolderError.
    """
    objects, before = diagnosis.objects, diagnosis.manifest
    if before is None:
        raise ValueError("a cache without a manifest is finished, not repaired")
    objects.create(manifest_json.kept_name(before.revision), before.to_bytes())
    data = manifest_bytes(objects, diagnosis.config, diagnosis.plan, records, diagnosis.replaces)
    objects.write_all({manifest_json.NAME: data})
    return manifest_json.manifest_from_bytes(data)


def _without_manifest(objects: Objects) -> Diagnosis:
    """The manifest follows from plan and records: what a build has left before its last step."""
    try:
        planned, config = plan_from_bytes(objects.read(plan_json.NAME), plan_json.NAME)
    except CorruptCacheError as error:
        raise MalformedObjectError(
            f"{objects.place}: manifest.json and plan.json are both damaged ({error}); delete both and run the same "
            "`cache-builder build` command again: shards that verify are kept"
        ) from None
    records = verified_records(objects, config, planned)
    return Diagnosis(
        objects=objects,
        manifest=None,
        plan=planned,
        config=config,
        records=tuple(records),
        restorable={},
        vocabulary_lost=config["vocabulary_digest"] is not None
        and not _is_vocabulary(_newest_vocabulary(objects), config),
    )


def _with_manifest(objects: Objects, manifest: Manifest, progress: Callable[[int, int], None]) -> Diagnosis:
    restorable: dict[str, bytes] = {}
    table, records = _table_and_records(objects, manifest, restorable, progress)
    vocabulary = _fetched(objects, manifest.vocabulary)
    planned, config = _plan(objects, manifest, table, records, vocabulary, restorable)
    return Diagnosis(
        objects=objects,
        manifest=manifest,
        plan=planned,
        config=config,
        records=tuple(records),
        restorable=restorable,
        vocabulary_lost=manifest.vocabulary is not None and vocabulary is None,
    )


def _table_and_records(
    objects: Objects, manifest: Manifest, restorable: dict[str, bytes], progress: Callable[[int, int], None]
) -> tuple[ShardTable | None, list[ShardRecord | None]]:
    data = _fetched(objects, manifest.shards)
    if data is None:
        records = _records_alone(objects, manifest)
        if all(records):
            data = shard_table.table_to_object(records)
            if StoredObject.of(manifest.shards.name, data) == manifest.shards:
                restorable[manifest.shards.name] = data
        else:
            return None, records
    table = shard_table.table_from_object(data)
    records, shards = [], len(table.objects)
    for shard in range(shards):
        records.append(_record(objects, manifest, table, shard, restorable))
        progress(shard + 1, shards)
    return table, records


def _record(
    objects: Objects, manifest: Manifest, table: ShardTable, shard: int, restorable: dict[str, bytes]
) -> ShardRecord | None:
    """A shard's record, as stored or rebuilt; None where its data are damaged."""
    try:
        columns = read_columns(objects, manifest, table, shard, ids=True)
    except CorruptCacheError:
        return None
    documents = columns.documents
    if tuple(document.doc_id for document in documents) != columns.doc_ids:
        return None
    stored = table.objects[shard][-1]
    rebuilt = _rebuilt_record(manifest, table, shard, columns)
    if StoredObject.of(stored.name, rebuilt.to_bytes()) != stored:
        return None
    if _fetched(objects, stored) is None:
        restorable[stored.name] = rebuilt.to_bytes()
    return rebuilt


def _rebuilt_record(manifest: Manifest, table: ShardTable, shard: int, columns: Columns) -> ShardRecord:
    members = table.documents_of(shard)
    return ShardRecord(
        shard=shard,
        config_digest=manifest.config_digest,
        doc_ids=table.doc_ids[members],
        document_rows=tuple(table.rows[members].tolist()),
        document_text_bytes=tuple(table.text_bytes[members].tolist()),
        **table.records[shard],
        objects=table.objects[shard][:-1],
        replaces=tuple(manifest.replaces[: table.revision_of(shard)]),
        generation=None if manifest.generation is None else generation_record(columns.documents),
    )


def _records_alone(objects: Objects, manifest: Manifest) -> list[ShardRecord | None]:
    """All shards' newest records, where no table says which they are; None for those that do not verify."""
    revisions = record_revisions(objects)
    found: list[ShardRecord | None] = []
    for shard in range(max(revisions, default=-1) + 1):
        known = [number for number in revisions.get(shard, ()) if number <= manifest.revision]
        doc_ids = ()
        for number in known:
            with suppress(CorruptCacheError):
                doc_ids = read_record(objects, shard, number).planned_ids
                break
        found.append(newest_record(objects, shard, manifest.config_digest, doc_ids, known))
    return found


def _plan(
    objects: Objects,
    manifest: Manifest,
    table: ShardTable | None,
    records: list[ShardRecord | None],
    vocabulary: bytes | None,
    restorable: dict[str, bytes],
) -> tuple[Plan, dict[str, Any]]:
    data = _fetched(objects, manifest.plan)
    if data is None:
        if all(records) and (vocabulary is not None or manifest.vocabulary is None):
            data = _rebuilt_plan(manifest, records, vocabulary)
        if data is None or StoredObject.of(manifest.plan.name, data) != manifest.plan:
            raise MalformedObjectError(
                f"{objects.place}: plan.json is damaged, and too much else to rebuild it; delete manifest.json and "
                "plan.json and run the same `cache-builder build` command again: shards that verify are kept"
            )
        restorable[manifest.plan.name] = data
    planned, config = plan_from_bytes(data)
    if table is None:
        records += [None] * (len(planned.shards) - len(records))
    return planned, config


def _rebuilt_plan(manifest: Manifest, records: list[ShardRecord | None], vocabulary: bytes | None) -> bytes | None:
    """plan.json from all that repeats it; None where that is not what the cache was built by."""
    words = None if vocabulary is None else vocabulary_table.vocabulary_from_bytes(vocabulary, manifest.vocab_size)
    generation = manifest.generation
    config = {
        "spec_version": SPEC_VERSION,
        **{name: getattr(manifest, name) for name in ("teacher", "tokenizer", "chat_template", "engine", "windows")},
        **{name: getattr(manifest, name) for name in ("k", "k_ids", "vocab_size", "store")},
        "profile": manifest.codec["profile"],
        "generation": generation and {key: item for key, item in generation.items() if key != "refused"},
        "vocabulary_digest": None if words is None else vocabulary_table.vocabulary_digest(words),
    }
    if digest_of(config) != manifest.config_digest:
        return None
    sizes = [len(record.planned_ids) for record in records if record is not None]
    ends = list(accumulate(sizes))
    plan = Plan(
        doc_ids=tuple(doc_id for record in records if record is not None for doc_id in record.planned_ids),
        shards=tuple(range(end - size, end) for size, end in zip(sizes, ends, strict=True)),
    )
    return plan_to_bytes(plan, config)


def _fetched(objects: Objects, stored: StoredObject | None) -> bytes | None:
    """An object's verified bytes; None where it is damaged, or there is none to be had."""
    if stored is None:
        return None
    try:
        return objects.fetch(stored)
    except CorruptCacheError:
        return None


def _newest_vocabulary(objects: Objects) -> bytes:
    names = sorted(name for name, _ in objects.list("vocabulary"))
    return objects.read(names[-1]) if names else b""


def _is_vocabulary(data: bytes, config: dict[str, Any]) -> bool:
    try:
        words = vocabulary_table.vocabulary_from_bytes(data, config["vocab_size"])
    except ValueError:
        return False
    return vocabulary_table.vocabulary_digest(words) == config["vocabulary_digest"]
