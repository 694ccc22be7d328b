"""Malicious caches. Each attack takes a good cache and turns it into one that only limits, types and rules can refuse.

A docstring says what a naive reader would do. `ATTACKS` holds them by name, with the store each is made for.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from forging import edit_json, edit_table, forge_object, seal_again, seal_manifest

from storage_specs.checksum import crc32c
from storage_specs.sealed_json import digest_of

GIB = 1 << 30
RECORD = "shards/000000.json"
PARQUET = "shards/000000.parquet"


@dataclass(frozen=True)
class Attack:
    """refusal: what the error's message says (a regular expression). ways: those of `measuring.WAYS` that raise it."""

    name: str
    store: str
    refusal: str
    make: Callable[[Path], None]
    ways: tuple[str, ...] = ("one by one", "streamed", "verified")

    @property
    def naive(self) -> str:
        """What a naive reader would do."""
        return " ".join((self.make.__doc__ or "").split())


ATTACKS: list[Attack] = []


def attack(store: str, refusal: str, **more: Any) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def register(make: Callable[[Path], None]) -> Callable[[Path], None]:
        ATTACKS.append(Attack(make.__name__, store, refusal, make, **more))
        return make

    return register


# Names and files


def _rename_first_object(cache: Path, name: str) -> None:
    edit_json(cache, RECORD, lambda value: value["objects"][0].update(name=name))
    seal_again(cache)


@attack("arrow", "refused object name")
def parent_folder(cache: Path) -> None:
    """Opens `shards/../../outside.parquet`: any file of the user, and writes there when it repairs."""
    shutil.copy(cache / PARQUET, cache.parent / "outside.parquet")
    _rename_first_object(cache, "shards/../../outside.parquet")


@attack("arrow", "refused object name")
def absolute_path(cache: Path) -> None:
    """Joins the folder with an absolute name, and pathlib drops the folder."""
    shutil.copy(cache / PARQUET, cache.parent / "absolute.parquet")
    _rename_first_object(cache, str(cache.parent / "absolute.parquet"))


@attack("arrow", "is a symlink")
def symlinked_object(cache: Path) -> None:
    """Follows the link out of the cache: reads, uploads or repairs whatever it points to."""
    shutil.move(cache / PARQUET, cache.parent / "target.parquet")
    (cache / PARQUET).symlink_to(cache.parent / "target.parquet")


@attack("zarr", "is a symlink")
def symlinked_folder(cache: Path) -> None:
    """Follows a linked folder out of the cache, although every name in the manifest is harmless."""
    shutil.move(cache / "shards/000000.zarr", cache.parent / "elsewhere.zarr")
    (cache / "shards/000000.zarr").symlink_to(cache.parent / "elsewhere.zarr")


@attack("arrow", "no regular file")
def pipe_for_a_manifest(cache: Path) -> None:
    """Opens a named pipe that nobody writes to, and waits for ever."""
    (cache / "manifest.json").unlink()
    os.mkfifo(cache / "manifest.json")


@attack("arrow", "is a symlink")
def endless_device(cache: Path) -> None:
    """Reads /dev/zero through a link until memory is full."""
    (cache / "shards.parquet").unlink()
    (cache / "shards.parquet").symlink_to("/dev/zero")


@attack("zarr", "of another shard")
def another_shards_object(cache: Path) -> None:
    """Takes an array of shard 1 for one of shard 0: well-formed, verified, and about other documents."""

    def change(value: dict[str, Any]) -> None:
        value["objects"][-1]["name"] = value["objects"][-1]["name"].replace("000000", "000001")

    edit_json(cache, RECORD, change)
    seal_again(cache)


@attack("arrow", "an object twice")
def one_object_twice(cache: Path) -> None:
    """Checks the first description of a name, and decodes by the second."""
    edit_json(cache, RECORD, lambda value: value["objects"].append(value["objects"][0]))
    seal_again(cache)


# JSON


@attack("arrow", "above the limit")
def huge_manifest(cache: Path) -> None:
    """Reads a manifest of 64 GiB (a sparse file that takes no disk) into memory."""
    os.truncate(cache / "manifest.json", 64 * GIB)


@attack("arrow", "above the limit")
def huge_plan(cache: Path) -> None:
    """Without a manifest, reads a plan of 64 GiB to say how many shards are missing."""
    (cache / "manifest.json").unlink()
    os.truncate(cache / "plan.json", 64 * GIB)


