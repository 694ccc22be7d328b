"""Pushing and pulling: every byte verified on the way, the manifest last, resumed and repeated without harm."""

from pathlib import Path

import pytest
from object_stores import S3, objects_of
from small_caches import STORES, begun, files_of, some_documents, some_settings, write_cache

from storage_specs import open_cache, verify_cache
from storage_specs.copying import copy_cache
from storage_specs.errors import (
    CacheMismatchError,
    ChecksumMismatchError,
    IncompleteCacheError,
    NotACacheError,
    OutputFolderError,
    StoreUnavailableError,
)
from storage_specs.object_roots import open_objects


@pytest.mark.parametrize("store", STORES)
def test_there_and_back(s3: S3, tmp_path: Path, store: str) -> None:
    manifest = write_cache(tmp_path / "cache", some_documents(4), some_settings(store), documents_per_shard=2)
    files = files_of(tmp_path / "cache")
    seen = []
    pushed = copy_cache(tmp_path / "cache", f"{s3.url}/a", lambda done, all_bytes: seen.append((done, all_bytes)))
    sizes = sum(map(len, files.values()))
    assert (pushed.manifest, pushed.objects, pushed.written_objects) == (manifest, len(files), len(files))
    assert pushed.written_bytes == sizes
    assert seen == sorted(seen)
    assert seen[-1] == (sizes - len(files["manifest.json"]),) * 2
    assert objects_of(f"{s3.url}/a") == files
    assert copy_cache(f"{s3.url}/a", f"{s3.url}/b").written_objects == len(files)
    assert copy_cache(f"{s3.url}/b", tmp_path / "back").written_objects == len(files)
    assert files_of(tmp_path / "back") == files
    assert copy_cache(tmp_path / "back", tmp_path / "deep" / "er").manifest == manifest
    assert files_of(tmp_path / "deep" / "er") == files
    assert verify_cache(f"{s3.url}/b").ok


def test_repeating_writes_nothing(s3: S3, tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", some_documents(7), some_settings())
    copy_cache(tmp_path / "cache", f"{s3.url}/a")
    s3.proxy.requests.clear()
    again = copy_cache(tmp_path / "cache", f"{s3.url}/a")
    assert (again.written_objects, again.written_bytes) == (0, 0)
    assert s3.proxy.count("PUT", "shards") == 0


def test_an_interrupted_copy_goes_on(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(tmp_path / "cache", some_documents(7), some_settings())
    files = files_of(tmp_path / "cache")

    def interrupt(done: int, _: int) -> None:
        if done > sum(map(len, files.values())) // 2:
            raise KeyboardInterrupt

    for target in (f"{s3.url}/a", tmp_path / "target"):
        with pytest.raises(KeyboardInterrupt):
            copy_cache(tmp_path / "cache", target, interrupt)
        with pytest.raises(IncompleteCacheError):
            open_cache(target)
        there = objects_of(target)
        assert 0 < len(there) < len(files)
        open_objects(target).write_all(
            {"shards/000000.zarr/text/c/0": files["shards/000000.zarr/text/c/0"][:-1] + b"?"}
        )
        resumed = copy_cache(tmp_path / "cache", target)
        assert resumed.written_objects == len(files) - len(there) + 1
        assert objects_of(target) == files


def test_other_things_are_left_alone(s3: S3, tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", some_documents(7), some_settings())
    write_cache(tmp_path / "other", some_documents(6), some_settings())
    begun(tmp_path / "begun", store="arrow", shards=1)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    copy_cache(tmp_path / "other", f"{s3.url}/other")
    open_objects(f"{s3.url}/thesis").write_all({"thesis.tex": b"x"})
    refusals = {
        tmp_path / "other": (CacheMismatchError, "holds another cache"),
        f"{s3.url}/other": (CacheMismatchError, "holds another cache"),
        tmp_path / "begun": (CacheMismatchError, "holds the beginning of another cache"),
        tmp_path / "thesis": (OutputFolderError, r"holds something else \(thesis\.tex\)"),
        f"{s3.url}/thesis": (OutputFolderError, r"holds something else \(thesis\.tex\)"),
    }
    for target, (error, words) in refusals.items():
        before = objects_of(target)
        with pytest.raises(error, match=words):
            copy_cache(tmp_path / "cache", target)
        assert objects_of(target) == before
    with pytest.raises(NotACacheError):
        copy_cache(tmp_path / "nothing", tmp_path / "new")
    with pytest.raises(IncompleteCacheError):
        copy_cache(tmp_path / "begun", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_damaged_source_gives_no_cache(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(tmp_path / "cache", some_documents(7), some_settings("arrow"))
    file = tmp_path / "cache" / "shards" / "000001.parquet"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ChecksumMismatchError, match=r"shards/000001\.parquet"):
        copy_cache(tmp_path / "cache", f"{s3.url}/a")
    with pytest.raises(IncompleteCacheError):
        open_cache(f"{s3.url}/a")
    file.write_bytes(data)
    monkeypatch.setattr("storage_specs.remote_objects.RETRY", {"max_retries": 1})
    monkeypatch.setattr("storage_specs.remote_objects.PAUSES", ())
    s3.proxy.fail(503, path="shards/000002", times=1000)
    with pytest.raises(StoreUnavailableError):
        copy_cache(tmp_path / "cache", f"{s3.url}/a")
    s3.proxy.heal()
    copy_cache(tmp_path / "cache", f"{s3.url}/a")
    assert objects_of(f"{s3.url}/a") == files_of(tmp_path / "cache")
