"""All commit records gathered: `shards.parquet`, against which objects are checked, and `documents.parquet`, the ids.

They are two so that planning an epoch never reads the ids, which are most of the bytes and do not compress.

Legend: D documents of the cache, S shards.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from storage_specs.document import canonical_json, is_held_out
from storage_specs.errors import CorruptCacheError, MalformedObjectError
from storage_specs.l1_errors import L1Errors
from storage_specs.parquet import table_from_bytes, table_to_bytes
from storage_specs.shard_names import revision_mark, stem_of
from storage_specs.shard_record import ShardRecord
from storage_specs.stored_object import REMEDY, StoredObject
from storage_specs.stored_shard import Selection, ShardSize
from storage_specs.strict_json import strict_json

if TYPE_CHECKING:
    import pyarrow as pa

NAME = "shards.parquet"
DOCUMENTS_NAME = "documents.parquet"
SHARDS_PER_ROW_GROUP = 1024
SHARDS_KEPT = 64  # whose objects' descriptions stay as Python objects
MAX_OBJECTS = 128  # of one shard
MAX_DESCRIPTION_BYTES = 128  # of an object's name, size and crc32c
MAX_L1_BYTES = 1 << 13  # of a shard's L1 errors as JSON: their histogram has some 320 bins


class StoredObjects(Sequence[tuple[StoredObject, ...]]):
    """For each shard all its objects, its commit record last; made when they are asked for, the last few kept."""

    def __init__(self, column: "pa.ListArray") -> None:
        self._column = column
        self._of_shard = lru_cache(SHARDS_KEPT)(self._made)

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, shard: int) -> tuple[StoredObject, ...]:
        """Raises MalformedObjectError."""
        return self._of_shard(shard)

    def _made(self, shard: int) -> tuple[StoredObject, ...]:
        objects = tuple(StoredObject.from_json(item, NAME) for item in self._column[shard].as_py())
        stem = objects[-1].name.removesuffix(".json") if objects else ""
        if not re.fullmatch(rf"{stem_of(shard)}(\.r[1-9][0-9]{{0,8}})?", stem) or not all(
            stored.name.startswith(f"{stem}.") for stored in objects
        ):
            raise MalformedObjectError(f"{NAME}: shard {shard} has no commit record, or objects of another shard")
        return objects


@dataclass(frozen=True, kw_only=True)
class ShardTable:
    """Every shard of a finished cache, in order; nothing of it grows with the rows.

    objects: for each shard all its objects, its commit record last. documents_per_shard: (S,) int64. Of all documents
    in order: rows and text_bytes (D,) int64, held_out (D,) bool. records: what each shard's record says beside, so that
    a damaged one can be written again.
    """

    objects: StoredObjects
    documents_per_shard: np.ndarray
    rows: np.ndarray
    text_bytes: np.ndarray
    held_out: np.ndarray
    records: "pa.Table"

    def __len__(self) -> int:
        return len(self.documents_per_shard)

    @cached_property
    def first_document(self) -> np.ndarray:
        """(S + 1,) int64: the number of each shard's first document, and of all documents."""
        return np.concatenate([[0], np.cumsum(self.documents_per_shard)])

    def stem_of(self, shard: int) -> str:
        """What the names of the shard's objects start with: a repaired shard has names of its own."""
        return self.objects[shard][-1].name.removesuffix(".json")

    def revision_of(self, shard: int) -> int:
        """By which repair of the cache the shard was written; 0: by the build."""
        return int(self.stem_of(shard).partition(".r")[2] or 0)

    def facts_of(self, shard: int) -> dict[str, Any]:
        """end_rows, unscored_bytes and l1_errors of the shard's record. Raises MalformedObjectError."""
        facts = self.records.slice(shard, 1).to_pylist()[0]
        try:
            return facts | {"l1_errors": L1Errors.from_json(strict_json(facts["l1_errors"]))}
        except (ValueError, TypeError, KeyError) as error:
            raise MalformedObjectError(f"{NAME}: shard {shard}: {error}") from None

    def documents_of(self, shard: int) -> slice:
        """The shard's documents among all."""
        return slice(*self.first_document[shard : shard + 2].tolist())

    def size_of(self, shard: int) -> ShardSize:
        members = self.documents_of(shard)
        return ShardSize(
            documents=int(self.documents_per_shard[shard]),
            rows=int(self.rows[members].sum()),
            text_bytes=int(self.text_bytes[members].sum()),
        )

    def selection(self, document: int) -> Selection:
        """Where one document of the cache lies in its shard."""
        shard = int(np.searchsorted(self.first_document, document, side="right")) - 1
        first = int(self.first_document[shard])

        def span(sizes_D: np.ndarray) -> slice:
            start = int(sizes_D[first:document].sum())
            return slice(start, start + int(sizes_D[document]))

        number = document - first
        return Selection(documents=slice(number, number + 1), rows=span(self.rows), text=span(self.text_bytes))


