"""Both stores: the same columns back, the same values in both, the same bytes each time, nothing decoded unseen."""

import json
import struct
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from small_caches import STORES, some_documents
from zarr.core.buffer.cpu import Buffer

from storage_specs import zarr_store
from storage_specs.column_building import columns_of
from storage_specs.column_rules import problem_of
from storage_specs.columns import Columns, RowShape
from storage_specs.stores import shard_store, stem_of

SHAPE = RowShape(k=8, k_ids=4, vocab_size=300)
STEM = stem_of(7)
FLAT = ("row_offsets", "segment", "byte_start", "byte_end", "is_end", "gold_logprob", "probs", "token_ids")


def assert_same(first: Columns, second: Columns) -> None:
    """Bit for bit, types included."""
    assert first.doc_ids == second.doc_ids
    for one, other in zip(first.documents, second.documents, strict=True):
        assert (one.kind, one.text, one.messages, one.metadata) == (
            other.kind,
            other.text,
            other.messages,
            other.metadata,
        )
    for name in FLAT:
        one, other = getattr(first, name), getattr(second, name)
        if one is None or other is None:
            assert one is other is None
            continue
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert one.tobytes() == other.tobytes(), name


def encoded(store: str, columns: Columns, shape: RowShape = SHAPE) -> Columns:
    """There and back."""
    codec = shard_store(store)
    return codec.decode(codec.encode(columns, STEM), STEM, shape, columns.size)


@pytest.mark.parametrize("store", STORES)
def test_columns_come_back_bit_for_bit(store: str) -> None:
    columns, _ = columns_of(some_documents(9), SHAPE)
    assert_same(columns, encoded(store, columns))


def test_both_stores_hold_the_same() -> None:
    columns, _ = columns_of(some_documents(9, seed=3), SHAPE)
    assert_same(encoded("zarr", columns), encoded("arrow", columns))


@pytest.mark.parametrize("store", STORES)
def test_the_same_columns_give_the_same_bytes(store: str) -> None:
    codec = shard_store(store)
    first, second = (codec.encode(columns_of(some_documents(5), SHAPE)[0], STEM) for _ in range(2))
    assert first == second
    assert all(name.startswith(f"{STEM}.") for name in first)


@pytest.mark.parametrize("store", STORES)
def test_no_rows_at_all(store: str) -> None:
    columns, _ = columns_of([some_documents(2)[1]] * 3, SHAPE)
    assert_same(columns, encoded(store, columns))
    nothing = replace(some_documents(2)[1], text="", messages=())
    columns, _ = columns_of([nothing], SHAPE)
    assert_same(columns, encoded(store, columns))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("vocab_size", [151_936, 262_144, 2**32])
def test_ids_of_large_vocabularies(store: str, vocab_size: int) -> None:
    shape = RowShape(k=8, k_ids=4, vocab_size=vocab_size)
    document = some_documents(1)[0]
    ids_TI = document.token_ids.copy()
    ids_TI[:, 0] = np.linspace(131_072, vocab_size - 1, len(ids_TI)).astype(np.int64)
    columns, _ = columns_of([replace(document, token_ids=ids_TI)], shape)
    read = encoded(store, columns, shape)
    assert_same(columns, read)
    assert np.array_equal(read.document(0).token_ids, ids_TI)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("k", "k_ids"), [(1, 0), (1, 1), (300, 300), (64, 0)])
def test_few_ranks_and_all(store: str, k: int, k_ids: int) -> None:
    shape = RowShape(k=k, k_ids=k_ids, vocab_size=300)
    columns, _ = columns_of(some_documents(4, k=k, k_ids=k_ids), shape)
    assert_same(columns, encoded(store, columns, shape))


@pytest.mark.parametrize("store", STORES)
def test_many_chunks(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr_store, "ROWS_PER_CHUNK", 16)
    monkeypatch.setattr(zarr_store, "BYTES_PER_CHUNK", 64)
    columns, _ = columns_of(some_documents(9, words=12), SHAPE)
    assert len(columns.segment) > 64
    assert_same(columns, encoded(store, columns))


