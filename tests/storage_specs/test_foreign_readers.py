"""Programs that know nothing of us read both stores: tensorstore the Zarr groups, `datasets` the Parquet files."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from small_caches import some_documents, some_settings, write_cache

from storage_specs import CacheSettings, open_cache
from storage_specs.codecs import PROFILES
from storage_specs.document import CachedDocument
from storage_specs.reader import Cache
from storage_specs.stored_shard import Selection

SHARDS = 3
RANK_EDGES = [40, 60, 100, 300]


def some_cache_of(store: str, profile: str) -> tuple[list[CachedDocument], CacheSettings]:
    """Documents and settings of a cache with ids."""
    documents = some_documents(7, k=40, k_ids=8, words=30)
    if profile != "sketch":
        return documents, some_settings(store, profile=profile, k=40, k_ids=8)
    shares = np.array([0.5, 0.3, 0.2], np.float32)
    documents = [replace(document, tail_bins=document.tail_mass[:, None] * shares) for document in documents]
    parameters = {"rank_edges": RANK_EDGES}
    return documents, some_settings(store, profile=profile, parameters=parameters, k=40, k_ids=8)


@pytest.mark.parametrize("profile", PROFILES)
def test_tensorstore_reads_every_array_of_the_zarr_store(tmp_path: Path, profile: str) -> None:
    """Another implementation of Zarr v3, in C++: it knows the codecs of the specification and no others."""
    write_cache(tmp_path, *some_cache_of("zarr", profile))
    arrays = 0
    for shard in range(SHARDS):
        group = tmp_path / f"shards/{shard:06d}.zarr"
        for name, expected in zarr.open_group(group, mode="r").arrays():
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(group / name)}}
            found = tensorstore.open(spec, open=True, read=True).result().read().result()
            assert found.dtype == expected.dtype
            assert np.array_equal(found, expected[...]), name
            arrays += 1
    assert arrays >= SHARDS * 10


def test_tensorstore_reads_text_and_rows_by_the_spec(tmp_path: Path) -> None:
    """Not only bytes: texts and row counts, cut as SPEC.md says."""
    write_cache(tmp_path, some_documents(3), some_settings("zarr"))

    def read(name: str) -> np.ndarray:
        path = str(tmp_path / f"shards/000000.zarr/{name}")
        return (
            tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}).result().read().result()
        )

    text, byte, row = read("text").tobytes(), 0, 0
    for line, document in zip(read("documents").tobytes().splitlines(), open_cache(tmp_path), strict=True):
        entry = json.loads(line)
        assert text[byte : byte + entry["text_bytes"]].decode() == document.text
        assert entry["rows"] == len(document.segment)
        assert np.array_equal(read("is_end")[row : row + entry["rows"]], document.is_end)
        byte, row = byte + entry["text_bytes"], row + entry["rows"]
    assert (byte, row) == (len(text), len(read("is_end")))


def stored_rows(cache: Cache) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of each document as they are stored."""
    for shard in range(SHARDS):
        everything = Selection.everything(cache.table.size_of(shard))
        stored = cache.reader.stored_shard(shard, cache.reader.stored(shard), everything)
        for start, end in pairwise(np.cumsum([0, *stored.document_rows])):
            yield {name: values[start:end] for name, values in stored.arrays.items()}


@pytest.mark.parametrize("profile", PROFILES)
def test_datasets_loads_the_arrow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str) -> None:
    """`load_dataset("parquet", data_files=...)`: one row per document, every column as SPEC.md has it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    write_cache(tmp_path / "cache", *some_cache_of("arrow", profile))
    cache = open_cache(tmp_path / "cache")
    files = [str(tmp_path / f"cache/shards/{shard:06d}.parquet") for shard in range(SHARDS)]
    of_ids = [file.replace(".parquet", ".ids.parquet") for file in files]
    datasets.disable_progress_bars()
    loaded, ids = (
        datasets.load_dataset("parquet", data_files=names, split="train", cache_dir=str(tmp_path / "datasets"))
        for names in (files, of_ids)
    )
    assert len(loaded) == len(ids) == len(cache)
    for row, codes, document, arrays in zip(loaded, ids, cache, stored_rows(cache), strict=True):
        assert (row["kind"], row["text"]) == (document.kind, document.text)
        assert json.loads(row["metadata"]) == document.metadata
        assert np.array_equal(np.cumsum(np.add(row["gap"], row["length"])), document.byte_end)
        found = row | codes
        assert set(found) == {"kind", "text", "messages", "metadata", *arrays}
        for name, expected in arrays.items():
            values = found[name]
            if values and isinstance(values[0], bytes):  # rows of rank-major arrays
                assert b"".join(values) == np.ascontiguousarray(expected).tobytes(), name
            else:
                assert np.array_equal(np.array(values, expected.dtype), expected.reshape(-1)), name
