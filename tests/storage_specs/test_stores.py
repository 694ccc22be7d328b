"""Both stores: the same shard back, the same values in both, the same bytes each time, nothing decoded unseen."""

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from small_caches import STORES, assert_stored, some_documents
from zarr.core.buffer.cpu import Buffer

from storage_specs import arrow_store, row_coding, zarr_chunks, zarr_store
from storage_specs.column_building import columns_of
from storage_specs.column_rules import problem_of
from storage_specs.columns import Columns, RowShape
from storage_specs.document import CachedDocument
from storage_specs.shard_bytes import EncodedObject, Parts, WholeObjects
from storage_specs.shard_names import stem_of
from storage_specs.stored_shard import Selection, ShardSize, StoredShard
from storage_specs.stores import shard_store

SHAPE = RowShape(k=8, k_ids=4, vocab_size=300, profile="half")
STEM = stem_of(7)


def stored(documents: list[CachedDocument], shape: RowShape = SHAPE) -> StoredShard:
    return row_coding.encode(columns_of(documents, shape), shape)[0]


def encoded(store: str, shard: StoredShard, shape: RowShape = SHAPE) -> dict[str, bytes]:
    wanted = row_coding.arrays_of(shape, shard.size.rows)
    objects = shard_store(store).encode(shard, wanted, STEM)
    for name, item in objects.items():
        assert isinstance(item, EncodedObject)
        if item.part_sizes is not None:
            assert sum(Parts.of(item.data, item.part_sizes).sizes) == len(item.data), name
    return {name: item.data for name, item in objects.items()}


def decoded(
    store: str,
    contents: Mapping[str, bytes],
    size: ShardSize,
    shape: RowShape = SHAPE,
    *,
    ids: bool = True,
    selection: Selection | None = None,
) -> StoredShard:
    wanted = row_coding.arrays_of(shape, size.rows, with_ids=ids)
    everything = selection or Selection.everything(size)
    return shard_store(store).decode(WholeObjects(contents), STEM, wanted, size, everything)


def there_and_back(store: str, shard: StoredShard, shape: RowShape = SHAPE) -> StoredShard:
    return decoded(store, encoded(store, shard, shape), shard.size, shape)


def assert_same(first: StoredShard, second: StoredShard) -> None:
    """Bit for bit, types included."""
    for one, other in zip(first.documents, second.documents, strict=True):
        assert (one.kind, one.text, one.messages, one.metadata) == (
            other.kind,
            other.text,
            other.messages,
            other.metadata,
        )
    assert np.array_equal(first.document_rows, second.document_rows)
    for ours, theirs in ((first.arrays, second.arrays), (first.tables, second.tables)):
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            other = theirs[name]
            assert (array.dtype, array.shape, array.tobytes()) == (other.dtype, other.shape, other.tobytes()), name


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("profile", ["exact", "half"])
def test_shards_come_back_bit_for_bit(store: str, profile: str) -> None:
    shape = replace(SHAPE, profile=profile)
    shard = stored(some_documents(9), shape)
    assert_same(shard, there_and_back(store, shard, shape))


def test_both_stores_hold_the_same() -> None:
    shard = stored(some_documents(9, seed=3))
    assert_same(there_and_back("zarr", shard), there_and_back("arrow", shard))


@pytest.mark.parametrize("store", STORES)
def test_the_same_shard_gives_the_same_bytes(store: str) -> None:
    first, second = (encoded(store, stored(some_documents(5))) for _ in range(2))
    assert first == second
    assert all(name.startswith(f"{STEM}.") for name in first)


@pytest.mark.parametrize("store", STORES)
def test_no_rows_at_all(store: str) -> None:
    shard = stored([some_documents(2)[1]] * 3)
    assert_same(shard, there_and_back(store, shard))
    nothing = replace(some_documents(2)[1], text="", messages=())
    shard = stored([nothing])
    assert_same(shard, there_and_back(store, shard))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("vocab_size", [151_936, 262_144, 2**32])
