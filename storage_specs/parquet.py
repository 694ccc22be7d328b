"""Parquet files as bytes: how every table of a cache is written and read back."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

MAX_UNCOMPRESSED_BYTES = 1 << 34


def table_to_bytes(table: "pa.Table", coding: dict[str, str] | None = None, rows_per_group: int | None = None) -> bytes:
    """A table as a Parquet file: zstd, page checksums, no dictionaries where a coding is given."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        column_encoding=coding,
        write_statistics=False,
        write_page_checksum=True,
        row_group_size=rows_per_group or max(1, table.num_rows),
    )
    return sink.getvalue().to_pybytes()


def table_from_bytes(data: bytes, schema: "pa.Schema", rows: int | None = None) -> "pa.Table":
    """The table of a verified Parquet file. Raises ValueError, before decoding it where schema or sizes are others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        if not file.schema_arrow.equals(schema):
            raise ValueError(f"its columns are {_types(file.schema_arrow)}, expected {_types(schema)}")
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > MAX_UNCOMPRESSED_BYTES:
            raise ValueError(f"it claims to decode to more than {MAX_UNCOMPRESSED_BYTES} bytes")
        if rows is not None and file.metadata.num_rows != rows:
            raise ValueError(f"it has {file.metadata.num_rows} rows, expected {rows}")
        table = file.read().combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not a readable Parquet file ({error})") from None
    return table


def _types(schema: Any) -> str:
    return ", ".join(f"{item.name}: {item.type}" for item in schema)
