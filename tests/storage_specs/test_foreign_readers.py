"""Programs that know nothing of us read both stores: tensorstore the Zarr groups, `datasets` the Parquet files."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from small_caches import some_documents, some_settings, write_cache

from storage_specs import open_cache

SHARDS = 3
PROFILES = ("exact", "half", "compact")


@pytest.mark.parametrize("profile", PROFILES)
def test_tensorstore_reads_every_array_of_the_zarr_store(tmp_path: Path, profile: str) -> None:
    """Another implementation of Zarr v3, in C++: it knows the codecs of the specification and no others."""
    documents = some_documents(7, k=40, k_ids=8, words=30)
    write_cache(tmp_path, documents, some_settings("zarr", profile=profile, k=40, k_ids=8))
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


@pytest.mark.parametrize("profile", PROFILES)
def test_datasets_loads_the_arrow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str) -> None:
    """`load_dataset("parquet", data_files=...)`: one row per document, every column as SPEC.md has it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    documents = some_documents(7, k=40, k_ids=8)
    write_cache(tmp_path / "cache", documents, some_settings("arrow", profile=profile, k=40, k_ids=8))
    files = [str(tmp_path / f"cache/shards/{shard:06d}.parquet") for shard in range(SHARDS)]
    datasets.disable_progress_bars()
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "datasets"))
    ids = datasets.load_dataset(
        "parquet",
        data_files=[file.replace(".parquet", ".ids.parquet") for file in files],
        split="train",
        cache_dir=str(tmp_path / "datasets"),
    )
    assert len(loaded) == len(ids) == len(documents)
    for row, codes, document in zip(loaded, ids, open_cache(tmp_path / "cache"), strict=True):
        assert (row["kind"], row["text"]) == (document.kind, document.text)
        assert json.loads(row["metadata"]) == document.metadata
        assert row["length"] == (document.byte_end - document.byte_start).tolist()
        assert np.array_equal(np.cumsum(np.add(row["gap"], row["length"])), document.byte_end)
        assert row["is_end"] == document.is_end.tolist()
        assert len(codes["id_low"]) == len(codes["id_high"]) == document.token_ids.size
        if profile != "compact":
            by_rank = np.array(row["probs"], np.float32).reshape(40, -1)
            assert np.array_equal(by_rank.T, document.probs)
        else:
            assert len(row["steps_deep"]) == 8 * len(document.segment)
