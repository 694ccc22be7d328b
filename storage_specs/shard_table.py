"""The shard table, `shards.parquet`: all commit records gathered, so that every object is checked against one place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from storage_specs.columns import ShardSize
from storage_specs.errors import CorruptCacheError, MalformedObjectError
from storage_specs.parquet import table_from_bytes, table_to_bytes
from storage_specs.shard_record import ShardRecord
from storage_specs.stored_object import REMEDY, StoredObject

if TYPE_CHECKING:
    import pyarrow as pa

NAME = "shards.parquet"
SHARDS_PER_ROW_GROUP = 1024


@dataclass(frozen=True, kw_only=True)
class ShardTable:
    """Every shard of a finished cache, in order.

    objects: for each shard all its objects, its commit record last. documents_per_shard: int each. Of all documents in
    order: doc_ids, rows and text_bytes (D,) int64.
    """

    objects: tuple[tuple[StoredObject, ...], ...]
    documents_per_shard: tuple[int, ...]
    doc_ids: tuple[str, ...]
    rows: np.ndarray
    text_bytes: np.ndarray

    @cached_property
    def first_document(self) -> np.ndarray:
        """(shards + 1,) int64: the number of each shard's first document, and of all documents."""
        return np.cumsum([0, *self.documents_per_shard], dtype=np.int64)

    def documents_of(self, shard: int) -> slice:
        """The shard's documents among all."""
        return slice(*self.first_document[shard : shard + 2].tolist())

    def size_of(self, shard: int) -> ShardSize:
        members = self.documents_of(shard)
        return ShardSize(
            documents=self.documents_per_shard[shard],
            rows=int(self.rows[members].sum()),
            text_bytes=int(self.text_bytes[members].sum()),
        )


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
        columns["doc_ids"].append(record.doc_ids)
        columns["document_rows"].append(record.document_rows)
        columns["document_text_bytes"].append(record.document_text_bytes)
        columns["objects"].append([item.to_json() for item in stored])
    return table_to_bytes(pa.table(columns, schema=_schema()), rows_per_group=SHARDS_PER_ROW_GROUP)


def table_from_object(data: bytes) -> ShardTable:
    """The shard table of a verified object. Raises MalformedObjectError."""
    try:
        table = table_from_bytes(data, _schema())
        per_shard = table["documents"].to_pylist()
        lists = {name: table[name].combine_chunks() for name in ("doc_ids", "document_rows", "document_text_bytes")}
        for name, column in lists.items():
            if column.value_lengths().to_pylist() != per_shard:
                raise ValueError(f"{name} has other lengths than documents")
        if table["shard"].to_pylist() != list(range(table.num_rows)):
            raise ValueError("its shards are not numbered 0, 1, 2, ...")
        return ShardTable(
            objects=tuple(_objects_of(table["objects"].combine_chunks())),
            documents_per_shard=tuple(per_shard),
            doc_ids=tuple(lists["doc_ids"].flatten().to_pylist()),
            rows=lists["document_rows"].flatten().to_numpy(zero_copy_only=False).astype(np.int64),
            text_bytes=lists["document_text_bytes"].flatten().to_numpy(zero_copy_only=False).astype(np.int64),
        )
    except (ValueError, TypeError) as error:
        if isinstance(error, CorruptCacheError):
            raise
        raise MalformedObjectError(f"{NAME}: {error}; {REMEDY}") from None


def _objects_of(column: "pa.ListArray") -> Iterator[tuple[StoredObject, ...]]:
    for items in column:
        yield tuple(StoredObject.from_json(item, NAME) for item in items.as_py())


def _schema() -> "pa.Schema":
    import pyarrow as pa

    stored = pa.struct([("name", pa.string()), ("size", pa.uint64()), ("crc32c", pa.uint32())])
    return pa.schema(
        [
            ("shard", pa.uint32()),
            ("documents", pa.uint32()),
            ("rows", pa.uint64()),
            ("text_bytes", pa.uint64()),
            ("doc_ids", pa.list_(pa.string())),
            ("document_rows", pa.list_(pa.uint32())),
            ("document_text_bytes", pa.list_(pa.uint32())),
            ("objects", pa.list_(stored)),
        ]
    )