@pytest.mark.parametrize("store", STORES)
def test_ids_lie_in_objects_of_their_own(store: str) -> None:
    codec = shard_store(store)
    columns, _ = columns_of(some_documents(3), SHAPE)
    contents = codec.encode(columns, STEM)
    others = {name: data for name, data in contents.items() if not codec.holds_ids(name, STEM)}
    assert 0 < len(others) < len(contents)
    read = codec.decode(others, STEM, SHAPE, columns.size)
    assert read.token_ids is None
    assert_same(replace(columns, token_ids=None), read)
    without, _ = columns_of([replace(d, token_ids=None) for d in some_documents(3)], replace(SHAPE, k_ids=0))
    assert codec.encode(without, STEM) == others


@pytest.mark.parametrize("store", STORES)
def test_other_types_and_sizes_are_refused(store: str) -> None:
    codec = shard_store(store)
    columns, _ = columns_of(some_documents(3), SHAPE)
    contents = codec.encode(columns, STEM)
    size = columns.size
    for wrong in ("documents", "rows", "text_bytes"):
        with pytest.raises(ValueError, match=r"expected|array"):
            codec.decode(contents, STEM, SHAPE, replace(size, **{wrong: getattr(size, wrong) + 1}))
    for shape in (replace(SHAPE, k=7), replace(SHAPE, k_ids=3)):
        with pytest.raises(ValueError, match="expected"):
            codec.decode(contents, STEM, shape, size)
    for changed in (
        replace(columns, segment=columns.segment.astype(np.int32)),
        replace(columns, gold_logprob=columns.gold_logprob.astype(np.float64)),
        replace(columns, probs=columns.probs.astype(np.float32)),
        replace(columns, token_ids=columns.token_ids.astype(np.uint64)),
    ):
        with pytest.raises(ValueError, match="expected"):
            codec.decode(codec.encode(changed, STEM), STEM, SHAPE, size)


@pytest.mark.parametrize("store", STORES)
def test_rules_are_checked_on_what_was_decoded(store: str) -> None:
    """A shard whose bytes verify may still lie; each rule is tested in test_columns, here that decoding hides none."""
    columns, _ = columns_of(some_documents(3), SHAPE)
    for changed in (
        replace(columns, probs=columns.probs[:, ::-1].copy()),
        replace(columns, byte_end=columns.byte_end + np.uint32(1000)),
        replace(columns, token_ids=columns.token_ids + np.uint32(300)),
    ):
        assert problem_of(encoded(store, changed), SHAPE) is not None


@pytest.mark.parametrize("store", STORES)
def test_documents_that_are_none_are_refused(store: str) -> None:
    columns, _ = columns_of(some_documents(3), SHAPE)
    for change, message in (
        ({"kind": "poem"}, "kind 'poem'"),
        ({"metadata": [1]}, "metadata"),
        ({"messages": (replace(columns.documents[0].messages[0], scored=1),)}, "a message must have"),
        ({"messages": (replace(columns.documents[0].messages[0], byte_start="0"),)}, "a message must have"),
    ):
        documents = (replace(columns.documents[0], **change), *columns.documents[1:])
        with pytest.raises(ValueError, match=message):
            encoded(store, replace(columns, documents=documents))


# Zarr