def test_ids_of_large_vocabularies(store: str, vocab_size: int) -> None:
    shape = replace(SHAPE, vocab_size=vocab_size)
    document = some_documents(1)[0]
    ids_TI = document.token_ids.copy()
    ids_TI[:, 0] = np.linspace(131_072, vocab_size - 1, len(ids_TI)).astype(np.int64)
    written = replace(document, token_ids=ids_TI)
    read = there_and_back(store, stored([written], shape), shape)
    assert_stored(written, row_coding.decode(read, shape).document(0))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("k", "k_ids"), [(1, 0), (1, 1), (300, 300), (64, 0)])
def test_few_ranks_and_all(store: str, k: int, k_ids: int) -> None:
    shape = replace(SHAPE, k=k, k_ids=k_ids)
    shard = stored(some_documents(4, k=k, k_ids=k_ids), shape)
    assert_same(shard, there_and_back(store, shard, shape))


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr_store, "ROWS_PER_CHUNK", 16)
    monkeypatch.setattr(zarr_store, "BYTES_PER_CHUNK", 64)
    monkeypatch.setattr(zarr_chunks, "BYTES_PER_CHUNK", 256)
    monkeypatch.setattr(arrow_store, "ROWS_PER_GROUP", 16)


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("store", STORES)
def test_many_chunks(store: str) -> None:
    documents = some_documents(9, words=12)
    shard = stored(documents)
    assert shard.size.rows > 64
    contents = encoded(store, shard)
    assert_same(shard, decoded(store, contents, shard.size))
    rows, text = np.cumsum([0, *shard.document_rows]), np.cumsum([0, *shard.text_bytes])
    for first in range(9):
        for last in range(first + 1, 10):
            spans = (slice(int(ends[first]), int(ends[last])) for ends in (rows, text))
            selection = Selection(documents=slice(first, last), rows=next(spans), text=next(spans))
            some = decoded(store, contents, shard.size, selection=selection)
            assert_same(
                some,
                replace(
                    shard,
                    documents=shard.documents[first:last],
                    document_rows=shard.document_rows[first:last],
                    arrays={name: array[selection.rows] for name, array in shard.arrays.items()},
                ),
            )
            columns = row_coding.decode(some, SHAPE)
            for number in range(last - first):
                assert_stored(documents[first + number], columns.document(number))


@pytest.mark.parametrize("store", STORES)
def test_ids_lie_in_objects_of_their_own(store: str) -> None:
    shard, columns = stored(some_documents(3)), row_coding.id_columns(SHAPE)
    contents = encoded(store, shard)
    others = {n: data for n, data in contents.items() if not shard_store(store).columns_of(n, STEM) & columns}
    assert 0 < len(others) < len(contents)
    read = decoded(store, others, shard.size, ids=False)
    without, none = [replace(d, token_ids=None) for d in some_documents(3)], replace(SHAPE, k_ids=0)
    assert_same(stored(without, none), read)
    assert row_coding.decode(read, SHAPE).token_ids is None
    assert encoded(store, stored(without, none), none) == others


@pytest.mark.parametrize("store", STORES)
def test_other_types_and_sizes_are_refused(store: str) -> None:
    shard = stored(some_documents(3))
    contents, size = encoded(store, shard), shard.size
    for wrong in ("documents", "rows", "text_bytes"):
        with pytest.raises(ValueError, match=r"expected|array"):
            decoded(store, contents, replace(size, **{wrong: getattr(size, wrong) + 1}))
    for shape in (replace(SHAPE, k=7), replace(SHAPE, k_ids=3), replace(SHAPE, profile="exact")):
        with pytest.raises(ValueError, match=r"expected|no object|lists|rows|whole"):
            decoded(store, contents, size, shape)


@pytest.mark.parametrize("store", STORES)
def test_rules_are_checked_on_what_was_decoded(store: str) -> None:
    """A shard whose bytes verify may still lie; each rule is tested in test_columns, here that decoding hides none."""
    shard = stored(some_documents(3))

    def forged(**arrays: np.ndarray) -> StoredShard:
        return there_and_back(store, replace(shard, arrays=shard.arrays | arrays))

    with pytest.raises(ValueError, match="above 1"):
        row_coding.decode(forged(prob_drops=shard.arrays["prob_drops"] + np.uint16(0x3C00)), SHAPE)
    for codes, message in ((shard.arrays["id_high"] + np.uint16(2), "of .* words"), (shard.arrays["id_high"], "first")):
        low = shard.arrays["id_low"] if message != "first" else np.zeros_like(shard.arrays["id_low"])
        with pytest.raises(ValueError, match=message):
            row_coding.decode(forged(id_high=codes, id_low=low), SHAPE)
    longer: Columns = row_coding.decode(forged(length=shard.arrays["length"] + np.uint32(1000)), SHAPE)
    assert "outside its message" in problem_of(longer, SHAPE.vocab_size)
    words = replace(shard, tables={"id_word_steps": shard.tables["id_word_steps"] + np.uint32(300)})
    with pytest.raises(ValueError, match="in a vocabulary of 300"):
        row_coding.decode(there_and_back(store, words), SHAPE)


