"""Training from S3: the same weights as from a folder, the store read once per host, whatever answers break."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from object_stores import S3
from safetensors.torch import load_file

from distill import CachedDocuments, EpochBatches
from distill.main import main
from storage_specs import open_cache
from storage_specs.copying import copy_cache
from storage_specs.document import CachedDocument
from storage_specs.remote_objects import REQUESTS_AT_ONCE


def command(cache: str, student_path: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        *("train", "--model_name_or_path", str(student_path), "--cache", cache, "--output_dir", str(output_dir)),
        *("--max_length", "48", "--per_device_train_batch_size", "4", "--max_steps", "6", "--learning_rate", "1e-2"),
        *("--loss", "ce:1,uld:1.5,mapped:0.5", "--save_strategy", "no", "--use_cpu", "--logging_steps", "1", *more),
    ]


def test_weights_are_those_of_a_folder(
    s3: S3, cache_path: Path, student_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3.url}/gemma"
    copy_cache(cache_path, url)
    assert main(command(str(cache_path), student_path, tmp_path / "folder")) == 0
    s3.proxy.requests.clear()
    for fault in (503, "reset", "truncate", "garble", "lose", "slow"):
        s3.proxy.fail(fault, method="GET", path="shards/")
    flags = ("--cache_dir", str(tmp_path / "disk"), "--cache_bytes", "100000000")
    assert main(command(url, student_path, tmp_path / "s3", *flags)) == 0
    assert not [fault for fault in s3.proxy.faults if fault.times]
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("folder", "s3"))
    assert expected.keys() == found.keys()
    assert all(bool((expected[name] == found[name]).all()) for name in expected)
    s3.proxy.requests.clear()
    monkeypatch.setenv("TEACH_ONCE_CACHE_DIR", str(tmp_path / "disk"))
    assert main(command(url, student_path, tmp_path / "again")) == 0
    assert s3.proxy.count("GET", "shards") == 0
    assert main(["evaluate", "--cache", url, "--model", f"s={tmp_path / 'again'}", "--max_length", "48"]) == 0
    assert main(["align-report", "--cache", url, "--student", str(student_path), "--max_length", "48"]) == 0
    assert s3.proxy.count("GET", "shards") == 0


def epoch_of(documents: CachedDocuments, rank: int = 0) -> list[list[CachedDocument]]:
    """What one of two ranks is served in an epoch."""
    batches = EpochBatches(documents.documents_per_shard, documents=2, ranks=2, rank=rank)
    return [documents.__getitems__(batch) for batch in batches]


def test_the_shards_that_an_epoch_opens_with_are_asked_for_at_the_same_time(s3: S3, cache_path: Path) -> None:
    """No answer comes before of every one of them as many objects are asked for as of a shard are at a time."""
    copy_cache(cache_path, url := f"{s3.url}/gemma")
    documents, folder = CachedDocuments(url, ids=True), CachedDocuments(cache_path, ids=True)
    first = next(iter(EpochBatches(folder.documents_per_shard, documents=2)))
    assert len(first.open_shards) >= 3
    reader = documents.cache.reader
    assert min(len(reader.objects_of(shard)) for shard in first.open_shards) > REQUESTS_AT_ONCE
    s3.proxy.most_at_once, s3.proxy.gather = 0, len(first.open_shards) * REQUESTS_AT_ONCE
    found = documents.__getitems__(first)
    assert s3.proxy.most_at_once == s3.proxy.gather
    assert [item.doc_id for item in found] == [item.doc_id for item in folder.__getitems__(first)]


def test_ranks_of_a_host_read_the_store_once(s3: S3, cache_path: Path, tmp_path: Path) -> None:
    """Both open an epoch with the same shards, at the same time."""
    copy_cache(cache_path, url := f"{s3.url}/gemma")
    expected = [epoch_of(CachedDocuments(cache_path), rank) for rank in range(2)]
    ranks = [CachedDocuments(open_cache(url, ids=False, cache_dir=tmp_path, cache_bytes=10**8)) for _ in range(2)]
    s3.proxy.requests.clear()
    with ThreadPoolExecutor(2) as threads:
        for batches, found in zip(expected, threads.map(epoch_of, ranks, range(2)), strict=True):
            for batch, served in zip(batches, found, strict=True):
                assert [item.doc_id for item in served] == [item.doc_id for item in batch]
                assert all(np.array_equal(a.probs, b.probs) for a, b in zip(served, batch, strict=True))
    assert s3.proxy.count("GET", "shards/") > 7
    assert set(s3.proxy.requests.values()) == {1}
