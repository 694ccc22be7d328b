"""The Arrow store: a shard is one Parquet file, `shards/000000.parquet`, one row per document with list columns.

    kind, text, messages (JSON), metadata (JSON): string
    the arrays of the rows: (N,) list<number>; (N, width) list<fixed_size_binary>, a row's numbers (little endian) in
    each, for pyarrow reads one binary in the time of two or three numbers of a list
    the ids in a file of their own, `shards/000000.ids.parquet`, and so each table, one row per entry

zstd pages with checksums, row groups of whole documents.

Legend: D documents, T rows of one document, N rows of all of them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from storage_specs.codecs.base import ArraySpec
from storage_specs.document import canonical_json
from storage_specs.document_json import document_from_json, messages_to_json
from storage_specs.parquet import Room, read_rows, table_to_object
from storage_specs.shard_bytes import EncodedObject, ShardBytes
from storage_specs.stored_shard import MAX_HEADER_BYTES, Selection, ShardArrays, ShardSize, StoredShard
from storage_specs.strict_json import strict_json

if TYPE_CHECKING:
    import pyarrow as pa

    from storage_specs.shard_record import ShardRecord

SUFFIX = ".parquet"
IDS = ".ids"
IN_IDS = frozenset({"id_low", "id_high"})
STRINGS = ("kind", "text", "messages", "metadata")
ROWS_PER_GROUP = 8192
MOST_GROUPS = 100  # of a file: its footer must be small


def encode(shard: StoredShard, wanted: ShardArrays, stem: str) -> dict[str, EncodedObject]:
    """{object name: its bytes and parts} of a shard; names start with `stem`. The same shard gives the same bytes."""
    import pyarrow as pa

    strings = {
        "kind": [document.kind for document in shard.documents],
        "text": [document.text for document in shard.documents],
        "messages": [canonical_json(messages_to_json(document)).decode() for document in shard.documents],
        "metadata": [canonical_json(document.metadata).decode() for document in shard.documents],
    }
    header = sum(len(text.encode()) for text in strings["messages"] + strings["metadata"])
    if header > MAX_HEADER_BYTES:
        raise ValueError(f"messages and metadata have {header} bytes, above {MAX_HEADER_BYTES}; use smaller shards")
    columns = {name: pa.array(values, pa.string()) for name, values in strings.items()}
    groups = _groups(shard.document_rows)
    contents = {}
    for name, specs in _files(wanted).items():
        lists = {spec.name: _lists(shard.arrays[spec.name], spec, shard.document_rows) for spec in specs}
        table = pa.table(lists if name else columns | lists)
        coding = {f"{spec.name}.list.element": _coding(spec) for spec in specs}
        contents[f"{stem}{name}{SUFFIX}"] = table_to_object(table, coding, groups)
    for name in wanted.tables:
        table = pa.table({name: pa.array(shard.tables[name], pa.uint32())})
        contents[f"{stem}.{name}{SUFFIX}"] = table_to_object(table)
    return contents


def decode(source: ShardBytes, stem: str, wanted: ShardArrays, size: ShardSize, selection: Selection) -> StoredShard:
    """The selected documents of a shard of `size`, with the wanted arrays.

    Types, rows and sizes are compared with what is expected before anything is allocated. Raises ValueError.
    """
    lengths, arrays, strings = {}, {}, {}
    for name, specs in _files(wanted).items():
        schema = _schema(specs, () if name else STRINGS)
        table = read_rows(
            source, f"{stem}{name}{SUFFIX}", schema, _room(specs, size), selection.documents, size.documents
        )
        strings |= {string: table[string].to_pylist() for string in (() if name else STRINGS)}
        for spec in specs:
            lengths[spec.name], arrays[spec.name] = _flat(table[spec.name], spec)
    if any(text is None for texts in strings.values() for text in texts):
        raise ValueError("a string is null")
    document_rows = lengths[wanted.arrays[0].name]
    if any(not np.array_equal(found, document_rows) for found in lengths.values()):
        raise ValueError("the arrays of a document have different numbers of rows")
    text_bytes = sum(len(text.encode()) for text in strings["text"])
    found, expected = (int(document_rows.sum()), text_bytes), (_count(selection.rows), _count(selection.text))
    if found != expected:
        raise ValueError(f"its documents have (rows, bytes of text) {found}, expected {expected}")
    return StoredShard(
        documents=tuple(
            document_from_json(kind, text, strict_json(messages), strict_json(metadata))
            for kind, text, messages, metadata in zip(*strings.values(), strict=True)
        ),
        document_rows=document_rows,
        arrays=arrays,
        tables={name: _table(source, f"{stem}.{name}{SUFFIX}", name, most) for name, most in wanted.tables.items()},
    )


def columns_of(name: str, stem: str) -> frozenset[str]:
    """The columns that an object of a shard holds; none for the file that every reader opens."""
    inside = name.removeprefix(stem).removesuffix(SUFFIX)
    return IN_IDS if inside == IDS else frozenset({inside[1:]} if inside else ())


def likely_chunks(name: str, stem: str, wanted: ShardArrays, record: "ShardRecord", selection: Selection) -> range:
    """The column chunks of the row groups of the selected documents; all of a table."""
    chunks = len(record.parts[name].sizes) - 1
    groups = _groups(np.array(record.document_rows))
    if columns_of(name, stem) & wanted.tables.keys() or not groups or chunks % len(groups):
        return range(chunks)
    group_D, columns = np.repeat(np.arange(len(groups)), groups), chunks // len(groups)
    chosen = group_D[selection.documents]
    return range(int(chosen[0]) * columns, (int(chosen[-1]) + 1) * columns)


def _files(wanted: ShardArrays) -> dict[str, list[ArraySpec]]:
    """The arrays of each file, by what its name has between stem and suffix."""
    files: dict[str, list[ArraySpec]] = {"": []}
    for spec in wanted.arrays:
        files.setdefault(IDS if spec.name in IN_IDS else "", []).append(spec)
    return files


def _groups(document_rows: np.ndarray) -> list[int]:
    """How many documents each row group holds: about ROWS_PER_GROUP rows (more in large shards), at least one."""
    rows_per_group = max(ROWS_PER_GROUP, -(-int(document_rows.sum()) // MOST_GROUPS))
    group_D = (np.cumsum(document_rows) - document_rows) // rows_per_group
    return np.unique(group_D, return_counts=True)[1].tolist()


def _schema(specs: Sequence[ArraySpec], strings: Sequence[str]) -> "pa.Schema":
    import pyarrow as pa

    lists = [(spec.name, pa.list_(_element(spec))) for spec in specs]
    return pa.schema([*((name, pa.string()) for name in strings), *lists])


def _room(specs: Sequence[ArraySpec], size: ShardSize) -> Room:
    """What each column of a shard may take."""
    most = {"kind": 16 * size.documents, "text": size.text_bytes}
    room = {name: (most.get(name, MAX_HEADER_BYTES), size.documents) for name in STRINGS}
    for spec in specs:
        room[spec.name] = (size.rows * (spec.width or 1) * spec.dtype.itemsize, size.rows + size.documents)
    return room


def _coding(spec: ArraySpec) -> str:
    """Byte-stream-split: all rows' first bytes side by side, then all second ones. Not where bytes follow their row."""
    along_rows = not spec.rank_major and spec.shuffle == "noshuffle"
    return "PLAIN" if along_rows or spec.dtype.kind == "b" else "BYTE_STREAM_SPLIT"