@attack("arrow", "above the limit")
def huge_record(cache: Path) -> None:
    """Reads a commit record of 64 GiB, because the shard table says that it has that size."""
    os.truncate(cache / RECORD, 64 * GIB)

    def change(shards: list[dict[str, Any]]) -> None:
        record = shards[0]["objects"][-1] if "objects" in shards[0] else shards[0]["record"]
        record["size"] = 64 * GIB

    shards = pq.read_table(cache / "shards.parquet")
    rows = shards.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=shards.schema), cache / "shards.parquet", use_dictionary=False)
    seal_manifest(cache)


@attack("arrow", "above the limit")
def huge_table(cache: Path) -> None:
    """Reads a shard table of 64 GiB, a sparse file, because the manifest says that it has that size."""
    os.truncate(cache / "shards.parquet", 64 * GIB)
    edit_json(cache, "manifest.json", lambda value: value["shards"].update(size=64 * GIB))


@attack("arrow", "above the limit")
def huge_object(cache: Path) -> None:
    """Reads an object of 64 GiB, a sparse file, because all descriptions say that it has that size."""
    os.truncate(cache / PARQUET, 64 * GIB)

    def change(value: dict[str, Any]) -> None:
        for item in value["objects"]:
            item["size"] = 64 * GIB if item["name"] == PARQUET else item["size"]
        del value["parts"][PARQUET]

    edit_json(cache, RECORD, change)
    edit_table(cache, lambda shards: None)


@attack("arrow", "not pairs of size and crc32c", ways=("one by one", "verified"))
def parts_that_overlap(cache: Path) -> None:
    """Checks a part of negative size, steps back, and reads bytes that no checksum covers."""

    def change(value: dict[str, Any]) -> None:
        (_, first), *rest = value["parts"][PARQUET]
        value["parts"][PARQUET] = [[value["objects"][0]["size"], first], [-1, first], *rest]

    edit_json(cache, RECORD, change)
    edit_table(cache, lambda shards: None)


@attack("arrow", "nested deeper")
def deep_manifest(cache: Path) -> None:
    """Parses half a million nested lists, and overflows the stack."""
    (cache / "manifest.json").write_bytes(b"[" * 499_999 + b"]" * 499_999)


@attack("arrow", "nested deeper")
def deep_settings(cache: Path) -> None:
    """Parses and hashes a manifest nested 900 deep: within the parser's own limit, beyond that of what comes after."""
    deep: dict[str, Any] = {}
    for _ in range(900):
        deep = {"a": deep}
    edit_json(cache, "manifest.json", lambda value: value["engine"].update(deep=deep))


def _spell(cache: Path, old: bytes, new: bytes) -> None:
    """Other bytes in the manifest, under the digest of what a JSON parser makes of them."""
    data = (cache / "manifest.json").read_bytes().replace(old, new, 1)
    value = json.loads(data)
    given = value.pop("cache_id")
    try:
        digest = digest_of(value)
    except ValueError:  # NaN has no canonical form
        digest = given
    (cache / "manifest.json").write_bytes(data.replace(given.encode(), digest.encode()))


@attack("arrow", "stands twice")
def key_twice(cache: Path) -> None:
    """Takes the last of two values of `k`, where another reader takes the first: two meanings, one digest."""
    _spell(cache, b'"k":8', b'"k":4,"k":8')


@attack("arrow", "NaN is no JSON")
def not_a_number(cache: Path) -> None:
    """Takes NaN for the L1 error; every comparison with a limit is then false."""
    value = json.loads((cache / "manifest.json").read_bytes())["codec"]["max_l1_error"]
    _spell(cache, f'"max_l1_error":{value}'.encode(), b'"max_l1_error":NaN')


@attack("arrow", "too large for a number")
def infinite_error(cache: Path) -> None:
    """Takes 1e999, valid JSON, for the L1 error."""
    value = json.loads((cache / "manifest.json").read_bytes())["codec"]["max_l1_error"]
    _spell(cache, f'"max_l1_error":{value}'.encode(), b'"max_l1_error":1e999')


@attack("arrow", "spec_version is 2")
def newer_version(cache: Path) -> None:
    """Reads a version 2 by the rules of version 1."""
    value = json.loads((cache / "manifest.json").read_bytes()) | {"spec_version": 2}
    del value["cache_id"]
    (cache / "manifest.json").write_bytes(
        json.dumps({**value, "cache_id": digest_of(value)}, sort_keys=True, separators=(",", ":")).encode()
    )


@attack("arrow", "is -1")
def negative_sizes(cache: Path) -> None:
    """Allocates, or seeks to, -1 bytes."""
    edit_json(cache, "manifest.json", lambda value: value["shards"].update(size=-1))


@attack("arrow", "store 'os'")
def module_for_a_store(cache: Path) -> None:
    """Imports the module that the manifest names as its store."""
    edit_json(cache, "manifest.json", lambda value: value.update(store="os"))


