"""Caches and plain files in memory, damaged one piece at a time and read again. For `flip_bits.py` and its test.

A subject has `files` and says what reading makes of damaged ones: DETECTED (an error; for our stores it must be a typed
one), UNAFFECTED (the values are right all the same), SILENT (other values than were written), UNTYPED (our reader
raised something that is no TeachOnceError).
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "storage_specs"))

import numpy as np
from small_caches import arrays_of, files_of, random_document, some_settings, with_rows, write_cache

from storage_specs import plan as plan_json
from storage_specs.document import CachedDocument, text_document
from storage_specs.errors import MissingObjectError, TeachOnceError
from storage_specs.objects import Objects
from storage_specs.reader import Cache, cache_of
from storage_specs.shard_reading import ShardReader
from storage_specs.stored_object import check_length

DETECTED, UNAFFECTED, SILENT, UNTYPED = "detected", "unaffected", "silent", "untyped"
OUTCOMES = (DETECTED, UNAFFECTED, SILENT, UNTYPED)
SHARDS = 2
ONE_BY_ONE, WHOLE = "random access", "whole objects"


class MemoryObjects(Objects):
    """Objects in a dict, to be read only."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.root, self.files = "memory", files

    def size(self, name: str) -> int | None:
        return len(self.files[name]) if name in self.files else None

    def read(self, name: str) -> bytes:
        if name not in self.files:
            raise MissingObjectError(f"{name}: expected an object, found none")
        return self.files[name]

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        data = self.read(name)[offset : offset + size]
        check_length(name, offset, size, len(data))
        return data

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        yield from ((name, len(data)) for name, data in self.files.items() if name.startswith(prefix))

    def write_all(self, contents: Mapping[str, bytes]) -> None:
        raise NotImplementedError

    def create(self, name: str, data: bytes) -> bool:
        raise NotImplementedError

    def delete(self, name: str) -> None:
        raise NotImplementedError

    def sweep(self) -> None:
        raise NotImplementedError


