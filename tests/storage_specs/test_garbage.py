"""gc: what nobody names goes, what somebody names or may still be writing stays."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_caches import STORES, begun, files_of, some_documents, some_settings, write_cache
from test_lease import end, hold

from storage_specs import CacheWriter, verify_cache
from storage_specs.errors import CacheInUseError, ConfigError, CorruptCacheError, NotACacheError
from storage_specs.garbage import collect_garbage
from storage_specs.local_objects import WRITING_FOLDER, LocalObjects


def names(found: tuple[tuple[str, int], ...]) -> set[str]:
    return {name for name, _ in found}


@pytest.mark.parametrize("store", STORES)
def test_a_finished_cache_keeps_what_its_manifest_names(tmp_path: Path, store: str) -> None:
    write_cache(tmp_path, some_documents(7), some_settings(store))
    before = files_of(tmp_path)
    orphans = {
        "shards/000003.json": b"{}",
        "shards/000003.parquet": b"x",
        "shards/000001.r1.id_codes.parquet": b"",
        "shards/000002.zarr/old_array/c/0": b"yy",
        "shards/000001.r1.zarr/zarr.json": b"{}",
        "manifest.r0.json": b"{}",
        "shards.r1.parquet": b"z",
        "vocabulary.r2.parquet": b"z",
    }
    for name, data in (orphans | {"notes.txt": b"mine", "shards/README": b"mine"}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    spared = collect_garbage(tmp_path)
    assert (names(spared.removable), names(spared.young)) == (set(), orphans.keys())
    found = collect_garbage(tmp_path, grace=0, dry_run=True)
    assert dict(found.removable) == {name: len(data) for name, data in orphans.items()}
    assert names(found.foreign) == {"notes.txt", "shards/README"}
    assert collect_garbage(tmp_path, grace=0) == found
    assert files_of(tmp_path) == before | {"notes.txt": b"mine", "shards/README": b"mine"}
    assert not [folder for folder, inside, files in os.walk(tmp_path) if not inside and not files]
    assert collect_garbage(tmp_path, grace=0).removable == ()
    assert verify_cache(tmp_path).ok


@pytest.mark.parametrize("store", STORES)
def test_an_unfinished_build_keeps_what_it_goes_on_from(tmp_path: Path, store: str) -> None:
    writer, documents, settings, plan = begun(tmp_path, store, shards=2)
    before = files_of(tmp_path)
    writer.write_shard(2, documents[6:])
    (tmp_path / "shards/000002.json").unlink()  # killed between its objects and its record
    (tmp_path / "shards.parquet").write_bytes(b"killed before its manifest")
    found = collect_garbage(tmp_path, grace=0)
    assert {name.partition(".")[0] for name in names(found.removable)} == {"shards/000002", "shards"}
    assert files_of(tmp_path) == before
    assert CacheWriter(tmp_path, settings, plan).missing_shards() == [2]


def test_old_orphans_go_and_young_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(tmp_path, some_documents(3), some_settings())
    for name in ("shards/000007.parquet", "shards/000008.parquet"):
        (tmp_path / name).write_bytes(b"orphan")
    age = LocalObjects.age
    monkeypatch.setattr(LocalObjects, "age", lambda self, name: age(self, name) + 7200 * ("000007" in name))
    found = collect_garbage(tmp_path, grace=3600)
    assert (names(found.removable), names(found.young)) == ({"shards/000007.parquet"}, {"shards/000008.parquet"})


def test_half_written_files(tmp_path: Path) -> None:
    """Those of dead processes of this host go; those of a live one stay; those of other hosts go by age."""
    write_cache(tmp_path, some_documents(3), some_settings())
    folder = tmp_path / WRITING_FOLDER
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", "pass"]) as dead:
        dead.wait()
    gone, alive, elsewhere = f"{socket.gethostname()}-{dead.pid}-0", f"{socket.gethostname()}-1-0", "other-host-1-0"
    for name in (gone, alive, elsewhere):
        (folder / name).write_bytes(b"half")
    assert names(collect_garbage(tmp_path).removable) == {f"{WRITING_FOLDER}/{gone}"}
    assert {file.name for file in folder.iterdir()} == {alive, elsewhere}
    assert names(collect_garbage(tmp_path, grace=0).removable) == {f"{WRITING_FOLDER}/{elsewhere}"}


def test_nothing_is_removed_beside_a_live_builder(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "shards/000002.parquet").write_bytes(b"being written")
    before = files_of(tmp_path)
    process = hold(tmp_path)
    try:
        with pytest.raises(CacheInUseError):
            collect_garbage(tmp_path, grace=0)
        assert names(collect_garbage(tmp_path, grace=0, dry_run=True).removable) == {"shards/000002.parquet"}
    finally:
        end(process)
    assert files_of(tmp_path) == before


def test_a_damaged_or_missing_cache_is_not_cleaned(tmp_path: Path) -> None:
    with pytest.raises(NotACacheError):
        collect_garbage(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    write_cache(tmp_path, some_documents(3), some_settings())
    before = files_of(tmp_path)
    for name in ("manifest.json", "shards.parquet"):
        (tmp_path / name).write_bytes(before[name][:-1])
        with pytest.raises(CorruptCacheError, match="cache-builder repair"):
            collect_garbage(tmp_path, grace=0)
        (tmp_path / name).write_bytes(before[name])
    assert files_of(tmp_path) == before
    with pytest.raises(ConfigError, match="grace is -1"):
        collect_garbage(tmp_path, grace=-1)