@attack("zarr", "profile 'pickle'")
def unknown_profile(cache: Path) -> None:
    """Guesses how values of an unknown codec profile are coded, or unpickles a codec."""
    edit_json(cache, "manifest.json", lambda value: value["codec"].update(profile="pickle"))


# Counts that ask for memory


@attack("arrow", "more than 2147483647 values")
def billions_of_ranks(cache: Path) -> None:
    """Allocates rows of 2^31 ranks."""
    edit_json(cache, "manifest.json", lambda value: value.update(k=2**31, vocab_size=2**32))


@attack("zarr", "more than 2147483647 values")
def billions_of_rows(cache: Path) -> None:
    """Allocates arrays of 2^31 rows, as shard table, record and manifest agree."""
    added = 2**31 - 1

    def change_record(value: dict[str, Any]) -> None:
        value["document_rows"][0] += added

    def change_shards(shards: list[dict[str, Any]]) -> None:
        shards[0]["rows"] += added
        shards[0]["document_rows"][0] += added

    edit_json(cache, RECORD, change_record)
    edit_table(cache, change_shards)
    seal_manifest(cache, lambda value: value["counts"].update(rows=value["counts"]["rows"] + added))


@attack("arrow", "column token_bytes has 300 values in 100")
def words_without_end(cache: Path) -> None:
    """Reads a vocabulary with one word of 100 MB, which compresses to 10 kB."""
    table = pq.read_table(cache / "vocabulary.parquet")
    words = [b"\0" * 100_000_000, *table["token_bytes"].to_pylist()[1:]]
    table = pa.table({"token_bytes": words, "special_role": table["special_role"]}, schema=table.schema)
    pq.write_table(table, cache / "vocabulary.parquet", compression="zstd", use_dictionary=False)
    seal_manifest(cache)


# Zarr


def _array(cache: Path, array: str, change: Callable[[dict[str, Any]], None]) -> None:
    edit_json(cache, f"shards/000000.zarr/{array}/zarr.json", change)
    seal_again(cache)


@attack("zarr", r"is_end is .bool. \[1099511627776\]")
def array_of_fill_values(cache: Path) -> None:
    """Allocates 2^40 numbers that no chunk holds, and returns fill values."""
    shutil.rmtree(cache / "shards/000000.zarr/is_end/c")
    edit_json(
        cache,
        RECORD,
        lambda value: value.update(objects=[item for item in value["objects"] if "is_end/c/" not in item["name"]]),
    )

    def change(metadata: dict[str, Any]) -> None:
        metadata["shape"] = [2**40]
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [2**40]

    _array(cache, "is_end", change)


@attack("zarr", "would read as zeros")
def missing_chunk(cache: Path) -> None:
    """Returns zeros for an array whose chunk the record no longer names."""
    shutil.rmtree(cache / "shards/000000.zarr/is_end/c")
    edit_json(
        cache,
        RECORD,
        lambda value: value.update(objects=[item for item in value["objects"] if "is_end/c/" not in item["name"]]),
    )
    seal_again(cache)


@attack("zarr", "is 'object'")
def object_dtype(cache: Path) -> None:
    """Reads an array of Python objects: unpickles it, which runs the forger's code."""
    _array(cache, "is_end", lambda metadata: metadata.update(data_type="object"))


@attack("zarr", "numcodecs.pickle")
def pickle_codec(cache: Path) -> None:
    """Looks the codec `numcodecs.pickle` up and runs what it unpickles."""

    def change(metadata: dict[str, Any]) -> None:
        metadata["codecs"][0]["configuration"]["codecs"] = [{"name": "numcodecs.pickle", "configuration": {}}]

    _array(cache, "is_end", change)


@attack("zarr", "too few for an index")
def trillions_of_chunks(cache: Path) -> None:
    """Reads an index of 2^40 inner chunks of one row."""

    def change(metadata: dict[str, Any]) -> None:
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [2**40]
        metadata["codecs"][0]["configuration"]["chunk_shape"] = [1]

    _array(cache, "is_end", change)


@attack("zarr", "above the limit for")
def millions_of_metadata(cache: Path) -> None:
    """Parses 50 MB of attributes of one array."""
    _array(cache, "is_end", lambda metadata: metadata.update(attributes={"a": [1] * 16_000_000}))


@attack("zarr", "above the limit")
def endless_documents(cache: Path) -> None:
    """Allocates 2^40 bytes for the documents' JSON lines, the one array whose length nothing else tells."""

    def change(metadata: dict[str, Any]) -> None:
        metadata["shape"] = [2**40]
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [2**40]

    _array(cache, "documents", change)


