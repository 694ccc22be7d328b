"""Parquet files as bytes: how every table of a cache is written and read back.

A file's pages are measured before they are decoded, against the room that its reader gives each column.

Legend: a part is a range of an object with a checksum of its own (`shard_bytes`). Room: {column: (bytes, values)}, the
most that its values may take uncompressed, and the most of them; numbers in lists, and the lists without any, are
values.
"""

import io
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from storage_specs.parquet_pages import MAX_PAGE_HEADER_BYTES, decoded_sizes
from storage_specs.shard_bytes import EncodedObject, ShardBytes, WholeObjects

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_FOOTER_BYTES = 1 << 18  # a footer becomes up to 230 times its size in memory
MAGIC = b"PAR1"
Room = Mapping[str, tuple[int, int]]


def table_to_bytes(table: "pa.Table", rows_per_group: int | None = None) -> bytes:
    """A table as a Parquet file: zstd, page checksums, no dictionaries."""
    groups = [rows_per_group] * (table.num_rows // rows_per_group) if rows_per_group else []
    rest = table.num_rows - sum(groups)
    return table_to_object(table, groups=[*groups, *([rest] if rest else [])]).data


def table_to_object(
    table: "pa.Table", coding: dict[str, str] | None = None, groups: Sequence[int] | None = None
) -> EncodedObject:
    """A table as a Parquet file, cut into its column chunks and its footer.

    coding: Parquet's encoding by column path; plain where none is given. groups: rows of each row group. Small pages,
    each with an entropy code of its own, suit columns whose bytes change their nature from rank to rank.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=15,
        data_page_size=1 << 17,
        use_dictionary=False,
        column_encoding=coding or None,
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        start = 0
        for rows in groups or [table.num_rows]:
            writer.write_table(table.slice(start, rows), row_group_size=max(1, rows))
            start += rows
    data = sink.getvalue().to_pybytes()
    return EncodedObject(data, _part_sizes(data))


def table_from_bytes(data: bytes, schema: "pa.Schema", room: Room, rows: int | None = None) -> "pa.Table":
    """The table of a verified Parquet file. Raises ValueError, before decoding it where schema or sizes are others."""
    return read_rows(WholeObjects({"": data}), "", schema, room, count=rows)


def read_rows(
    source: ShardBytes,
    name: str,
    schema: "pa.Schema",
    room: Room,
    wanted: slice | None = None,
    count: int | None = None,
    most: int | None = None,
) -> "pa.Table":
    """The `wanted` rows (all) of a Parquet file that must have `schema`, and `count` rows, or `most` at the most.

    Only the row groups that hold them are read. Raises ValueError, before decoding where schema or sizes are others.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = _footer(source, name)
        found = metadata.schema.to_arrow_schema()
        if not found.equals(schema) or any(map(_is_marked, found)):
            raise ValueError(f"its columns are {_types(found)}, expected {_types(schema)} without metadata")
        rows = metadata.num_rows
        if rows != (rows if count is None else count) or rows > (rows if most is None else most):
            raise ValueError(f"it has {rows} rows, expected {most if count is None else count}")
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        ends = list(accumulate(sizes))
        wanted = wanted or slice(0, rows)
        groups = [n for n, end in enumerate(ends) if end > wanted.start and end - sizes[n] < wanted.stop]
        _check_room(decoded_sizes(metadata, groups, lambda start, size: source.read(name, start, start + size)), room)
        if len(groups) == len(sizes):
            file: Any = pa.BufferReader(source.read(name))
        else:
            file = pa.PythonFile(_Ranges(source, name), mode="r")
        opened = pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True, pre_buffer=False)
        table = opened.read_row_groups(groups, use_threads=False).combine_chunks()
        before = ends[groups[0]] - sizes[groups[0]] if groups else 0
        return table.slice(wanted.start - before, wanted.stop - wanted.start)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not a readable Parquet file ({error})") from None


def _check_room(sizes: Room, room: Room) -> None:
    """Raises ValueError where columns would take more than they may; codings and levels may add a little."""
    for column, (size, values) in sizes.items():
        most_bytes, most_values = room[column]
        if values > most_values or size > most_bytes + most_bytes // 8 + 16 * values + MAX_PAGE_HEADER_BYTES:
            raise ValueError(
                f"column {column} has {values} values in {size} bytes uncompressed, expected at most {most_values} in "
                f"{most_bytes}"
            )


class _Ranges(io.RawIOBase):
    """An object of a shard as a file: what is read of it was verified."""

    def __init__(self, source: ShardBytes, name: str) -> None:
        self._source, self._name, self._place = source, name, 0
        self._size = source.size(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset + {0: 0, 1: self._place, 2: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size < 0 else min(self._size, self._place + size)
        data = bytes(self._source.read(self._name, self._place, stop))
        self._place = stop
        return data


def _footer(source: ShardBytes, name: str) -> "pq.FileMetaData":
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = source.size(name)
    if size < 12:
        raise ValueError(f"{size} bytes are no Parquet file")
    length = int.from_bytes(source.read(name, size - 8, size - 4), "little") + 8
    if not 8 < length <= size - 4:
        raise ValueError(f"its footer claims {length} bytes of {size}")
    if length > MAX_FOOTER_BYTES:
        raise ValueError(f"its footer has {length} bytes, above the limit of {MAX_FOOTER_BYTES}: too many row groups")
    # pyarrow asks for a whole file; of this one it needs only the end
    return pq.read_metadata(pa.BufferReader(MAGIC + bytes(source.read(name, size - length, size))))


def _part_sizes(data: bytes) -> list[int]:
    """Sizes of the column chunks, the first with the magic number before it, and of the footer."""
    source = WholeObjects({"": data})
    metadata, footer = _footer(source, ""), int.from_bytes(data[-8:-4], "little") + 8
    columns = [
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    starts = sorted(column.data_page_offset for column in columns)
    cuts = [0, *starts[1:], len(data) - footer, len(data)]
    return [stop - start for start, stop in pairwise(cuts)]


def _is_marked(field: "pa.Field") -> bool:
    """Whether a field or one inside it has metadata: they may name a Python type that a reader would revive."""
    inner = (field.type.field(number) for number in range(field.type.num_fields))
    return bool(field.metadata) or any(map(_is_marked, inner))


def _types(schema: Any) -> str:
    return ", ".join(f"{item.name}: {item.type}" for item in schema)