def some_cache(folder: Path, store: str, profile: str, seed: int, words: int) -> dict[str, bytes]:
    """A cache's files: two shards, each of long documents of every kind and an empty one, with ids."""
    random = np.random.default_rng(seed)
    shape = {"k": 16, "k_ids": 8, "vocab_size": 300}
    documents: list[CachedDocument] = []
    for _ in range(SHARDS):
        documents += [
            with_rows(random, random_document(random, kind=kind, words=words), **shape)
            for kind in ("text", "chat", "completion", "text")
        ]
        documents.append(with_rows(random, text_document(""), **shape))
    write_cache(folder, documents, some_settings(store, profile=profile, **shape), len(documents) // SHARDS)
    return files_of(folder)


class OurCache:
    """A cache, read document by document with nothing kept, or shard by shard."""

    def __init__(self, store: str, mode: str, files: dict[str, bytes]) -> None:
        self.name, self.mode, self.files = f"ours, {store} store", mode, files
        self.cache = cache_of(MemoryObjects(files))
        self.expected = [self._values(document) for document in self.cache]
        self.vocabulary, self.doc_ids = self.cache.vocabulary, self.cache.doc_ids

    def region(self, name: str, place: int) -> str:
        """What lies at a byte of an object."""
        if not name.startswith("shards/"):
            return name
        if name.count("/") == 1 and name.endswith(".json"):
            return "commit record"
        if name.endswith("zarr.json"):
            return "zarr.json"
        parts = self.cache.reader.record(int(name[7:13])).parts.get(name)
        is_last = parts is not None and place >= sum(parts.sizes[:-1])
        if "/c/" in name:
            return "index" if is_last else f"chunk of {name.split('/')[2]}"
        return "footer" if is_last else f"column chunks{name[13:].removesuffix('.parquet')}"

    def outcome(self, files: dict[str, bytes], damaged: set[str]) -> str:
        """What reading makes of these files, of which `damaged` are not what was written."""
        try:
            return UNAFFECTED if self._same(MemoryObjects(files), damaged) else SILENT
        except TeachOnceError:
            return DETECTED
        except Exception:
            return UNTYPED

    def _same(self, objects: MemoryObjects, damaged: set[str]) -> bool:
        """Reads all that depends on the damaged objects; whether it is what was written."""
        of_shards = {name for name in damaged if name.startswith("shards/")}
        if damaged - of_shards:
            cache = cache_of(objects)
            planned, _ = plan_json.plan_from_bytes(objects.fetch(cache.manifest.plan))
            if (cache.vocabulary, cache.doc_ids) != (self.vocabulary, self.doc_ids):
                return False
            if list(planned.doc_ids) != self.doc_ids or cache.manifest != self.cache.manifest:
                return False
        cache = Cache(objects, self.cache.manifest, self.cache.table, ids=True)
        for shard in sorted({int(name[7:13]) for name in of_shards}):
            members = range(*self.cache.table.documents_of(shard).indices(len(cache)))
            if self.mode == ONE_BY_ONE:
                found = [cache[number] for number in members]
            else:
                reader: ShardReader = cache.reader
                reader.record(shard)
                found = cache.shard(shard)
            if not all(map(_equal, map(self._values, found), self.expected[members.start : members.stop])):
                return False
        return True

    @staticmethod
    def _values(document: CachedDocument) -> dict[str, Any]:
        plain = {name: getattr(document, name) for name in ("kind", "text", "messages", "metadata")}
        return plain | arrays_of(document)


class PlainFile:
    """One way of others to keep the same arrays: `write(arrays)` gives files, `read(files, damaged)` arrays."""

    def __init__(
        self,
        name: str,
        arrays: dict[str, np.ndarray],
        write: Callable[[dict[str, np.ndarray]], dict[str, bytes]],
        read: Callable[[dict[str, bytes], set[str]], dict[str, np.ndarray]],
    ) -> None:
        self.name, self.mode, self.files = name, WHOLE, write(arrays)
        self._read, self._arrays = read, arrays

    def region(self, name: str, place: int) -> str:
        return "zarr.json" if name.endswith("zarr.json") else "all else"

    def outcome(self, files: dict[str, bytes], damaged: set[str]) -> str:
        try:
            found = self._read(files, damaged)
            same = all(_equal({name: values}, {name: self._arrays[name]}) for name, values in found.items())
        except Exception:
            return DETECTED
        return UNAFFECTED if same else SILENT


Subject = OurCache | PlainFile


def _equal(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    for name, value in expected.items():
        other = found.get(name)
        if isinstance(value, np.ndarray):
            if not isinstance(other, np.ndarray) or other.dtype != value.dtype or not np.array_equal(other, value):
                return False
        elif other != value:
            return False
    return True


def plain_arrays(cache: Cache) -> dict[str, np.ndarray]:
    """A cache's rows as flat arrays, without names for documents: what any array format holds."""
    columns = [cache.columns(shard) for shard in range(SHARDS)]
    names = ("byte_start", "byte_end", "gold_logprob", "tail_mass", "probs", "token_ids")
    arrays = {name: np.concatenate([getattr(part, name) for part in columns]) for name in names}
    text = "".join(document.text for part in columns for document in part.documents)
    return arrays | {"text": np.frombuffer(text.encode(), np.uint8)}


def plain_zarr(crc32c: bool) -> tuple[Callable, Callable]:
    """Zarr v3 as `zarr.create_array` writes it, or with the crc32c codec after its zstd."""
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec
    from zarr.core.buffer.cpu import Buffer

    def write(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
        contents: dict[str, Any] = {}
        group = zarr.create_group(zarr.storage.MemoryStore(contents))
        for name, values in arrays.items():
            chunks = (min(4096, len(values)), *values.shape[1:])
            more = {"compressors": [ZstdCodec(level=3), Crc32cCodec()]} if crc32c else {}
            group.create_array(name, data=values, chunks=chunks, **more)
        return {key: buffer.to_bytes() for key, buffer in contents.items()}

    def read(files: dict[str, bytes], damaged: set[str]) -> dict[str, np.ndarray]:
        store = zarr.storage.MemoryStore({key: Buffer.from_bytes(data) for key, data in files.items()})
        group = zarr.open_group(store, mode="r")
        arrays = {name.partition("/")[0] for name in damaged if "/" in name}
        return {name: group[name][...] for name in arrays or sorted(group.array_keys())}

    return write, read


def plain_arrow(form: str) -> tuple[Callable, Callable]:
    """Arrow IPC or Parquet of pyarrow's defaults; `form` is ipc, parquet or parquet+crc (page checksums, verified)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    widths: dict[str, tuple[int, ...]] = {}

    def write(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
        files = {}
        for name, values in arrays.items():  # a file each: their lengths differ
            widths[name] = values.shape[1:]
            flat = pa.array(values.reshape(-1))
            table = pa.table(
                {name: pa.FixedSizeListArray.from_arrays(flat, values.shape[1]) if values.ndim > 1 else flat}
            )
            sink = pa.BufferOutputStream()
            if form == "ipc":
                with pa.ipc.new_file(sink, table.schema) as writer:
                    writer.write_table(table)
            else:
                pq.write_table(table, sink, write_page_checksum=form == "parquet+crc")
            files[name] = sink.getvalue().to_pybytes()
        return files

    def read(files: dict[str, bytes], damaged: set[str]) -> dict[str, np.ndarray]:
        arrays = {}
        for name in damaged:
            source = pa.BufferReader(files[name])
            if form == "ipc":
                table = pa.ipc.open_file(source).read_all()
            else:
                table = pq.read_table(source, page_checksum_verification=form == "parquet+crc")
            column = table[name].combine_chunks()
            flat = column.flatten() if widths[name] else column
            arrays[name] = flat.to_numpy(zero_copy_only=False).reshape(-1, *widths[name])
        return arrays

    return write, read