def _first_chunk(cache: Path, array: str, change: Callable[[bytearray, int, int], bytes]) -> None:
    """Exchange the first inner chunk of an array: `change(object, offset, size)` gives the object's new bytes."""
    (file,) = (file for file in (cache / f"shards/000000.zarr/{array}/c").rglob("*") if file.is_file())
    metadata = json.loads((cache / f"shards/000000.zarr/{array}/zarr.json").read_bytes())
    outer = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
    chunks = outer // metadata["codecs"][0]["configuration"]["chunk_shape"][0]
    data = bytearray(file.read_bytes())
    index = np.frombuffer(bytes(data[-16 * chunks - 4 : -4]), "<u8").reshape(chunks, 2).copy()
    data = bytearray(change(data, int(index[0, 0]), int(index[0, 1])))
    forge_object(cache, file.relative_to(cache).as_posix(), bytes(data))


def _indexed(chunk: bytes, entries: list[tuple[int, int]]) -> bytes:
    """An outer chunk of one inner chunk, with an index that says what it likes."""
    index = np.array(entries, "<u8").tobytes()
    return chunk + index + crc32c(index).to_bytes(4, "little")


@attack("zarr", "claims 2147483647 bytes")
def chunk_that_claims_gigabytes(cache: Path) -> None:
    """Allocates the 2^31 - 1 bytes that a blosc header of 60 bytes claims to decode to."""

    def change(data: bytearray, offset: int, size: int) -> bytes:
        chunk = bytearray(data[offset : offset + size - 4])
        chunk[4:8] = (2**31 - 1).to_bytes(4, "little")
        chunk += crc32c(bytes(chunk)).to_bytes(4, "little")
        return _indexed(bytes(chunk), [(0, len(chunk))])

    _first_chunk(cache, "is_end", change)


@attack("zarr", "claims 268435456 bytes")
def chunk_that_is_a_bomb(cache: Path) -> None:
    """Decodes an inner chunk of some kilobytes to 256 MiB of zeros."""
    from numcodecs import Blosc

    def change(data: bytearray, offset: int, size: int) -> bytes:
        chunk = Blosc("zstd", 5, Blosc.NOSHUFFLE).encode(np.zeros(1 << 28, np.uint8))
        chunk += crc32c(chunk).to_bytes(4, "little")
        return _indexed(chunk, [(0, len(chunk))])

    _first_chunk(cache, "is_end", change)


@attack("zarr", "missing or lies outside")
def index_that_marks_a_chunk_missing(cache: Path) -> None:
    """Finds 2^64 - 1 twice in the index, Zarr's mark for a chunk that was never written, and returns zeros."""
    _first_chunk(cache, "is_end", lambda data, offset, size: _indexed(bytes(data), [(2**64 - 1, 2**64 - 1)]))


@attack("zarr", "missing or lies outside")
def index_that_wraps_around(cache: Path) -> None:
    """Adds offset and size of a chunk in 64 bits, gets a small number, and reads before the object's start."""
    _first_chunk(cache, "is_end", lambda data, offset, size: _indexed(bytes(data), [(2**64 - 16, 32)]))


@attack("zarr", "nested deeper")
def deep_messages(cache: Path) -> None:
    """Parses a document's messages nested 100,000 deep."""
    from numcodecs import Blosc

    lines = b"\n".join([b"[" * 100_000 + b"]" * 100_000] * 3)
    path = cache / "shards/000000.zarr/documents"
    name = next(file for file in (path / "c").rglob("*") if file.is_file()).relative_to(cache).as_posix()

    def change(metadata: dict[str, Any]) -> None:
        metadata["shape"] = [len(lines)]
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [len(lines)]
        metadata["codecs"][0]["configuration"]["chunk_shape"] = [len(lines)]

    edit_json(cache, path.relative_to(cache).as_posix() + "/zarr.json", change)
    chunk = Blosc("zstd", 5, Blosc.NOSHUFFLE).encode(np.frombuffer(lines, np.uint8))
    chunk += crc32c(chunk).to_bytes(4, "little")
    forge_object(cache, name, _indexed(chunk, [(0, len(chunk))]))


@attack("zarr", "neither true nor false")
def booleans_that_are_neither(cache: Path) -> None:
    """Computes with booleans of the value 2: `2 & 1` is false, so every rule about them passes."""
    from numcodecs import Blosc

    def change(data: bytearray, offset: int, size: int) -> bytes:
        rows = int.from_bytes(data[offset + 4 : offset + 8], "little")
        chunk = Blosc("zstd", 5, Blosc.NOSHUFFLE).encode(np.full(rows, 2, np.uint8))
        chunk += crc32c(chunk).to_bytes(4, "little")
        return _indexed(chunk, [(0, len(chunk))])

    _first_chunk(cache, "is_end", change)