@pytest.mark.parametrize("store", STORES)
def test_documents_that_are_none_are_refused(store: str) -> None:
    shard = stored(some_documents(3))
    for change, message in (
        ({"kind": "poem"}, "kind 'poem'"),
        ({"metadata": [1]}, "metadata"),
        ({"messages": (replace(shard.documents[0].messages[0], scored=1),)}, "a message must have"),
        ({"messages": (replace(shard.documents[0].messages[0], byte_start="0"),)}, "a message must have"),
    ):
        documents = (replace(shard.documents[0], **change), *shard.documents[1:])
        with pytest.raises(ValueError, match=message):
            there_and_back(store, replace(shard, documents=documents))


# Zarr


def array_names(contents: Mapping[str, bytes]) -> set[str]:
    return {name.split("/")[2] for name in contents if name.count("/") > 2}


def test_zarr_uses_core_codecs_only_and_stores_every_chunk() -> None:
    shard = stored(some_documents(3))
    contents = encoded("zarr", shard)
    assert array_names(contents) == {"documents", "text", *shard.arrays, *shard.tables}
    for array in array_names(contents):
        metadata = json.loads(contents[f"{STEM}.zarr/{array}/zarr.json"])
        assert metadata["zarr_format"] == 3
        (sharding,) = metadata["codecs"]
        assert sharding["name"] == "sharding_indexed"
        inner = [codec["name"] for codec in sharding["configuration"]["codecs"]]
        assert inner in (["bytes", "blosc", "crc32c"], ["transpose", "bytes", "blosc", "crc32c"])
        assert [codec["name"] for codec in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
        (chunk,) = [data for name, data in contents.items() if name.startswith(f"{STEM}.zarr/{array}/c/")]
        outer = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        inner_count = int(np.prod(np.array(outer) // np.array(sharding["configuration"]["chunk_shape"])))
        index = struct.unpack(f"<{2 * inner_count}Q", chunk[-16 * inner_count - 4 : -4])
        assert 2**64 - 1 not in index, f"{array} has a chunk that is not stored"


def test_zarr_without_a_chunk_does_not_read_as_zeros() -> None:
    shard = stored(some_documents(3))
    contents = encoded("zarr", shard)
    for name in [name for name in contents if "/c/" in name]:
        rest = {other: data for other, data in contents.items() if other != name}
        with pytest.raises(ValueError, match="no chunk"):
            decoded("zarr", rest, shard.size)


def test_zarr_inner_checksums_see_a_flip() -> None:
    shard = stored(some_documents(3))
    contents = encoded("zarr", shard)
    for name in [name for name in contents if "/c/" in name]:
        damaged = bytearray(contents[name])
        damaged[len(damaged) // 4] ^= 1
        with pytest.raises(ValueError, match="checksum"):
            decoded("zarr", contents | {name: bytes(damaged)}, shard.size)


def test_zarr_claims_are_checked_before_anything_is_allocated() -> None:
    """A blosc header, a chunk grid or an index that lies, under checksums that fit."""
    shard = stored(some_documents(3))
    contents, name = encoded("zarr", shard), f"{STEM}.zarr/prob_drops"
    data = bytearray(contents[f"{name}/c/0/0"])
    size = struct.unpack("<Q", data[-12:-4])[0]

    def resealed(at: int, number: bytes) -> bytes:
        changed = bytearray(data)
        changed[at : at + len(number)] = number
        for start, stop in ((0, size - 4), (len(data) - 20, len(data) - 4)):
            changed[stop : stop + 4] = zarr_chunks.crc32c(bytes(changed[start:stop])).to_bytes(4, "little")
        return bytes(changed)

    for at, number, message in (
        (4, (2**31 - 1).to_bytes(4, "little"), "claims 2147483647 bytes"),
        (len(data) - 20, (2**62).to_bytes(8, "little"), "lies outside"),
        (len(data) - 12, (2**64 - 1).to_bytes(8, "little"), "lies outside"),
    ):
        with pytest.raises(ValueError, match=message):
            decoded("zarr", contents | {f"{name}/c/0/0": resealed(at, number)}, shard.size)
    metadata = json.loads(contents[f"{name}/zarr.json"])
    sharding = metadata["codecs"][0]["configuration"]
    for change in (
        {"shape": [2**40, 8]},
        {"data_type": "float32"},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2**40, 8]}}},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]},
        {"codecs": [{"name": "sharding_indexed", "configuration": sharding | {"codecs": [{"name": "pickle"}]}}]},
    ):
        forged = {f"{name}/zarr.json": json.dumps(metadata | change).encode()}
        with pytest.raises(ValueError, match=r"expected|chunks of|index of"):
            decoded("zarr", contents | forged, shard.size)


