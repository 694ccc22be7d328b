"""hf:// against a loopback server that speaks the hub's HTTP interface, through a proxy that breaks answers."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from faulty_proxy import FaultyProxy
from hub_server import COMMIT, HubServer
from small_caches import STORES, assert_stored, files_of, some_documents, some_settings, write_cache

from storage_specs import open_cache, verify_cache
from storage_specs.copying import copy_cache
from storage_specs.errors import (
    ChecksumMismatchError,
    ConfigError,
    MissingObjectError,
    SizeMismatchError,
    StoreAccessError,
    StoreUnavailableError,
    StoreUnsupportedError,
)
from storage_specs.object_roots import open_objects
from storage_specs.stored_object import StoredObject

DATA = bytes(range(256)) * 40
URL = "hf://datasets/user/caches/some/cache"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    folder = tmp_path / "some" / "cache"
    (folder / "shards").mkdir(parents=True)
    (folder / "a").write_bytes(DATA)
    (folder / "shards" / "b").write_bytes(b"")
    server = HubServer(tmp_path)
    proxy = FaultyProxy(server.address)
    monkeypatch.setenv("HF_ENDPOINT", proxy.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    yield proxy
    huggingface_hub.close_session()
    proxy.stop()
    server.stop()


def test_reading(hub: FaultyProxy) -> None:
    objects = open_objects(URL)
    assert objects.root == objects.place == URL
    assert (objects.size("a"), objects.size("none"), objects.size("shards")) == (len(DATA), None, None)
    assert (objects.read("a"), objects.read("shards/b")) == (DATA, b"")
    assert objects.read_range("a", 5, 10) == DATA[5:15]
    assert sorted(objects.list()) == [("a", len(DATA)), ("shards/b", 0)]
    assert list(objects.list("shards/")) == [("shards/b", 0)]
    wanted = [StoredObject.of("a", DATA), StoredObject.of("shards/b", b"")]
    assert objects.fetch_all(wanted) == {"a": DATA, "shards/b": b""}
    assert pickle.loads(pickle.dumps(objects)).read("a") == DATA
    for offset, size in ((len(DATA) - 5, 10), (len(DATA) + 5, 1)):
        with pytest.raises(SizeMismatchError):
            objects.read_range("a", offset, size)
    for read in (lambda: objects.read("none"), lambda: objects.read_range("none", 0, 1)):
        with pytest.raises(MissingObjectError):
            read()
    with pytest.raises(ChecksumMismatchError):
        objects.fetch(StoredObject.of("a", DATA[::-1]))


def test_all_objects_come_from_one_commit(hub: FaultyProxy) -> None:
    objects = open_objects("hf://datasets/user/caches@main/some/cache")
    assert objects.read("a") == objects.read("a") == DATA
    assert hub.count("GET", f"resolve/{COMMIT}/") == 2
    assert hub.count("GET", "resolve/main/") == 0


@pytest.mark.parametrize("store", STORES)
def test_a_cache_on_the_hub_is_a_cache(hub: FaultyProxy, tmp_path: Path, store: str) -> None:
    documents = some_documents(4)
    write_cache(tmp_path / "caches" / "small", documents, some_settings(store), documents_per_shard=2)
    url = "hf://datasets/user/caches@main/caches/small"
    cache = open_cache(url, cache_dir=tmp_path / "disk")
    for written, read in zip(documents, cache, strict=True):
        assert_stored(written, read)
    assert cache.path == url
    assert verify_cache(url).ok
    assert copy_cache(url, tmp_path / "pulled").manifest == cache.manifest
    assert files_of(tmp_path / "pulled") == files_of(tmp_path / "caches" / "small")
    one = open_cache(url)[3]
    assert_stored(documents[3], one)


@pytest.mark.parametrize("fault", [503, "truncate", "garble"])
def test_a_fault_that_passes_is_not_seen(hub: FaultyProxy, fault: str | int) -> None:
    objects = open_objects(URL)
    objects.size("a")
    hub.fail(fault, path="resolve")
    assert objects.fetch(StoredObject.of("a", DATA)) == DATA


def test_refusals_are_one_line(hub: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = open_objects(URL)
    objects.size("a")
    for status, error in ((401, StoreAccessError), (403, StoreAccessError), (418, StoreUnavailableError)):
        hub.fail(status, times=100)
        with pytest.raises(error, match=r"^hf://datasets/user/caches/some/cache/a: [^\n]*$"):
            objects.read("a")
        hub.heal()
    for url in ("hf://datasets/user/other/cache", "hf://datasets/user/caches@no-such-branch/cache"):
        with pytest.raises(StoreAccessError, match="no such repository or revision"):
            open_objects(url).size("a")
    with pytest.raises(ConfigError, match="expected hf://datasets/USER/REPO"):
        open_objects("hf://x").size("a")
    for write in (
        lambda: objects.create("x", b""),
        lambda: objects.write_all({}),
        lambda: objects.delete("a"),
        lambda: write_cache("hf://datasets/user/caches/new", some_documents(3), some_settings()),
    ):
        with pytest.raises(StoreUnsupportedError, match="read only"):
            write()
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "huggingface_hub", None)
        with pytest.raises(ConfigError, match=r"pip install 'teach-once\[cloud\]'"):
            open_objects(URL)