# Parquet


def _rewrite(cache: Path, change: Callable[[pa.Table], pa.Table], **options: Any) -> None:
    """Another table in the place of the first shard's."""
    table = change(pq.read_table(cache / PARQUET))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **({"compression": "zstd", "use_dictionary": False} | options))
    forge_object(cache, PARQUET, sink.getvalue().to_pybytes())


def _set(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    field = table.schema.field(name).with_type(values.type)
    return table.set_column(table.schema.get_field_index(name), field, values)


@attack("arrow", "column text has 3 values in 200000")
def text_bomb(cache: Path) -> None:
    """Decompresses 200 MB of one letter from some kilobytes, before it compares sizes."""
    _rewrite(cache, lambda table: _set(table, "text", pa.array(["a" * 200_000_000] + [""] * (table.num_rows - 1))))


@attack("arrow", "column metadata is coded so that nothing bounds")
def dictionary_bomb(cache: Path) -> None:
    """Copies one string of 40 MB, which compresses to 4 kB, out of a dictionary for each of 3 documents."""

    def change(table: pa.Table) -> pa.Table:
        return _set(table, "metadata", pa.array(["m" * 40_000_000] * table.num_rows))

    _rewrite(cache, change, use_dictionary=["metadata"], dictionary_pagesize_limit=1 << 30)


@attack("arrow", "column gap has 6000000. values")
def run_length_bomb(cache: Path) -> None:
    """Expands a run of 60 million equal numbers, 100 bytes of a dictionary-coded page, into 240 MB."""
    numbers = 60_000_000

    def change(table: pa.Table) -> pa.Table:
        offsets = pa.array([0, *[numbers] * table.num_rows], pa.int32())
        return _set(table, "gap", pa.ListArray.from_arrays(offsets, pa.array(np.zeros(numbers, np.uint32))))

    _rewrite(cache, change, use_dictionary=["gap.list.element"])


@attack("arrow", "above the limit of 262144")
def footer_of_row_groups(cache: Path) -> None:
    """Builds a hundred thousand row groups in memory from the footer of a file without any data."""
    table = pq.read_table(cache / PARQUET)
    sink = pa.BufferOutputStream()
    empty = table.slice(0, 0)
    with pq.ParquetWriter(sink, table.schema, compression="none", write_statistics=False) as writer:
        for _ in range(5000):
            writer.write_table(empty, row_group_size=1)
    forge_object(cache, PARQUET, sink.getvalue().to_pybytes())


@attack("arrow", "different numbers of rows")
def rows_out_of_order(cache: Path) -> None:
    """Trains on documents that were exchanged within their shard, under each other's identities."""
    _rewrite(cache, lambda table: table.take(list(range(table.num_rows))[::-1]))


@attack("arrow", "null")
def nulls_for_values(cache: Path) -> None:
    """Reads nulls as whatever lies in the buffer."""
    name = "text"
    _rewrite(cache, lambda table: _set(table, name, pa.array([None] * table.num_rows, table.schema.field(name).type)))


@attack("arrow", "its columns are")
def extension_type_that_unpickles(cache: Path) -> None:
    """Revives a pickled Python type named by the file's Arrow schema: arbitrary code (CVE-2023-47248 of pyarrow)."""
    storage = pa.string()

    def change(table: pa.Table) -> pa.Table:
        marks = {
            b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": b"cos\nsystem\n(S'id'\ntR.",
        }
        field = pa.field("kind", storage, metadata=marks)
        return table.set_column(table.schema.get_field_index("kind"), field, table["kind"])

    _rewrite(cache, change)


def _varint(number: int) -> bytes:
    data = b""
    while number > 127:
        data, number = data + bytes([number & 127 | 128]), number >> 7
    return data + bytes([number])


@attack("arrow", "above the limit of 262144")
def footer_of_column_chunks(cache: Path) -> None:
    """Parses a footer of 900 kB into 300,000 column chunks of 700 bytes each."""
    count = 300_000
    root, leaf = b"\x48\x04root\x15\x02\x00", b"\x15\x02\x25\x00\x18\x01a\x00"  # Thrift's compact protocol
    group = b"\x19\xfc" + _varint(count) + b"\x26\x00\x00" * count + b"\x16\x00\x16\x00\x00"
    footer = b"\x15\x02\x19\x2c" + root + leaf + b"\x16\x00\x19\x1c" + group + b"\x00"
    forge_object(cache, PARQUET, b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
