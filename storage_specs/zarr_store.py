"""The Zarr v3 store: a shard is one group, `shards/000000.zarr`, of flat arrays under the sharding codec.

    documents  uint8   (bytes,)  JSON lines, one per document: doc_id, kind, messages, metadata, rows, text_bytes
    text       uint8   (bytes,)  the documents' texts, UTF-8, joined
    segment    uint32  (N,)      byte_start, byte_end: uint32 (N,)      is_end: bool (N,)
    gold_logprob float32 (N,)    probs: float16 (N, K)                  token_ids: uint32 (N, I), where ids are kept

Only codecs of the Zarr v3 specification: each array is one object (one outer chunk) of inner chunks coded
bytes (little endian) -> blosc (zstd, byte shuffle) -> crc32c. Every inner chunk is stored, also where it is all zero.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from storage_specs.columns import Columns, RowShape, ShardSize
from storage_specs.document import Document, canonical_json
from storage_specs.document_json import document_from_json, messages_to_json

SUFFIX = ".zarr"
IDS = "token_ids"
ROWS_PER_CHUNK = 4096
MAX_HEADER_BYTES = 1 << 30  # of the array `documents`
BYTES_PER_CHUNK = 1 << 20  # at most, decoded: wide rows (k near the vocabulary) share a chunk with fewer others


def encode(columns: Columns, stem: str) -> dict[str, bytes]:
    """{object name: bytes} of a shard; names start with `stem`. The same columns give the same bytes."""
    import zarr

    texts = [document.text.encode() for document in columns.documents]
    rows_D = np.diff(columns.row_offsets)
    lines = [
        canonical_json(
            {
                "doc_id": doc_id,
                "kind": document.kind,
                "messages": messages_to_json(document),
                "metadata": document.metadata,
                "rows": int(rows),
                "text_bytes": len(text),
            }
        )
        for doc_id, document, rows, text in zip(columns.doc_ids, columns.documents, rows_D, texts, strict=True)
    ]
    arrays = {
        "documents": (np.frombuffer(b"\n".join(lines), np.uint8), ("byte",)),
        "text": (np.frombuffer(b"".join(texts), np.uint8), ("byte",)),
        "segment": (columns.segment, ("row",)),
        "byte_start": (columns.byte_start, ("row",)),
        "byte_end": (columns.byte_end, ("row",)),
        "is_end": (columns.is_end, ("row",)),
        "gold_logprob": (columns.gold_logprob, ("row",)),
        "probs": (columns.probs, ("row", "rank")),
    }
    if columns.token_ids is not None:
        arrays[IDS] = (columns.token_ids, ("row", "rank"))
    contents: dict[str, Any] = {}
    group = zarr.create_group(zarr.storage.MemoryStore(contents), zarr_format=3)
    for name, (values, dimensions) in arrays.items():
        _write(group, name, values, dimensions)
    return {f"{stem}{SUFFIX}/{key}": buffer.to_bytes() for key, buffer in sorted(contents.items())}


def decode(contents: Mapping[str, bytes], stem: str, shape: RowShape, size: ShardSize) -> Columns:
    """The columns of verified objects; ids only where their objects are among them.

    Types, shapes and sizes are compared with what is expected before anything is allocated. Raises ValueError.
    """
    import zarr
    from zarr.core.buffer.cpu import Buffer

    prefix = f"{stem}{SUFFIX}/"
    store = {name.removeprefix(prefix): Buffer.from_bytes(data) for name, data in contents.items()}
    group = zarr.open_group(zarr.storage.MemoryStore(store), mode="r", zarr_format=3)

    def read(name: str, dtype: type, *lengths: int) -> np.ndarray:
        return _read(group, store.keys(), name, dtype, lengths)

    text = read("text", np.uint8, size.text_bytes).tobytes()
    header = read("documents", np.uint8, *_header_bytes(group)).tobytes()
    documents, doc_ids, rows = zip(*_documents(header, text, size), strict=True) if size.documents else ((), (), ())
    if sum(rows) != size.rows:
        raise ValueError(f"its documents have {sum(rows)} rows, expected {size.rows}")
    return Columns(
        documents=documents,
        doc_ids=doc_ids,
        row_offsets=np.cumsum([0, *rows], dtype=np.int64),
        segment=read("segment", np.uint32, size.rows),
        byte_start=read("byte_start", np.uint32, size.rows),
        byte_end=read("byte_end", np.uint32, size.rows),
        is_end=read("is_end", np.bool_, size.rows),
        gold_logprob=read("gold_logprob", np.float32, size.rows),
        probs=read("probs", np.float16, size.rows, shape.k),
        token_ids=read(IDS, np.uint32, size.rows, shape.k_ids) if f"{IDS}/zarr.json" in store else None,
    )


def holds_ids(name: str, stem: str) -> bool:
    """Whether an object of a shard is needed for its ids only."""
    return name.startswith(f"{stem}{SUFFIX}/{IDS}/")


def _header_bytes(group: Any) -> tuple[int, ...]:
    """The shape of `documents`, which nothing else tells, within its limit."""
    shape = group["documents"].shape
    if math.prod(shape) > MAX_HEADER_BYTES:
        raise ValueError(f"array documents holds {math.prod(shape)} bytes, above the limit of {MAX_HEADER_BYTES}")
    return shape


def _documents(header: bytes, text: bytes, size: ShardSize) -> Iterator[tuple[Document, str, int]]:
    """(document, doc_id, rows) of every line."""
    lines, position = header.split(b"\n"), 0
    if len(lines) != size.documents:
        raise ValueError(f"array documents has {len(lines)} lines, expected {size.documents}")
    for line in lines:
        entry = json.loads(line)
        start, position = position, position + entry["text_bytes"]
        if entry["text_bytes"] < 0 or entry["rows"] < 0 or position > len(text):
            raise ValueError("a document claims more text than there is, or a negative count")
        content = text[start:position].decode()
        document = document_from_json(entry["kind"], content, entry["messages"], entry["metadata"])
        yield document, entry["doc_id"], entry["rows"]
    if position != len(text):
        raise ValueError(f"its documents have {position} bytes of text, expected {len(text)}")


def _write(group: Any, name: str, values: np.ndarray, dimensions: tuple[str, ...]) -> None:
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

    row_bytes = values.itemsize * math.prod(values.shape[1:])
    longest = max(1, min(ROWS_PER_CHUNK if "row" in dimensions else BYTES_PER_CHUNK, BYTES_PER_CHUNK // row_bytes))
    inner = max(1, min(longest, len(values)))
    outer = max(1, -(-len(values) // inner)) * inner
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(inner, *values.shape[1:]),
        shards=(outer, *values.shape[1:]),
        serializer=BytesCodec(),
        compressors=[
            BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=values.itemsize),
            Crc32cCodec(),
        ],
        fill_value=0,
        dimension_names=dimensions,
        config={"write_empty_chunks": True},
    )
    if values.size:
        array[...] = values


def _read(group: Any, keys: Any, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    array = group[name]
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"array {name} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}")
    if math.prod(shape) == 0:
        return np.zeros(shape, dtype)
    if not any(key.startswith(f"{name}/c/") for key in keys):
        raise ValueError(f"array {name} has no chunk, and would read as zeros")
    return array[...]
