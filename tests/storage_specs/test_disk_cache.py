"""The disk cache: every object is read once per host, whatever lies on the disk, within the bound."""

import os
import pickle
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from object_stores import S3
from small_caches import STORES, assert_stored, some_documents, some_settings, write_cache

from storage_specs import open_cache
from storage_specs.disk_cache import DiskCache
from storage_specs.errors import ChecksumMismatchError, ConfigError, MissingObjectError
from storage_specs.local_objects import LocalObjects
from storage_specs.stored_object import StoredObject

HERE = Path(__file__).parent


class Counted(LocalObjects):
    """Local objects that count how often each is fetched."""

    fetched: Counter[str]

    def fetch(self, stored: StoredObject) -> bytes:
        self.fetched[stored.name] += 1
        return super().fetch(stored)


@pytest.fixture
def source(tmp_path: Path) -> Counted:
    objects = Counted(tmp_path / "source")
    objects.fetched = Counter()
    return objects


def some_objects(source: Counted, count: int, size: int) -> list[StoredObject]:
    contents = {f"shards/{number}": np.random.default_rng(number).bytes(size) for number in range(count)}
    source.write_all(contents)
    return [StoredObject.of(name, data) for name, data in contents.items()]


def kept(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.glob("objects/*/*")}


def test_objects_are_read_once(source: Counted, tmp_path: Path) -> None:
    wanted = some_objects(source, 20, 1000)
    cache = DiskCache(source, tmp_path / "disk", 10**6)
    first = cache.fetch_all(wanted)
    assert first == {stored.name: source.read(stored.name) for stored in wanted}
    assert DiskCache(source, tmp_path / "disk", 10**6).fetch_all(wanted) == first
    assert pickle.loads(pickle.dumps(cache)).fetch(wanted[0]) == first["shards/0"]
    assert source.fetched == {stored.name: 1 for stored in wanted}
    assert sorted(kept(tmp_path / "disk").values()) == sorted(first.values())
    assert not list((tmp_path / "disk" / "writing").iterdir())


def test_threads_wait_for_the_one_that_reads(source: Counted, tmp_path: Path) -> None:
    wanted = some_objects(source, 3, 100_000)
    cache = DiskCache(source, tmp_path / "disk", 10**6)
    with ThreadPoolExecutor(12) as threads:
        found = list(threads.map(lambda _: cache.fetch_all(wanted), range(12)))
    assert all(one == found[0] for one in found)
    assert source.fetched == {stored.name: 1 for stored in wanted}


