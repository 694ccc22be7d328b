"""Checking a finished cache: every stored byte, every rule, every count."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from storage_specs import manifest as manifest_json
from storage_specs import plan, vocabulary_table
from storage_specs.document import is_held_out
from storage_specs.errors import CorruptCacheError
from storage_specs.finalization import codec_facts, counts_of, generation_of
from storage_specs.generated import generation_record
from storage_specs.object_roots import open_objects
from storage_specs.objects import Objects
from storage_specs.reader import Cache, open_cache
from storage_specs.sealed_json import digest_of
from storage_specs.shard_record import ShardRecord
from storage_specs.stored_object import StoredObject


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """What was looked at, and what is wrong: one line per problem; none means that the cache is as it was written."""

    path: str
    fast: bool
    objects: int
    bytes: int
    documents: int
    rows: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        how = "sizes only" if self.fast else "every byte"
        seen = f"{self.objects} objects, {self.bytes} bytes, {self.documents} documents, {self.rows} rows ({how})"
        if self.ok:
            return f"{self.path}: good: {seen}"
        return "\n".join(
            [f"{self.path}: {len(self.problems)} problems in {seen}", *(f"  {line}" for line in self.problems)]
        )


def verify_cache(
    path: str | os.PathLike[str], *, fast: bool = False, progress: Callable[[int, int], None] | None = None
) -> VerificationReport:
    """Check a cache and go on past what is damaged, so that the report is complete.

    Every object's size and crc32c; every shard decoded and held against the format's rules, the shard table, the plan
    and the manifest's counts. `fast`: sizes only. `progress(done, all)`: called after every shard. Raises
    NotACacheError, IncompleteCacheError and SpecVersionError; damage is in the report's problems.
    """
    objects = open_objects(path)
    check = _Check(objects, fast)
    documents = rows = 0
    with check.damage():
        manifest = manifest_json.read_manifest(objects)
        documents, rows = manifest.counts["documents"], manifest.counts["rows"]
        check.objects_of((manifest.stored, *manifest.objects))
        cache = open_cache(path)
        shards = len(cache.documents_per_shard)
        for shard in range(shards):
            with check.damage():
                contents = check.objects_of(cache.reader.objects_of(shard))
                if contents is not None:
                    check.shard(cache, shard, contents)
            if progress is not None:
                progress(shard + 1, shards)
        if not fast and not check.problems:
            check.whole(cache)
    return check.report(documents, rows)


class _Check:
    """What was looked at and what is wrong, gathered on the way."""

    def __init__(self, objects: Objects, fast: bool) -> None:
        self.store, self.fast = objects, fast
        self.sizes = dict(objects.list()) if fast else {}
        self.problems: list[str] = []
        self.objects = self.bytes = 0
        self.records: list[ShardRecord] = []

    @contextmanager
    def damage(self) -> Iterator[None]:
        """Note what is corrupt, and go on."""
        try:
            yield
        except CorruptCacheError as error:
            if str(error) not in self.problems:  # an object that is needed twice is damaged once
                self.problems.append(str(error))

    def objects_of(self, wanted: Sequence[StoredObject]) -> dict[str, bytes] | None:
        """The bytes of several objects, if all are what was written; None where one is not, or only sizes count."""
        self.objects += len(wanted)
        self.bytes += sum(stored.size for stored in wanted)
        if self.fast:
            for stored in wanted:
                with self.damage():
                    self.store.check_size(stored, self.sizes)
            return None
        with suppress(CorruptCacheError):
            return self.store.fetch_all(wanted)
        contents = {}
        for stored in wanted:  # one by one, so that each that is damaged is named
            with self.damage():
                contents[stored.name] = self.store.fetch(stored)
        return contents if len(contents) == len(wanted) else None

    def shard(self, cache: Cache, shard: int, contents: Mapping[str, bytes]) -> None:
        """Decode one shard, and hold it against its record and the documents' own identities."""
        columns, record = cache.reader.columns(shard, contents), cache.reader.record(shard)
        members = cache.table.documents_of(shard)
        scored = sum(m.byte_end - m.byte_start for document in columns.documents for m in document.messages if m.scored)
        unscored_bytes = scored - int((columns.byte_end - columns.byte_start).sum())
        doc_ids = [document.doc_id for document in columns.documents] if cache.manifest.text else list(record.doc_ids)
        checks = {
            "a document's content has another doc_id": doc_ids == list(record.doc_ids),
            "its record belongs to other settings": record.config_digest == cache.manifest.config_digest,
            "its record names other objects": record.objects == cache.table.objects[shard][:-1],
            "its record lists other documents": list(record.doc_ids) == cache.doc_ids[members]
            and list(record.document_rows) == cache.rows_D[members].tolist()
            and list(record.document_text_bytes) == cache.text_bytes_D[members].tolist(),
            "its record names other prompts": record.generation
            == (None if cache.manifest.generation is None else generation_record(columns.documents)),
            "its record counts other end rows or unscored bytes": record.end_rows == columns.is_end.sum()
            and record.unscored_bytes == unscored_bytes,
        }
        self.problems += [f"{cache.table.stem_of(shard)}: {problem}" for problem, good in checks.items() if not good]
        self.records.append(record)

    def whole(self, cache: Cache) -> None:
        """Hold the manifest against the plan and against what all shards hold together."""
        manifest = cache.manifest
        planned, config = plan.plan_from_bytes(self.store.fetch(manifest.plan))
        checks = {
            "its counts are not those of the shards": manifest.counts == counts_of(self.records),
            "its generation is not that of the plan and the shards": manifest.generation
            == generation_of(config, self.records),
            "its L1 errors are not those of the shards": manifest.codec
            == codec_facts(manifest.row_shape, self.records),
            "its documents are not those of the plan": list(planned.doc_ids)
            == [doc_id for record in self.records for doc_id in record.planned_ids]
            and [len(shard) for shard in planned.shards] == cache.documents_per_shard.tolist(),
            "its corpus is not the plan's": manifest.corpus["digest"] == planned.corpus_digest,
            "its settings are not the plan's": manifest.config_digest == digest_of(config),
            "held-out documents are miscounted": manifest.held_out["documents"] == cache.held_out_D.sum()
            and list(map(is_held_out, planned.doc_ids)) == cache.held_out_D.tolist(),
        }
        self.problems += [f"{manifest_json.NAME}: {problem}" for problem, good in checks.items() if not good]
        if (
            cache.vocabulary is not None
            and vocabulary_table.vocabulary_digest(cache.vocabulary) != config["vocabulary_digest"]
        ):
            self.problems.append(f"{vocabulary_table.NAME}: not the vocabulary of the plan")

    def report(self, documents: int, rows: int) -> VerificationReport:
        return VerificationReport(
            path=self.store.place,
            fast=self.fast,
            objects=self.objects,
            bytes=self.bytes,
            documents=documents,
            rows=rows,
            problems=tuple(self.problems),
        )