def name_of(revision: int) -> str:
    """The table's name in a cache that was repaired so many times."""
    return f"shards{revision_mark(revision)}.parquet"


def documents_name_of(revision: int) -> str:
    """The name of the documents' ids, likewise."""
    return f"documents{revision_mark(revision)}.parquet"


def table_to_object(records: Sequence[ShardRecord]) -> bytes:
    """shards.parquet of all shards' records, in order."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {name: [] for name in _schema().names}
    for record in records:
        stored = (*record.objects, StoredObject.of(record.name, record.to_bytes()))
        columns["shard"].append(record.shard)
        columns["documents"].append(len(record.doc_ids))
        columns["rows"].append(sum(record.document_rows))
        columns["text_bytes"].append(sum(record.document_text_bytes))
        columns["document_rows"].append(record.document_rows)
        columns["document_text_bytes"].append(record.document_text_bytes)
        columns["document_held_out"].append(list(map(is_held_out, record.planned_ids)))
        columns["end_rows"].append(record.end_rows)
        columns["unscored_bytes"].append(record.unscored_bytes)
        columns["l1_errors"].append(canonical_json(record.l1_errors.to_json()).decode())
        columns["objects"].append([item.to_json() for item in stored])
    return table_to_bytes(pa.table(columns, schema=_schema()), rows_per_group=SHARDS_PER_ROW_GROUP)


def table_from_object(data: bytes, documents: int) -> ShardTable:
    """The shard table of a verified object, of a cache of so many documents. Raises MalformedObjectError."""
    room = {name: (8 * documents, documents) for name in _schema().names}
    room |= {name: (4 * documents, 2 * documents) for name in _PER_DOCUMENT}
    room["l1_errors"] = (MAX_L1_BYTES * documents, documents)
    room["objects"] = (MAX_OBJECTS * MAX_DESCRIPTION_BYTES * documents, MAX_OBJECTS * documents)
    try:
        table = table_from_bytes(data, _schema(), room)
        per_shard = table["documents"].to_numpy().astype(np.int64)
        lists = {name: table[name].combine_chunks() for name in _PER_DOCUMENT}
        for name, column in lists.items():
            if column.null_count or not np.array_equal(column.value_lengths().to_numpy(), per_shard):
                raise ValueError(f"{name} has other lengths than documents")
        if not np.array_equal(table["shard"].to_numpy(), np.arange(table.num_rows)):
            raise ValueError("its shards are not numbered 0, 1, 2, ...")
        values = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in lists.items()}
        return ShardTable(
            objects=StoredObjects(table["objects"].combine_chunks()),
            documents_per_shard=per_shard,
            rows=values["document_rows"].astype(np.int64),
            text_bytes=values["document_text_bytes"].astype(np.int64),
            held_out=values["document_held_out"].astype(bool),
            records=table.select(["end_rows", "unscored_bytes", "l1_errors"]),
        )
    except (ValueError, TypeError) as error:
        if isinstance(error, CorruptCacheError):
            raise
        raise MalformedObjectError(f"{NAME}: {error}; {REMEDY}") from None


def doc_ids_to_object(records: Sequence[ShardRecord]) -> bytes:
    """documents.parquet of all shards' records, in order."""
    import pyarrow as pa

    ids = [bytes.fromhex(doc_id) for record in records for doc_id in record.doc_ids]
    return table_to_bytes(pa.table({"doc_id": pa.array(ids, pa.binary(32))}))


def doc_ids_from_object(data: bytes, documents: int) -> list[str]:
    """The ids of all documents, hex, of a verified object. Raises MalformedObjectError."""
    import pyarrow as pa

    try:
        room = {"doc_id": (32 * documents, documents)}
        table = table_from_bytes(data, pa.schema([("doc_id", pa.binary(32))]), room, documents)
        if table["doc_id"].null_count:
            raise ValueError("it has nulls")
        return [doc_id.hex() for doc_id in table["doc_id"].to_pylist()]
    except (ValueError, TypeError) as error:
        raise MalformedObjectError(f"{DOCUMENTS_NAME}: {error}; {REMEDY}") from None


_PER_DOCUMENT = ("document_rows", "document_text_bytes", "document_held_out")


def _schema() -> "pa.Schema":
    import pyarrow as pa

    stored = pa.struct([("name", pa.string()), ("size", pa.uint64()), ("crc32c", pa.uint32())])
    return pa.schema(
        [
            ("shard", pa.uint32()),
            ("documents", pa.uint32()),
            ("rows", pa.uint64()),
            ("text_bytes", pa.uint64()),
            ("end_rows", pa.uint64()),
            ("unscored_bytes", pa.uint64()),
            ("l1_errors", pa.string()),
            ("document_rows", pa.list_(pa.uint32())),
            ("document_text_bytes", pa.list_(pa.uint32())),
            ("document_held_out", pa.list_(pa.bool_())),
            ("objects", pa.list_(stored)),
        ]
    )
