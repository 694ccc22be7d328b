"""One document read alone: what will be read of it is announced, all of it, and object stores fetch that at once."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from object_stores import S3
from small_caches import STORES, assert_stored, some_documents, some_settings, write_cache

from storage_specs import arrow_store, open_cache, shard_bytes, zarr_store
from storage_specs.local_objects import LocalObjects
from storage_specs.objects import ByteRange
from storage_specs.reader import cache_of
from storage_specs.remote_objects import RemoteObjects


class Announced(LocalObjects):
    """Hands over what was announced, the bytes of some ranges damaged; notes what was not."""

    def __init__(self, root: Path, damage: int = 0) -> None:
        super().__init__(root)
        self.damage = damage
        self.damaged: list[str] = []
        self.asked: list[str] = []

    def expect(self, ranges: Sequence[ByteRange]) -> dict[ByteRange, bytes]:
        found = {wanted: super(Announced, self).read_range(*wanted) for wanted in ranges}
        self.damaged += [name for name, *_ in ranges[: self.damage]]
        return found | {wanted: found[wanted][:-1] + b"?" for wanted in ranges[: self.damage]}

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        self.asked.append(name)
        return super().read_range(name, offset, size)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks and row groups of few rows, and no object that is read whole for being small."""
    monkeypatch.setattr(zarr_store, "ROWS_PER_CHUNK", 5)
    monkeypatch.setattr(zarr_store, "BYTES_PER_CHUNK", 64)
    monkeypatch.setattr(arrow_store, "ROWS_PER_GROUP", 20)
    monkeypatch.setattr(shard_bytes, "SMALL", 0)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("store", STORES)
def test_nothing_is_read_that_was_not_announced(store: str, tmp_path: Path) -> None:
    documents = some_documents(30)
    write_cache(tmp_path / "cache", documents, some_settings(store), documents_per_shard=15)
    for ids in (True, False):
        objects = Announced(tmp_path / "cache")
        cache = cache_of(objects, ids)
        assert cache.reader.record(0).parts
        for number, document in enumerate(documents):
            assert_stored(document, cache[number], ids=ids)
        assert objects.asked == []
    objects = Announced(tmp_path / "cache", damage=2)
    assert_stored(documents[7], cache_of(objects)[7])
    assert set(objects.asked) == set(objects.damaged)  # these are asked for again
    assert objects.damaged


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("store", STORES)
def test_an_object_store_is_asked_for_all_of_it_at_once(s3: S3, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = some_documents(10)
    write_cache(f"{s3.url}/x", documents, some_settings(store), documents_per_shard=10)
    cache = open_cache(f"{s3.url}/x")
    objects = len(cache.table.objects[0])
    cache[0]
    with monkeypatch.context() as patch:
        patch.setattr(RemoteObjects, "read_range", None)
        s3.proxy.requests.clear()
        s3.proxy.most_at_once, s3.proxy.gather = 0, min(objects - 1, 20) // 2 + 1
        assert_stored(documents[7], cache[7])
    assert s3.proxy.count("GET") == s3.proxy.requests.total() == objects - 1  # the record was read before
    assert s3.proxy.most_at_once > min(objects - 1, 20) // 2
    for fault in ("truncate", "garble", "reset", 500):
        s3.proxy.fail(fault, method="GET", times=2)
        assert_stored(documents[8], cache[8])