def _element(spec: ArraySpec) -> "pa.DataType":
    """What the lists of an array hold: numbers, or whole rows of them."""
    import pyarrow as pa

    return pa.from_numpy_dtype(spec.dtype) if spec.width is None else pa.binary(spec.width * spec.dtype.itemsize)


def _lists(values: np.ndarray, spec: ArraySpec, document_rows: np.ndarray) -> "pa.ListArray":
    """A list per document of all its numbers, or rows."""
    import pyarrow as pa

    if values.dtype != spec.dtype or values.shape != spec.shape(int(document_rows.sum())):
        raise ValueError(f"array {spec.name} is {values.dtype} {values.shape}")
    elements = pa.array(values) if spec.width is None else _binaries(np.ascontiguousarray(values), spec)
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *document_rows]).astype(np.int32)), elements)


def _binaries(values: np.ndarray, spec: ArraySpec) -> "pa.FixedSizeBinaryArray":
    import pyarrow as pa

    return pa.Array.from_buffers(_element(spec), len(values), [None, pa.py_buffer(values.view(np.uint8))])


def _flat(column: "pa.ChunkedArray", spec: ArraySpec) -> tuple[np.ndarray, np.ndarray]:
    """(D,) int64 rows of each document, and the array (N,) or (N, width) of all of them."""
    lists = column.combine_chunks()
    values = lists.flatten()
    if lists.null_count or values.null_count:
        raise ValueError(f"column {spec.name} has nulls")
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    if spec.width is None:
        return lengths, values.to_numpy(zero_copy_only=False)
    first, count = values.offset * spec.width, len(values) * spec.width
    numbers = np.frombuffer(values.buffers()[1] or b"", spec.dtype)[first : first + count]
    return lengths, numbers.reshape(-1, spec.width)


def _table(source: ShardBytes, name: str, column: str, most: int) -> np.ndarray:
    import pyarrow as pa

    table = read_rows(source, name, pa.schema([(column, pa.uint32())]), {column: (4 * most, most)}, most=most)
    if table[column].null_count:
        raise ValueError(f"{name} has nulls")
    return table[column].to_numpy()


def _count(span: slice) -> int:
    return span.stop - span.start
