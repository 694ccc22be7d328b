"""Reading one shard: its bytes verified before they are decoded, its documents and rows held against every rule after.

A shard is read whole (every object, against size and crc32c), or one document of it (the parts that hold it, each
against its crc32c in the shard's commit record).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from storage_specs import places, row_coding, shard_table
from storage_specs.column_rules import problem_of, size_problem
from storage_specs.columns import Columns
from storage_specs.errors import MalformedObjectError, TeachOnceError
from storage_specs.manifest import Manifest
from storage_specs.objects import Objects
from storage_specs.shard_bytes import ObjectParts, ShardBytes, WholeObjects
from storage_specs.shard_record import ShardRecord, read_record
from storage_specs.shard_table import ShardTable
from storage_specs.stored_object import StoredObject
from storage_specs.stored_shard import MAX_HEADER_BYTES, Selection, ShardArrays, StoredShard
from storage_specs.stores import shard_store
from storage_specs.zarr_chunks import MAX_METADATA_BYTES

WRITTEN_WRONGLY = "the cache was written wrongly: rebuild it, and please report this"


@dataclass(frozen=True, kw_only=True)
class ShardReader:
    """Reads shards of one cache, with or without their ids. All methods raise the kinds of CorruptCacheError."""

    objects: Objects
    manifest: Manifest
    table: ShardTable
    with_ids: bool

    def columns(self, shard: int, contents: Mapping[str, bytes] | None = None) -> Columns:
        """All documents of a shard; every object was verified whole. `contents`: its objects, if they were read."""
        source = self.stored(shard) if contents is None else WholeObjects(contents)
        return self._columns(shard, source, Selection.everything(self.table.size_of(shard)))

    def stored(self, shard: int) -> ShardBytes:
        """A shard's objects, verified whole."""
        return WholeObjects(self.objects.fetch_all(self._wanted(shard)))

    def stored_shard(self, shard: int, source: ShardBytes, selection: Selection) -> StoredShard:
        """Documents of a shard as they are stored, their arrays not looked into."""
        size, stem = self.table.size_of(shard), self.table.stem_of(shard)
        problem = size_problem(size, self.manifest.row_shape)
        if problem:
            raise MalformedObjectError(f"{shard_table.NAME}: shard {shard}: {problem}; {WRITTEN_WRONGLY}")
        wanted = self.arrays_of(shard)
        with _decoding(stem):
            found = shard_store(self.manifest.store).decode(source, stem, wanted, size, selection)
            members = self.table.documents_of(shard)
            inside = slice(members.start + selection.documents.start, members.start + selection.documents.stop)
            if not (
                np.array_equal(found.document_rows, self.table.rows[inside])
                and np.array_equal(found.text_bytes, self.table.text_bytes[inside])
            ):
                raise ValueError(f"its documents are not those that {shard_table.NAME} lists")
            return found

    def arrays_of(self, shard: int) -> ShardArrays:
        rows = self.table.size_of(shard).rows
        return row_coding.arrays_of(self.manifest.row_shape, rows, with_ids=self.with_ids)

    def document(self, shard: int, record: ShardRecord, document: int) -> Columns:
        """One document of a shard, by its number in the cache: only the parts that hold it are read."""
        stored, selection = self._wanted(shard), self.table.selection(document)
        source = ObjectParts(self.objects, stored, record.parts)
        with _decoding(self.table.stem_of(shard)):
            source.expect(self._likely(shard, record, selection))
        return self._columns(shard, source, selection)

    def text(self, shard: int, record: ShardRecord, document: int) -> str:
        """The text of one document, by its number in the cache; of the shard's arrays only one is read."""
        source = ObjectParts(self.objects, self.objects_of(shard)[:-1], record.parts)
        least, selection = ShardArrays(arrays=places.ARRAYS[-1:], tables={}), self.table.selection(document)
        with _decoding(self.table.stem_of(shard)):
            store = shard_store(self.manifest.store)
            found = store.decode(source, self.table.stem_of(shard), least, self.table.size_of(shard), selection)
            return found.documents[0].text

    def record(self, shard: int) -> ShardRecord:
        """The shard's commit record, verified."""
        *others, stored = self.objects_of(shard)
        record = read_record(self.objects, shard, self.table.revision_of(shard), stored)
        if list(record.objects) != others:
            raise MalformedObjectError(
                f"{record.name}: it names other objects than {shard_table.NAME}; {WRITTEN_WRONGLY}"
            )
        return record

    def objects_of(self, shard: int) -> tuple[StoredObject, ...]:
        """All objects of a shard as the table describes them, its record last: each once, none larger than can be."""
        stored, size = self.table.objects[shard], self.table.size_of(shard)
        wanted = row_coding.arrays_of(self.manifest.row_shape, size.rows)
        numbers = sum(spec.dtype.itemsize * (spec.width or 1) for spec in wanted.arrays) * size.rows
        most = 2 * (numbers + size.text_bytes + 4 * sum(wanted.tables.values())) + MAX_HEADER_BYTES
        if len({item.name for item in stored}) < len(stored):
            problem = "has an object twice"
        elif any(item.size > (MAX_METADATA_BYTES if item.name.endswith("/zarr.json") else most) for item in stored):
            problem = f"has an object above the limit for {size}"
        else:
            return stored
        raise MalformedObjectError(f"{shard_table.NAME}: shard {shard} {problem}; {WRITTEN_WRONGLY}")

    def _columns(self, shard: int, source: ShardBytes, selection: Selection) -> Columns:
        stored = self.stored_shard(shard, source, selection)
        with _decoding(self.table.stem_of(shard)):
            columns = row_coding.decode(stored, self.manifest.row_shape)
            problem = problem_of(columns, self.manifest.vocab_size, text=self.manifest.text)
            if problem:
                raise ValueError(problem)
            return columns

    def _likely(self, shard: int, record: ShardRecord, selection: Selection) -> dict[str, Sequence[range]]:
        """Parts that a reader of these documents will probably ask for, by object. A hint: without it an object store
        is asked for one after the other, and a cold disk takes half as long again (`distill bench reader`).
        """
        store, stem, wanted = shard_store(self.manifest.store), self.table.stem_of(shard), self.arrays_of(shard)
        likely = {}
        for name, parts in record.parts.items():
            index = len(parts.sizes) - 1
            if not index:  # no record of ours lists one part
                continue
            chunks = store.likely_chunks(name, stem, wanted, record, selection)
            at_end = chunks.stop == index
            likely[name] = [range(chunks.start, index + 1)] if at_end else [chunks, range(index, index + 1)]
        return likely

    def _wanted(self, shard: int) -> list[StoredObject]:
        """The shard's objects without its record, and where ids are not wanted without those that hold only ids."""
        store, stem = shard_store(self.manifest.store), self.table.stem_of(shard)
        unwanted = frozenset() if self.with_ids else self._id_columns
        return [stored for stored in self.objects_of(shard)[:-1] if not store.columns_of(stored.name, stem) & unwanted]

    @cached_property
    def _id_columns(self) -> frozenset[str]:
        return row_coding.id_columns(self.manifest.row_shape)


@contextmanager
def _decoding(place: str) -> Iterator[None]:
    """Other projects' decoders raise anything on bytes that verify and are still wrong: MalformedObjectError."""
    try:
        yield
    except TeachOnceError:
        raise
    except Exception as error:
        raise MalformedObjectError(f"{place}: {type(error).__name__}: {error}; {WRITTEN_WRONGLY}") from error
