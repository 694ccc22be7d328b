"""The Zarr v3 store: a shard is one group, `shards/000000.zarr`, of flat arrays under the sharding codec.

    documents   uint8   (bytes,)    JSON lines, one per document: kind, messages, metadata, rows, text_bytes
    text        uint8   (bytes,)    the documents' texts, UTF-8, joined
    and the arrays of the rows, (N,) or (N, width), and the tables, (any,) uint32

Only codecs of the Zarr v3 specification: each array is one object (one outer chunk) of inner chunks, which
`zarr_chunks` codes. Every inner chunk is stored, also where it is all zero.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from storage_specs import zarr_chunks
from storage_specs.codecs.base import ArraySpec
from storage_specs.document import Document, canonical_json
from storage_specs.document_json import document_from_json, messages_to_json
from storage_specs.shard_bytes import EncodedObject, ShardBytes
from storage_specs.stored_shard import MAX_HEADER_BYTES, Selection, ShardArrays, ShardSize, StoredShard
from storage_specs.strict_json import strict_json

if TYPE_CHECKING:
    from storage_specs.shard_record import ShardRecord

SUFFIX = ".zarr"
ROWS_PER_CHUNK = 4096
BYTES_PER_CHUNK = 1 << 18  # of documents and text


def _flat(name: str, dtype: type) -> ArraySpec:
    return ArraySpec(name=name, dtype=np.dtype(dtype), width=None, rank_major=False, shuffle="noshuffle")


DOCUMENTS, TEXT = _flat("documents", np.uint8), _flat("text", np.uint8)


def encode(shard: StoredShard, wanted: ShardArrays, stem: str) -> dict[str, EncodedObject]:
    """{object name: its bytes and parts} of a shard; names start with `stem`. The same shard gives the same bytes."""
    texts = [document.text.encode() for document in shard.documents]
    lines = [
        canonical_json(
            {
                "kind": document.kind,
                "messages": messages_to_json(document),
                "metadata": document.metadata,
                "rows": int(rows),
                "text_bytes": len(text),
            }
        )
        for document, rows, text in zip(shard.documents, shard.document_rows, texts, strict=True)
    ]
    prefix = f"{stem}{SUFFIX}/"
    contents = {f"{prefix}zarr.json": EncodedObject(zarr_chunks.GROUP)}
    header = b"\n".join(lines)
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(
            f"messages and metadata have {len(header)} bytes, above {MAX_HEADER_BYTES}; use smaller shards"
        )
    for spec, data in ((DOCUMENTS, header), (TEXT, b"".join(texts))):
        values = np.frombuffer(data, np.uint8)
        contents |= zarr_chunks.encode(f"{prefix}{spec.name}", values, spec, BYTES_PER_CHUNK)
    for spec in wanted.arrays:
        contents |= zarr_chunks.encode(f"{prefix}{spec.name}", shard.arrays[spec.name], spec, ROWS_PER_CHUNK)
    for name in wanted.tables:
        contents |= zarr_chunks.encode(f"{prefix}{name}", shard.tables[name], _flat(name, np.uint32), BYTES_PER_CHUNK)
    return contents


def decode(source: ShardBytes, stem: str, wanted: ShardArrays, size: ShardSize, selection: Selection) -> StoredShard:
    """The selected documents of a shard of `size`, with the wanted arrays.

    Types, shapes and sizes are compared with what is expected before anything is allocated. Raises ValueError.
    """

    zarr_chunks.check_group(source, f"{stem}{SUFFIX}")

    def read(spec: ArraySpec, length: int, start: int, stop: int) -> np.ndarray:
        return zarr_chunks.decode(source, f"{stem}{SUFFIX}/{spec.name}", spec, length, start, stop)

    def read_all(spec: ArraySpec, most: int) -> np.ndarray:
        length = zarr_chunks.length_of(source, f"{stem}{SUFFIX}/{spec.name}")
        if length > most:
            raise ValueError(f"array {spec.name} has {length} entries, above the limit of {most}")
        return read(spec, length, 0, length)

    header = read_all(DOCUMENTS, MAX_HEADER_BYTES).tobytes()
    lines = header.split(b"\n") if size.documents else []
    if len(lines) != size.documents:
        raise ValueError(f"array documents has {len(lines)} lines, expected {size.documents}")
    entries = [strict_json(line) for line in lines[selection.documents]]
    text = read(TEXT, size.text_bytes, selection.text.start, selection.text.stop).tobytes()
    rows = np.array([entry["rows"] for entry in entries], np.int64)
    expected = selection.rows.stop - selection.rows.start
    if (rows < 0).any() or rows.sum() != expected:
        raise ValueError(f"its documents have {rows.sum()} rows, expected {expected}")
    return StoredShard(
        documents=tuple(_documents(entries, text)),
        document_rows=rows,
        arrays={spec.name: read(spec, size.rows, selection.rows.start, selection.rows.stop) for spec in wanted.arrays},
        tables={name: read_all(_flat(name, np.uint32), most) for name, most in wanted.tables.items()},
    )


def columns_of(name: str, stem: str) -> frozenset[str]:
    """The column that an object of a shard belongs to; none for what belongs to all."""
    inside = name.removeprefix(f"{stem}{SUFFIX}/")
    return frozenset({inside.partition("/")[0]} if "/" in inside else ())


def likely_chunks(name: str, stem: str, wanted: ShardArrays, record: "ShardRecord", selection: Selection) -> range:
    """The inner chunks of the selected rows or bytes of text, all of which are equally long but the last."""
    chunks = len(record.parts[name].sizes) - 1
    column = next(iter(columns_of(name, stem)), "")
    if column == TEXT.name:
        entries, span = sum(record.document_text_bytes), selection.text
    elif column in {spec.name for spec in wanted.arrays}:
        entries, span = sum(record.document_rows), selection.rows
    else:
        return range(chunks)
    inner = max(1, -(-entries // chunks))
    return range(min(chunks, span.start // inner), min(chunks, -(-span.stop // inner)))


def _documents(entries: Sequence[dict[str, Any]], text: bytes) -> Iterator[Document]:
    position = 0
    for entry in entries:
        start, position = position, position + entry["text_bytes"]
        if entry["text_bytes"] < 0 or position > len(text):
            raise ValueError("a document claims more text than there is, or less than none")
        content = text[start:position].decode()
        yield document_from_json(entry["kind"], content, entry["messages"], entry["metadata"])
    if position != len(text):
        raise ValueError(f"its documents have {position} bytes of text, expected {len(text)}")
