"""Mending a damaged cache, by its diagnosis.

Derived objects whose rebuilt bytes are those that the manifest names are put back, and the cache is what it was. A
shard that was scored again has names of a new revision (`revisions`), and a new manifest `replaces` the old one, which
is kept beside it. Nothing that a manifest names is ever overwritten by other bytes.
"""

from collections.abc import Sequence

from storage_specs import manifest as manifest_json
from storage_specs.diagnosis import Diagnosis, reader_of
from storage_specs.errors import CorruptCacheError
from storage_specs.finalization import commit, manifest_bytes
from storage_specs.manifest import Manifest
from storage_specs.shard_reading import ShardReader
from storage_specs.shard_record import ShardRecord


def restore(diagnosis: Diagnosis) -> Manifest | None:
    """Put back what could be derived. The manifest of the cache where it is whole again, else None."""
    objects = diagnosis.objects
    objects.write_all(diagnosis.restorable)
    if diagnosis.needs_teacher:
        return None
    if diagnosis.manifest is None:
        objects.delete(manifest_json.NAME)
        return commit(objects, diagnosis.config, diagnosis.plan, diagnosis.records)
    return commit_revision(diagnosis, diagnosis.records) if diagnosis.renewed else diagnosis.manifest


def commit_revision(diagnosis: Diagnosis, records: Sequence[ShardRecord | None]) -> Manifest:
    """Write the manifest of the repaired cache, with all its records; the one before is kept under its own name.

    Raises IncompleteCacheError, CorruptCacheError's kinds, StorageFullError, OutputFolderError.
    """
    objects, before = diagnosis.objects, diagnosis.manifest
    if before is not None:
        objects.create(manifest_json.kept_name(before.revision), objects.fetch(before.stored))
    data = manifest_bytes(objects, diagnosis.config, diagnosis.plan, records, diagnosis.replaces)
    objects.write_all({manifest_json.NAME: data})
    return manifest_json.manifest_from_bytes(data)


def lost_documents(diagnosis: Diagnosis, shard: int) -> list[tuple[str, str | None]]:
    """(planned id, text) of a lost shard's documents, the text None where it does not verify."""
    ids = diagnosis.plan.doc_ids_of(shard)
    if diagnosis.manifest is None or diagnosis.table is None or not diagnosis.manifest.text:
        return [(doc_id, None) for doc_id in ids]
    reader = reader_of(diagnosis.objects, diagnosis.manifest, diagnosis.table)
    try:
        record = reader.record(shard)
    except CorruptCacheError:
        return [(doc_id, None) for doc_id in ids]
    first = int(diagnosis.table.first_document[shard])
    return [(doc_id, _text(reader, record, shard, first + number)) for number, doc_id in enumerate(ids)]


def _text(reader: ShardReader, record: ShardRecord, shard: int, number: int) -> str | None:
    try:
        return reader.text(shard, record, number)
    except CorruptCacheError:
        return None
