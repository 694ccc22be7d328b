"""The Arrow store: a shard is one Parquet file, `shards/000000.parquet`, one row per document with list columns.

    doc_id, kind, text, messages (JSON), metadata (JSON): string
    segment, byte_start, byte_end: list<uint32>    is_end: list<bool>    gold_logprob: list<float>
    probs: list<fixed_size_list<halffloat>[K]>
    token_ids: list<fixed_size_list<uint32>[I]>, in a file of its own, `shards/000000.ids.parquet`, where ids are kept

zstd pages with checksums; byte-stream-split for probs and gold_logprob, delta for byte_start and byte_end.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from storage_specs.columns import Columns, RowShape, ShardSize
from storage_specs.document import canonical_json
from storage_specs.document_json import document_from_json, messages_to_json
from storage_specs.parquet import table_from_bytes, table_to_bytes

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIX = ".parquet"
IDS_SUFFIX = ".ids.parquet"
ROW_CODING = {
    "byte_start.list.element": "DELTA_BINARY_PACKED",
    "byte_end.list.element": "DELTA_BINARY_PACKED",
    "gold_logprob.list.element": "BYTE_STREAM_SPLIT",
    "probs.list.element.list.element": "BYTE_STREAM_SPLIT",
}


def encode(columns: Columns, stem: str) -> dict[str, bytes]:
    """{object name: bytes} of a shard; names start with `stem`. The same columns give the same bytes."""
    import pyarrow as pa

    documents = columns.documents
    ragged = _Ragged(columns.row_offsets)
    table = pa.table(
        {
            "doc_id": pa.array(columns.doc_ids, pa.string()),
            "kind": pa.array([document.kind for document in documents], pa.string()),
            "text": pa.array([document.text for document in documents], pa.string()),
            "messages": pa.array(
                [canonical_json(messages_to_json(document)).decode() for document in documents], pa.string()
            ),
            "metadata": pa.array([canonical_json(document.metadata).decode() for document in documents], pa.string()),
            "segment": ragged.of(columns.segment),
            "byte_start": ragged.of(columns.byte_start),
            "byte_end": ragged.of(columns.byte_end),
            "is_end": ragged.of(columns.is_end),
            "gold_logprob": ragged.of(columns.gold_logprob),
            "probs": ragged.of(columns.probs),
        }
    )
    contents = {stem + SUFFIX: table_to_bytes(table, ROW_CODING)}
    if columns.token_ids is not None:
        contents[stem + IDS_SUFFIX] = table_to_bytes(pa.table({"token_ids": ragged.of(columns.token_ids)}))
    return contents


def decode(contents: Mapping[str, bytes], stem: str, shape: RowShape, size: ShardSize) -> Columns:
    """The columns of verified objects; ids only where their object is among them.

    Types, rows and sizes are compared with what is expected before anything is allocated. Raises ValueError.
    """

    table = table_from_bytes(contents[stem + SUFFIX], _schema(shape), size.documents)
    texts = table["text"].to_pylist()
    if sum(len(text.encode()) for text in texts) != size.text_bytes:
        raise ValueError(f"its texts have not the expected {size.text_bytes} bytes")
    offsets_D1 = _offsets(table["segment"])
    if offsets_D1[-1] != size.rows:
        raise ValueError(f"its documents have {offsets_D1[-1]} rows, expected {size.rows}")

    def flat(name: str, source: "pa.Table" = table) -> np.ndarray:
        return _flat(source[name], name, offsets_D1)

    token_ids_NI = None
    if stem + IDS_SUFFIX in contents:
        ids = table_from_bytes(contents[stem + IDS_SUFFIX], _ids_schema(shape), size.documents)
        token_ids_NI = flat("token_ids", ids)
    return Columns(
        documents=tuple(
            document_from_json(kind, text, json.loads(messages), json.loads(metadata))
            for kind, text, messages, metadata in zip(
                table["kind"].to_pylist(),
                texts,
                table["messages"].to_pylist(),
                table["metadata"].to_pylist(),
                strict=True,
            )
        ),
        doc_ids=tuple(table["doc_id"].to_pylist()),
        row_offsets=offsets_D1,
        segment=flat("segment"),
        byte_start=flat("byte_start"),
        byte_end=flat("byte_end"),
        is_end=flat("is_end"),
        gold_logprob=flat("gold_logprob"),
        probs=flat("probs"),
        token_ids=token_ids_NI,
    )


def holds_ids(name: str, stem: str) -> bool:
    """Whether an object of a shard is needed for its ids only."""
    return name == stem + IDS_SUFFIX


class _Ragged:
    """Cuts flat arrays into list columns, one list per document."""

    def __init__(self, offsets_D1: np.ndarray) -> None:
        import pyarrow as pa

        self.offsets = pa.array(offsets_D1.astype(np.int32))

    def of(self, values: np.ndarray) -> "pa.ListArray":
        import pyarrow as pa

        flat = pa.array(values.reshape(-1))
        if values.ndim == 2:
            flat = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        return pa.ListArray.from_arrays(self.offsets, flat)


def _schema(shape: RowShape) -> "pa.Schema":
    import pyarrow as pa

    return pa.schema(
        [(name, pa.string()) for name in ("doc_id", "kind", "text", "messages", "metadata")]
        + [(name, pa.list_(pa.uint32())) for name in ("segment", "byte_start", "byte_end")]
        + [
            ("is_end", pa.list_(pa.bool_())),
            ("gold_logprob", pa.list_(pa.float32())),
            ("probs", pa.list_(pa.list_(pa.float16(), shape.k))),
        ]
    )


def _ids_schema(shape: RowShape) -> "pa.Schema":
    import pyarrow as pa

    return pa.schema([("token_ids", pa.list_(pa.list_(pa.uint32(), shape.k_ids)))])


def _offsets(column: "pa.ChunkedArray") -> np.ndarray:
    if column.null_count:
        raise ValueError("a list column has nulls")
    lengths = column.combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
    return np.cumsum([0, *lengths], dtype=np.int64)


def _flat(column: "pa.ChunkedArray", name: str, offsets_D1: np.ndarray) -> np.ndarray:
    """The values of a list column as a flat array, (N,) or (N, width)."""
    import pyarrow as pa

    lists = column.combine_chunks()
    values = lists.flatten()
    if values.null_count or not np.array_equal(_offsets(column), offsets_D1):
        raise ValueError(f"column {name} has nulls, or other lengths than column segment")
    if not pa.types.is_fixed_size_list(values.type):
        return values.to_numpy(zero_copy_only=False)
    inner = values.flatten()
    if inner.null_count:
        raise ValueError(f"column {name} has nulls")
    return inner.to_numpy(zero_copy_only=False).reshape(len(values), values.type.list_size)