def test_zarr_alone_reads_a_shard() -> None:
    """zarr, with nothing of ours, sees the same arrays."""
    shard = stored(some_documents(3))
    contents = encoded("zarr", shard)
    prefix = f"{STEM}.zarr/"
    group = zarr.open_group(
        zarr.storage.MemoryStore({n.removeprefix(prefix): Buffer.from_bytes(d) for n, d in contents.items()}), mode="r"
    )
    lines = [json.loads(line) for line in group["documents"][:].tobytes().split(b"\n")]
    assert [line["rows"] for line in lines] == shard.document_rows.tolist()
    assert group["text"][: lines[0]["text_bytes"]].tobytes().decode() == shard.documents[0].text
    for name, array in {**shard.arrays, **shard.tables}.items():
        found = group[name][:]
        assert (found.dtype, found.tobytes()) == (array.dtype, array.tobytes()), name


# Arrow


def test_parquet_has_list_columns_and_page_checksums() -> None:
    shard = stored(some_documents(3))
    contents = encoded("arrow", shard)
    data = contents[f"{STEM}.parquet"]
    table = pq.read_table(pa.BufferReader(data))
    assert table.num_rows == 3
    assert table.schema.field("prob_drops").type == pa.list_(pa.binary(16))
    assert table["text"].to_pylist() == [document.text for document in shard.documents]
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    chunks = [metadata.row_group(0).column(number) for number in range(metadata.num_columns)]
    assert {chunk.compression for chunk in chunks} == {"ZSTD"}
    for chunk in chunks:
        damaged = bytearray(data)
        damaged[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
        with pytest.raises(ValueError, match=r"CRC|checksum|Parquet"):
            decoded("arrow", contents | {f"{STEM}.parquet": bytes(damaged)}, shard.size)


def rewritten(contents: Mapping[str, bytes], name: str, change: object) -> dict[str, bytes]:
    """The contents with one file's table changed."""
    sink = pa.BufferOutputStream()
    pq.write_table(change(pq.read_table(pa.BufferReader(contents[name]))), sink)
    return {**contents, name: sink.getvalue().to_pybytes()}


def test_parquet_nulls_are_refused() -> None:
    shard = stored(some_documents(3))
    contents = encoded("arrow", shard)

    def with_null(table: pa.Table, column: str) -> pa.Table:
        values = table[column].to_pylist()
        values[0] = None
        index = table.schema.get_field_index(column)
        return table.set_column(index, column, pa.array(values, table.schema.field(column).type))

    for column in ("gap", "gold_steps", "prob_drops", "is_end", "text", "messages"):
        forged = rewritten(contents, f"{STEM}.parquet", partial(with_null, column=column))
        with pytest.raises((ValueError, TypeError, AttributeError)):
            decoded("arrow", forged, shard.size)


def test_parquet_with_other_columns_is_refused() -> None:
    shard = stored(some_documents(3))
    contents = encoded("arrow", shard)
    for change in (lambda t: t.drop_columns(["prob_drops"]), lambda t: t.append_column("more", pa.array([1, 2, 3]))):
        with pytest.raises(ValueError, match="its columns are"):
            decoded("arrow", rewritten(contents, f"{STEM}.parquet", change), shard.size)
