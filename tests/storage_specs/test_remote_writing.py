"""Whole caches in an object store: the same bytes as in a folder, whoever else builds there, whatever answers break."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from object_stores import S3, objects_of
from small_caches import STORES, assert_stored, files_of, some_documents, some_settings, write_cache

from storage_specs import CacheWriter, make_plan, open_cache, verify_cache
from storage_specs.errors import (
    CacheInUseError,
    CacheMismatchError,
    ChecksumMismatchError,
    CorruptCacheError,
    IncompleteCacheError,
    MissingObjectError,
    NotACacheError,
    OutputFolderError,
)
from storage_specs.finalization import finalize_cache
from storage_specs.lease import lease
from storage_specs.object_roots import open_objects


@pytest.mark.parametrize("store", STORES)
def test_the_same_bytes_as_in_a_folder(s3: S3, tmp_path: Path, store: str) -> None:
    """With one broken answer of each kind among the writes; finished from outside; read by document and by shard."""
    documents, settings = some_documents(5), some_settings(store)
    local = write_cache(tmp_path / "cache", documents, settings, documents_per_shard=2)
    for fault in (500, 503, "lose", "refuse"):
        s3.proxy.fail(fault, method="PUT", path="shards/")
    s3.proxy.fail("lose", method="PUT", path=r"plan\.json")
    s3.proxy.fail("lose", method="PUT", path=r"manifest\.json")
    plan = make_plan(documents, 2)
    with pytest.raises(NotACacheError):
        open_cache(f"{s3.url}/a")
    writer = CacheWriter(f"{s3.url}/a", settings, plan)
    for shard in writer.missing_shards():
        writer.write_shard(shard, [documents[number] for number in plan.shards[shard]])
    with pytest.raises(IncompleteCacheError, match=rf"cache-builder finalize {s3.url}/a"):
        open_cache(f"{s3.url}/a")
    assert finalize_cache(f"{s3.url}/a") == local
    assert not [fault for fault in s3.proxy.faults if fault.times]
    assert objects_of(f"{s3.url}/a") == files_of(tmp_path / "cache")
    cache = open_cache(f"{s3.url}/a")
    for number, written in enumerate(documents):
        assert_stored(written, cache[number])
        assert_stored(written, cache.streamed(number))
    without_ids = open_cache(f"{s3.url}/a", ids=False)
    s3.proxy.requests.clear()
    for written, read in zip(documents, without_ids, strict=True):
        assert_stored(written, read, ids=False)


def test_other_things_are_left_alone(s3: S3) -> None:
    documents = some_documents(3)
    open_objects(f"{s3.url}/x").write_all({"deep/thesis.tex": b"x"})
    with pytest.raises(OutputFolderError, match=r"s3://.*/x holds something else \(deep/thesis\.tex\)"):
        write_cache(f"{s3.url}/x", documents, some_settings())
    write_cache(f"{s3.url}/y", documents, some_settings())
    before = objects_of(f"{s3.url}/y")
    with pytest.raises(CacheMismatchError, match="holds a cache of another build"):
        write_cache(f"{s3.url}/y", documents, some_settings(k=7))
    assert objects_of(f"{s3.url}/y") == before
    assert objects_of(f"{s3.url}/x") == {"deep/thesis.tex": b"x"}


@pytest.mark.parametrize("remote", [True, False])
def test_of_two_builds_at_one_place_one_wins(s3: S3, tmp_path: Path, remote: bool) -> None:
    place = f"{s3.url}/race" if remote else tmp_path / "race"
    start = threading.Barrier(2)

    def build(k: int) -> str:
        start.wait()
        try:
            return write_cache(place, some_documents(4, k=k), some_settings(k=k), documents_per_shard=2).cache_id
        except CacheMismatchError as error:
            return f"lost: {error}"

    with ThreadPoolExecutor(2) as threads:
        ends = list(threads.map(build, (7, 8)))
    assert ["holds a cache of another build: k" in end for end in sorted(ends)] == [False, True], ends
    cache = open_cache(place)
    assert cache.manifest.cache_id in ends
    assert cache.manifest.k == (7, 8)[ends.index(cache.manifest.cache_id)]
    assert verify_cache(place).ok


def test_of_builds_of_the_same_one_wins_and_the_others_say_so(s3: S3, tmp_path: Path) -> None:
    documents, start, place = some_documents(4), threading.Barrier(3), f"{s3.url}/same"

    def build(_: int) -> str:
        start.wait()
        try:
            with lease(open_objects(place)):
                return write_cache(place, documents, some_settings("arrow"), documents_per_shard=2).cache_id
        except CacheInUseError:
            return "in use"

    with ThreadPoolExecutor(3) as threads:
        ends = set(threads.map(build, range(3)))
    local = write_cache(tmp_path / "cache", documents, some_settings("arrow"), documents_per_shard=2)
    assert ends <= {local.cache_id, "in use"}
    with lease(open_objects(place)):
        assert write_cache(place, documents, some_settings("arrow"), documents_per_shard=2) == local
    assert objects_of(place) == files_of(tmp_path / "cache")


def test_damage_in_a_bucket_is_found(s3: S3) -> None:
    write_cache(f"{s3.url}/a", some_documents(4), some_settings("arrow"), documents_per_shard=2)
    objects, name = open_objects(f"{s3.url}/a"), "shards/000001.parquet"
    data = objects.read(name)
    for bad, error in ((data[:-1] + bytes([data[-1] ^ 1]), ChecksumMismatchError), (None, MissingObjectError)):
        objects.delete(name) if bad is None else objects.write_all({name: bad})
        with pytest.raises(error, match=name):
            open_cache(f"{s3.url}/a").columns(1)
        with pytest.raises(CorruptCacheError):
            open_cache(f"{s3.url}/a")[3]
        report = verify_cache(f"{s3.url}/a")
        assert [name in problem for problem in report.problems] == [True]


def _texts(cache: object, answers: object) -> None:
    answers.put("".join(document.text for document in cache))


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # that is the point of it
def test_an_open_cache_works_in_other_processes(s3: S3, tmp_path: Path, start: str) -> None:
    documents = some_documents(4)
    write_cache(f"{s3.url}/a", documents, some_settings("arrow"), documents_per_shard=2)
    processes = multiprocessing.get_context(start)
    for cache in (open_cache(f"{s3.url}/a"), open_cache(f"{s3.url}/a", cache_dir=tmp_path / "disk")):
        assert cache[0].text == documents[0].text
        answers = processes.Queue()
        child = processes.Process(target=_texts, args=(cache, answers), daemon=True)
        child.start()
        assert answers.get(timeout=240) == "".join(document.text for document in documents)
        child.join(240)
        assert child.exitcode == 0
        child.close()
        answers.close()
        answers.join_thread()
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda number, cache=cache: cache[number].text, range(4)))
        assert found == [document.text for document in documents]
