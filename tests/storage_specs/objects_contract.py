"""What every place must do that caches are written to: a folder, S3, Google Cloud Storage, Azure Blob Storage."""

from pathlib import Path

import pytest
from small_caches import assert_stored, files_of, some_documents, some_settings, write_cache

from storage_specs import open_cache, verify_cache
from storage_specs.copying import copy_cache
from storage_specs.diagnosis import diagnose
from storage_specs.errors import ChecksumMismatchError, MissingObjectError, SizeMismatchError
from storage_specs.garbage import collect_garbage
from storage_specs.merging import merge_caches
from storage_specs.object_roots import open_objects
from storage_specs.objects import Objects
from storage_specs.repairing import restore
from storage_specs.stored_object import StoredObject

CONTENTS = {"plan.json": b"{}", "shards/000000.json": b"record", "shards/000000.zarr/text/c/0": b"", "shards/1": b"x"}


def check_objects(objects: Objects) -> None:
    """Every method, in an empty place, which holds CONTENTS afterwards."""
    assert list(objects.list()) == []
    objects.write_all({"plan.json": b"other"})
    objects.write_all(CONTENTS)
    assert sorted(objects.list()) == sorted((name, len(data)) for name, data in CONTENTS.items())
    assert sorted(objects.list("shards/000000.")) == [("shards/000000.json", 6), ("shards/000000.zarr/text/c/0", 0)]
    assert list(objects.list("none/")) == []
    for name, data in CONTENTS.items():
        assert (objects.size(name), objects.read(name)) == (len(data), data)
        assert objects.fetch(StoredObject.of(name, data)) == data
    assert objects.fetch_all([StoredObject.of(name, data) for name, data in CONTENTS.items()]) == CONTENTS
    assert objects.size("none") is None
    assert objects.age("none") is None
    assert -5 < objects.age("plan.json") < 300
    objects.link_all(objects, {"linked": StoredObject.of("shards/1", b"x")})
    assert objects.read("linked") == b"x"
    objects.delete("linked")
    assert objects.read_range("shards/000000.json", 1, 3) == b"eco"
    assert objects.read_range("shards/000000.json", 0, 0) == b""
    for offset, size in ((3, 4), (6, 1), (7, 1), (0, 2**60)):
        with pytest.raises(SizeMismatchError, match=r"shards/000000\.json"):
            objects.read_range("shards/000000.json", offset, size)
    reads = (
        lambda: objects.read("none"),
        lambda: objects.read_range("none", 0, 1),
        lambda: objects.read_range("none", 0, 0),
        lambda: objects.fetch(StoredObject.of("none", b"")),
        lambda: objects.check_size(StoredObject.of("none", b"")),
    )
    for read in reads:
        with pytest.raises(MissingObjectError, match="none: expected"):
            read()
    for data, error in ((b"recor", SizeMismatchError), (b"RECORD", ChecksumMismatchError)):
        with pytest.raises(error, match=r"shards/000000\.json"):
            objects.fetch(StoredObject.of("shards/000000.json", data))
    assert objects.create("new", b"first")
    assert objects.create("new", b"first")
    assert not objects.create("new", b"second")
    assert objects.read("new") == b"first"
    objects.delete("new")
    objects.delete("new")
    assert objects.size("new") is None
    assert objects.create("new", b"second")
    objects.delete("new")
    objects.sweep()


def check_cache(place: str, folder: Path, store: str) -> None:
    """A cache written there, read, verified and pulled is the one that is written to a folder."""
    documents, settings = some_documents(4), some_settings(store)
    manifest = write_cache(place, documents, settings, documents_per_shard=2)
    cache = open_cache(place)
    for number, written in enumerate(documents):
        assert_stored(written, cache[number])
        assert_stored(written, cache.streamed(number))
    assert verify_cache(place).ok
    assert verify_cache(place, fast=True).ok
    assert copy_cache(place, folder / "pulled").manifest == manifest
    assert write_cache(folder / "local", documents, settings, documents_per_shard=2) == manifest
    assert files_of(folder / "pulled") == files_of(folder / "local")
    objects = open_objects(place)
    for name in ("shards/000001.json", "plan.json", "shards.parquet"):
        objects.delete(name)
        assert restore(diagnose(place)) == manifest
    objects.write_all({"shards/000007.parquet": b"orphan"})
    assert [name for name, _ in collect_garbage(place, grace=0).removable] == ["shards/000007.parquet"]
    more = write_cache(folder / "more", some_documents(3, seed=1), settings, documents_per_shard=2)
    merged = merge_caches([place, folder / "more"], f"{place}-merged")
    assert merged.counts["rows"] == manifest.counts["rows"] + more.counts["rows"]
    assert verify_cache(f"{place}-merged").ok
