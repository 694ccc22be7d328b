"""Parquet's page headers, held against what pyarrow decodes and against files that lie."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage_specs.parquet_pages import decoded_sizes

ROWS = 5000


def some_table() -> pa.Table:
    random = np.random.default_rng(0)
    lengths = random.integers(0, 4, ROWS)
    offsets = pa.array(np.cumsum([0, *lengths]), pa.int32())
    return pa.table(
        {
            "number": random.integers(0, 9, ROWS),
            "real": random.random(ROWS).astype(np.float32),
            "flag": random.random(ROWS) < 0.5,
            "list": pa.ListArray.from_arrays(offsets, pa.array(random.integers(0, 9, lengths.sum()))),
        }
    )


def strings() -> pa.Table:
    return pa.table({"text": ["", "a", "é" * 100, "teacher"] * (ROWS // 4)})


def written(table: pa.Table, **options: object) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def measured(data: bytes) -> tuple[int, int]:
    """(bytes of all columns, values of the longest)."""
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    sizes = decoded_sizes(metadata, range(metadata.num_row_groups), lambda start, size: data[start : start + size])
    return sum(size for size, _ in sizes.values()), max((values for _, values in sizes.values()), default=0)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_sizes_are_those_of_the_pages(version: str, compression: str, dictionary: bool) -> None:
    table = some_table()
    options = {"data_page_version": version, "use_dictionary": dictionary, "write_statistics": dictionary}
    more = {"row_group_size": 1000, "data_page_size": 2000, "write_page_checksum": True}
    data = written(table, compression=compression, **options, **more)
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    chunks = [metadata.row_group(group).column(column) for group in range(5) for column in range(4)]
    size, values = measured(data)
    claimed = sum(chunk.total_uncompressed_size for chunk in chunks)  # counts the page headers too
    assert 0.9 * claimed < size < claimed
    assert values == sum(chunk.num_values for chunk in chunks[3::4])  # an empty list counts as one value
    assert values == len(table["list"].combine_chunks().flatten()) + sum(not item for item in table["list"].to_pylist())


def test_strings_must_be_coded_so_that_pages_bound_them() -> None:
    for coding in ("PLAIN", "DELTA_LENGTH_BYTE_ARRAY"):
        size, values = measured(written(strings(), use_dictionary=False, column_encoding={"text": coding}))
        assert values == ROWS
        assert size > sum(len(text.encode()) for text in strings()["text"].to_pylist())
    for options in (
        {"use_dictionary": True},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    ):
        with pytest.raises(ValueError, match="nothing bounds what it decodes to"):
            measured(written(strings(), **options))


def test_no_rows_and_no_columns() -> None:
    assert measured(written(some_table().slice(0, 0)))[1] == 0
    assert measured(written(pa.table({}))) == (0, 0)


def damage(data: bytes) -> list[tuple[bytes, int]]:
    """Every single-bit flip of the first 40 bytes of the first column chunk: its first page header."""
    start = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0).column(0).data_page_offset
    flipped = []
    for place in range(start, start + 40):
        for bit in range(8):
            bad = bytearray(data)
            bad[place] ^= 1 << bit
            flipped.append((bytes(bad), place))
    return flipped


def test_damaged_page_headers_are_value_errors_or_count_what_they_claim() -> None:
    table = some_table().select(["number"])
    data = written(table, use_dictionary=False, compression="zstd", data_page_size=2000)
    good, refused = measured(data), 0
    for bad, _ in damage(data):
        try:
            size, values = measured(bad)
        except ValueError:
            refused += 1
        else:
            assert values == good[1]
            assert size >= 0
    assert refused > 40


def test_pages_that_end_too_early_or_too_late() -> None:
    data = written(some_table().select(["real"]), use_dictionary=False, compression="none")
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    for shift in (-1, 1, 7):
        with pytest.raises(ValueError, match=r"page header|pages of column|nested"):
            decoded_sizes(metadata, [0], lambda start, size, shift=shift: data[start + shift : start + shift + size])
    with pytest.raises(ValueError, match="cut off"):
        decoded_sizes(metadata, [0], lambda start, size: data[start : start + 3])