def test_zarr_uses_core_codecs_only_and_stores_every_chunk() -> None:
    columns, _ = columns_of(some_documents(3), SHAPE)
    contents = shard_store("zarr").encode(columns, STEM)
    arrays = sorted({name.split("/")[2] for name in contents if name.count("/") > 2})
    assert set(arrays) == {"documents", "text", *FLAT} - {"row_offsets"}
    for array in arrays:
        metadata = json.loads(contents[f"{STEM}.zarr/{array}/zarr.json"])
        assert metadata["zarr_format"] == 3
        (sharding,) = metadata["codecs"]
        assert sharding["name"] == "sharding_indexed"
        inner = [codec["name"] for codec in sharding["configuration"]["codecs"]]
        assert inner == ["bytes", "blosc", "crc32c"]
        assert [codec["name"] for codec in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
        (chunk,) = [data for name, data in contents.items() if name.startswith(f"{STEM}.zarr/{array}/c/")]
        outer = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        inner_count = int(np.prod(np.array(outer) // np.array(sharding["configuration"]["chunk_shape"])))
        index = struct.unpack(f"<{2 * inner_count}Q", chunk[-16 * inner_count - 4 : -4])
        assert 2**64 - 1 not in index, f"{array} has a chunk that is not stored"


def test_zarr_without_a_chunk_does_not_read_as_zeros() -> None:
    columns, _ = columns_of(some_documents(3), SHAPE)
    contents = shard_store("zarr").encode(columns, STEM)
    for name in [name for name in contents if "/c/" in name]:
        rest = {other: data for other, data in contents.items() if other != name}
        with pytest.raises(ValueError, match="no chunk"):
            shard_store("zarr").decode(rest, STEM, SHAPE, columns.size)


def test_zarr_inner_checksums_see_a_flip() -> None:
    columns, _ = columns_of(some_documents(3), SHAPE)
    contents = shard_store("zarr").encode(columns, STEM)
    for name in [name for name in contents if "/c/" in name]:
        damaged = bytearray(contents[name])
        damaged[len(damaged) // 4] ^= 1
        with pytest.raises(Exception, match=r"(?i)checksum"):
            shard_store("zarr").decode(contents | {name: bytes(damaged)}, STEM, SHAPE, columns.size)


def test_zarr_alone_reads_a_shard() -> None:
    """What SPEC.md says, with zarr and nothing of ours."""
    columns, _ = columns_of(some_documents(3), SHAPE)
    contents = shard_store("zarr").encode(columns, STEM)
    prefix = f"{STEM}.zarr/"
    group = zarr.open_group(
        zarr.storage.MemoryStore({n.removeprefix(prefix): Buffer.from_bytes(d) for n, d in contents.items()}), mode="r"
    )
    lines = [json.loads(line) for line in group["documents"][:].tobytes().split(b"\n")]
    assert [line["doc_id"] for line in lines] == list(columns.doc_ids)
    assert sum(line["rows"] for line in lines) == group["probs"].shape[0]
    first = group["text"][: lines[0]["text_bytes"]].tobytes().decode()
    assert first == columns.documents[0].text
    assert np.array_equal(group["probs"][:], columns.probs)


# Arrow


def test_parquet_has_list_columns_and_page_checksums() -> None:
    columns, _ = columns_of(some_documents(3), SHAPE)
    data = shard_store("arrow").encode(columns, STEM)[f"{STEM}.parquet"]
    table = pq.read_table(pa.BufferReader(data))
    assert table.num_rows == 3
    assert table.schema.field("probs").type == pa.list_(pa.list_(pa.float16(), 8))
    assert table["text"].to_pylist() == [document.text for document in columns.documents]
    chunks = [pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0).column(n) for n in range(11)]
    assert {chunk.compression for chunk in chunks} == {"ZSTD"}
    assert "BYTE_STREAM_SPLIT" in chunks[-1].encodings
    for chunk in chunks:
        damaged = bytearray(data)
        damaged[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
        with pytest.raises(ValueError, match=r"CRC|checksum|Parquet"):
            shard_store("arrow").decode({f"{STEM}.parquet": bytes(damaged)}, STEM, SHAPE, columns.size)


def test_parquet_nulls_are_refused() -> None:
    columns, _ = columns_of(some_documents(3), SHAPE)
    contents = shard_store("arrow").encode(columns, STEM)
    name = f"{STEM}.parquet"
    table = pq.read_table(pa.BufferReader(contents[name]))
    for column in ("segment", "gold_logprob", "probs", "is_end", "text", "messages"):
        values = table[column].to_pylist()
        values[0] = None
        with_null = table.set_column(
            table.schema.get_field_index(column), column, pa.array(values, table.schema.field(column).type)
        )
        sink = pa.BufferOutputStream()
        pq.write_table(with_null, sink)
        with pytest.raises((ValueError, TypeError, AttributeError)):
            shard_store("arrow").decode({name: sink.getvalue().to_pybytes()}, STEM, SHAPE, columns.size)


def test_parquet_with_other_columns_is_refused() -> None:
    columns, _ = columns_of(some_documents(3), SHAPE)
    name = f"{STEM}.parquet"
    table = pq.read_table(pa.BufferReader(shard_store("arrow").encode(columns, STEM)[name]))
    for other in (table.drop_columns(["probs"]), table.append_column("more", pa.array([1, 2, 3]))):
        sink = pa.BufferOutputStream()
        pq.write_table(other, sink)
        with pytest.raises(ValueError, match="its columns are"):
            shard_store("arrow").decode({name: sink.getvalue().to_pybytes()}, STEM, SHAPE, columns.size)