def test_the_bound_holds_for_many_at_once(source: Counted, tmp_path: Path) -> None:
    wanted = some_objects(source, 60, 1000)
    caches = [DiskCache(source, tmp_path / "disk", 5500) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        for found in threads.map(lambda cache: cache.fetch_all(wanted), caches):
            assert found == {stored.name: source.read(stored.name) for stored in wanted}
    assert 1000 <= sum(map(len, kept(tmp_path / "disk").values())) <= 5500


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other", "folder", "gone"])
def test_a_damaged_file_is_fetched_again(source: Counted, tmp_path: Path, damage: str) -> None:
    (stored, other) = some_objects(source, 2, 1000)
    cache = DiskCache(source, tmp_path / "disk", 10**6)
    data = cache.fetch(stored)
    (file,) = kept(tmp_path / "disk")
    if damage == "folder":
        file.unlink()
        file.mkdir()
    elif damage == "gone":
        for folder, _, files in os.walk(tmp_path / "disk", topdown=False):
            for name in files:
                os.unlink(os.path.join(folder, name))
            os.rmdir(folder)
    else:
        flipped = data[:500] + bytes([data[500] ^ 1]) + data[501:]
        changed = {"flip": flipped, "cut": data[:-1], "empty": b"", "other": source.read(other.name)}
        file.write_bytes(changed[damage])
    assert cache.fetch(stored) == data
    assert source.fetched[stored.name] == 2
    if damage in ("flip", "cut", "empty", "other"):
        assert cache.fetch(stored) == data
        assert source.fetched[stored.name] == 2


def test_damage_at_the_source_is_told_and_not_kept(source: Counted, tmp_path: Path) -> None:
    (stored,) = some_objects(source, 1, 1000)
    cache = DiskCache(source, tmp_path / "disk", 10**6)
    source.write_all({stored.name: bytes(1000)})
    with pytest.raises(ChecksumMismatchError, match="shards/0"):
        cache.fetch(stored)
    source.delete(stored.name)
    with pytest.raises(MissingObjectError, match="shards/0"):
        cache.fetch_all([stored])
    assert kept(tmp_path / "disk") == {}


def test_the_bound_holds_and_the_least_used_go(source: Counted, tmp_path: Path) -> None:
    wanted = some_objects(source, 30, 1000)
    cache = DiskCache(source, tmp_path / "disk", 10_500)
    for number, stored in enumerate(wanted):
        cache.fetch(stored)
        cache.fetch(wanted[0])  # is used all the time
        for age, file in enumerate(sorted(kept(tmp_path / "disk"), key=lambda file: file.stat().st_mtime_ns)):
            os.utime(file, (age, age))  # one second apart, as in real use
        assert sum(map(len, kept(tmp_path / "disk").values())) <= 10_500, number
    assert source.fetched["shards/0"] == 1
    assert len(kept(tmp_path / "disk")) >= 8
    before = source.fetched["shards/29"]
    cache.fetch(wanted[29])
    assert source.fetched["shards/29"] == before
    cache.fetch(wanted[1])
    assert source.fetched["shards/1"] == 2
    (large,) = some_objects(source, 1, 11_000)
    known = kept(tmp_path / "disk")
    assert len(cache.fetch(large)) == 11_000  # passes through, and drives nothing out
    assert kept(tmp_path / "disk") == known


def test_what_killed_processes_left_counts_and_goes(source: Counted, tmp_path: Path) -> None:
    wanted = some_objects(source, 4, 1000)
    cache = DiskCache(source, tmp_path / "disk", 3000)
    abandoned, being_written = (tmp_path / "disk" / "writing" / name for name in ("old", "new"))
    abandoned.write_bytes(bytes(2500))
    being_written.write_bytes(bytes(1000))
    os.utime(abandoned, (0, 0))
    (tmp_path / "disk" / "used").write_text("nonsense")
    cache.fetch_all(wanted)
    assert not abandoned.exists()
    assert being_written.exists()
    assert 1000 <= sum(map(len, kept(tmp_path / "disk").values())) <= 2000


def test_a_full_disk_only_costs_the_next_reading(
    source: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stored,) = some_objects(source, 1, 1000)
    cache = DiskCache(source, tmp_path / "disk", 10**6)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert cache.fetch(stored) == cache.fetch(stored) == source.read(stored.name)
    assert source.fetched[stored.name] == 2
    assert kept(tmp_path / "disk") == {}


def test_settings_that_cannot_be(source: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cache_dir .*file: cannot be written"):
        DiskCache(source, tmp_path / "file", 1)
    with pytest.raises(ConfigError, match="cache_bytes is 0"):
        DiskCache(source, tmp_path / "disk", 0)
    monkeypatch.setenv("TEACH_ONCE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TEACH_ONCE_CACHE_BYTES", "32 GiB")
    with pytest.raises(ConfigError, match="TEACH_ONCE_CACHE_BYTES is '32 GiB'"):
        open_cache("gs://bucket/x")


@pytest.mark.parametrize("store", STORES)
def test_processes_of_a_host_read_the_store_once(s3: S3, tmp_path: Path, store: str) -> None:
    """Four processes read a whole cache from S3, at the same time; then one more, after files were damaged."""
    documents = some_documents(4)
    write_cache(f"{s3.url}/cache", documents, some_settings(store), documents_per_shard=2)
    s3.proxy.requests.clear()
    script = (
        "import sys\n"
        "from storage_specs import open_cache\n"
        "cache = open_cache(sys.argv[1], cache_dir=sys.argv[2], cache_bytes=10**9)\n"
        "print(sum(len(document.text) for document in cache), cache[3].doc_id, len(cache.vocabulary.token_bytes))\n"
    )
    command = [sys.executable, "-c", script, f"{s3.url}/cache", str(tmp_path / "disk")]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    children = [
        subprocess.Popen(command, cwd=HERE, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    told = {child.communicate(timeout=300)[0] for child in children}
    assert told == {f"{sum(len(document.text) for document in documents)} {documents[3].doc_id} 300\n"}
    reads = {path: count for (method, path), count in s3.proxy.requests.items() if method == "GET"}
    kept_objects = {path: count for path, count in reads.items() if "manifest.json" not in path}
    assert len(kept_objects) >= 6
    assert set(kept_objects.values()) == {1}, kept_objects
    for file in kept(tmp_path / "disk"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    cache = open_cache(f"{s3.url}/cache", cache_dir=tmp_path / "disk")
    for written, read in zip(documents, cache, strict=True):
        assert_stored(written, read)
    again = pickle.loads(pickle.dumps(cache))
    s3.proxy.requests.clear()
    assert [document.doc_id for document in again] == [document.doc_id for document in documents]
    assert s3.proxy.count("GET", "shards/") == 0
