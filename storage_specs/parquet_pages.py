"""What a Parquet file would decode to, read from its page headers before anything is decompressed.

A decoder allocates what each page's own header claims, whatever the footer says: a few bytes may claim gigabytes, and a
dictionary, a run length or a delta of width 0 may stand for any number of values. Source: parquet-format, PageHeader in
parquet.thrift; thrift-compact-protocol.md for its bytes.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow.parquet as pq

MAX_PAGE_HEADER_BYTES = 1 << 16  # of one page; ours have no statistics and take some 30
MAX_DEPTH = 8  # of structs in a page header; the format needs 3
# PLAIN, DELTA_LENGTH_BYTE_ARRAY. Dictionaries and DELTA_BYTE_ARRAY repeat a string at will: nothing bounds their size.
BOUNDED_STRINGS = (0, 6)
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_DATA_PAGE, _INDEX_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = range(4)
# Page type -> its own header's field, and where in that the encoding of values stands.
_HEADER_OF = {_DATA_PAGE: (5, 2), _DICTIONARY_PAGE: (7, 2), _DATA_PAGE_V2: (8, 4)}


def decoded_sizes(
    metadata: "pq.FileMetaData", groups: Iterable[int], read: Callable[[int, int], bytes | memoryview]
) -> dict[str, tuple[int, int]]:
    """{column: (bytes, values)} that the pages of these row groups hold, decompressed; columns by their first name.

    `read(start, size)` gives the file's bytes. Raises ValueError where pages do not tile their column chunks, hold
    other numbers of values than the footer says, or are coded in a way that does not bound what they decode to.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for group in groups:
        columns = metadata.row_group(group)
        for column in range(metadata.num_columns):
            chunk = columns.column(column)
            size, count = _pages(chunk, read) if chunk.num_values else (0, 0)  # no page of an empty one is ever read
            if count != chunk.num_values:
                raise ValueError(
                    f"pages of column {chunk.path_in_schema} hold {count} values, the footer says {chunk.num_values}"
                )
            name = chunk.path_in_schema.partition(".")[0]
            before = sizes.get(name, (0, 0))
            sizes[name] = (before[0] + size, before[1] + count)
    return sizes


def _pages(chunk: "pq.ColumnChunkMetaData", read: Callable[[int, int], bytes | memoryview]) -> tuple[int, int]:
    """(uncompressed bytes, values) of a column chunk's pages."""
    start = chunk.data_page_offset
    if chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    end, total, values = start + chunk.total_compressed_size, 0, 0
    if start < 4 or chunk.total_compressed_size < 0:
        raise ValueError(f"column {chunk.path_in_schema} lies at byte {start}, {chunk.total_compressed_size} long")
    while start < end:
        try:
            header, used = _struct(read(start, min(MAX_PAGE_HEADER_BYTES, end - start)), 0, 0)
        except IndexError:
            raise ValueError(f"column {chunk.path_in_schema}: a page header at byte {start} is cut off") from None
        field, encoding = _HEADER_OF.get(header.get(1), (0, 0))
        inner = header.get(field)
        numbers = [header.get(2), header.get(3), *((inner.get(1), inner.get(encoding)) if type(inner) is dict else ())]
        if len(numbers) != 4 or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"column {chunk.path_in_schema}: a page header at byte {start} makes no sense")
        uncompressed, compressed, count, coding = numbers
        is_dictionary = header[1] == _DICTIONARY_PAGE
        if chunk.physical_type == "BYTE_ARRAY" and (is_dictionary or coding not in BOUNDED_STRINGS):
            raise ValueError(f"column {chunk.path_in_schema} is coded so that nothing bounds what it decodes to")
        start, total = start + used + compressed, total + uncompressed
        values += 0 if is_dictionary else count
    if start != end:
        raise ValueError(f"pages of column {chunk.path_in_schema} end at byte {start}, their column chunk at {end}")
    return total, values


def _struct(data: bytes | memoryview, position: int, depth: int) -> tuple[dict[int, Any], int]:
    """({field: value}, position after it) of a Thrift struct in compact protocol. IndexError where it is cut off."""
    if depth > MAX_DEPTH:
        raise ValueError("a page header is nested too deep")
    fields: dict[int, Any] = {}
    number = 0
    while data[position]:
        kind, step = data[position] & 0x0F, data[position] >> 4
        position += 1
        if step:
            number += step
        else:
            number, position = _zigzag(data, position)
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        else:
            fields[number], position = _value(data, position, kind, depth)
    return fields, position + 1


def _value(data: bytes | memoryview, position: int, kind: int, depth: int) -> tuple[Any, int]:
    """(value, position after it); lists, sets and maps have no place in a page header."""
    if kind in (_I16, _I32, _I64):
        return _zigzag(data, position)
    if kind == _STRUCT:
        return _struct(data, position, depth + 1)
    if kind == _BINARY:
        size, position = _varint(data, position)
    elif kind in (_BYTE, _DOUBLE):
        size = 1 if kind == _BYTE else 8
    else:
        raise ValueError(f"a page header has a field of Thrift type {kind}")
    if position + size > len(data):
        raise IndexError
    return bytes(data[position : position + size]), position + size


def _zigzag(data: bytes | memoryview, position: int) -> tuple[int, int]:
    number, position = _varint(data, position)
    return (number >> 1) ^ -(number & 1), position


def _varint(data: bytes | memoryview, position: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[position]
        number, shift, position = number | (byte & 0x7F) << shift, shift + 7, position + 1
        if byte < 0x80:
            return number, position
        if shift > 63:
            raise ValueError("a page header has a number of more than 64 bits")
