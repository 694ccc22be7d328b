"""Reading: the documents that were written, by number, and typed errors for everything else."""

import json
import multiprocessing
import operator
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_caches import STORES, arrays_of, assert_stored, some_documents, some_settings, some_vocabulary, write_cache

from storage_specs import arrow_store, open_cache, reader, shard_bytes, zarr_store
from storage_specs.document import CachedDocument, canonical_json, is_held_out
from storage_specs.errors import (
    ChecksumMismatchError,
    CorruptCacheError,
    IncompleteCacheError,
    MalformedObjectError,
    MissingObjectError,
    NotACacheError,
    SizeMismatchError,
    SpecVersionError,
)
from storage_specs.local_objects import LocalObjects
from storage_specs.plan import make_plan
from storage_specs.reader import Cache
from storage_specs.sealed_json import seal
from storage_specs.shard_reading import ShardReader
from storage_specs.shard_table import table_from_object
from storage_specs.stored_object import StoredObject
from storage_specs.writer import CacheWriter

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=STORES)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[CachedDocument]]:
    """A finished cache of 8 documents in 3 shards, only read by the tests."""
    path, documents = tmp_path_factory.mktemp(request.param), some_documents(8)
    write_cache(path, documents, some_settings(request.param))
    return path, documents


@pytest.fixture(params=STORES)
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[CachedDocument]]:
    """The same, to be damaged."""
    documents = some_documents(8)
    write_cache(tmp_path / "cache", documents, some_settings(request.param))
    return tmp_path / "cache", documents


def test_documents_come_back(written: tuple[Path, list[CachedDocument]]) -> None:
    path, documents = written
    cache = open_cache(str(path))
    assert len(cache) == 8
    for number, document in enumerate(documents):
        assert_stored(document, cache[number])
        assert_stored(document, cache[number - 8])
        assert_stored(document, cache.streamed(number))
    for document, read in zip(documents, cache, strict=True):
        assert_stored(document, read)
    for document, read in zip(documents[3:6], cache.shard(1), strict=True):
        assert_stored(document, read)
    for number in (8, -9):
        with pytest.raises(IndexError, match=f"document {number} of a cache of 8"):
            cache[number]
    for shard in (3, -1):
        with pytest.raises(IndexError, match="of a cache of 3"):
            cache.shard(shard)
    assert cache[np.int64(2)].doc_id == documents[2].doc_id
    with pytest.raises(TypeError):
        cache["0"]


def test_types_and_shapes(written: tuple[Path, list[CachedDocument]]) -> None:
    document = open_cache(written[0])[0]
    rows = len(document.segment)
    types = {name: (array.dtype, array.shape) for name, array in arrays_of(document).items()}
    assert types == {
        "segment": (np.int64, (rows,)),
        "byte_start": (np.int64, (rows,)),
        "byte_end": (np.int64, (rows,)),
        "is_end": (np.bool_, (rows,)),
        "gold_logprob": (np.float32, (rows,)),
        "tail_mass": (np.float32, (rows,)),
        "probs": (np.float32, (rows, 8)),
        "token_ids": (np.int64, (rows, 4)),
    }
    assert document.kind == "chat"
    assert [message.role for message in document.messages] == ["user", "assistant", "assistant"]
    assert document.messages[1].extra == {"name": "n"}
    assert document.metadata["Ünï"] == [None, True, 0.5]
    assert document.scored_spans.shape == (2, 2)


def test_what_is_known_without_reading_a_shard(
    written: tuple[Path, list[CachedDocument]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, documents = written
    monkeypatch.setattr(ShardReader, "record", pytest.fail)
    monkeypatch.setattr(ShardReader, "stored_shard", pytest.fail)
    cache = open_cache(path)
    assert cache.path == path
    assert cache.doc_ids == [document.doc_id for document in documents]
    assert cache.documents_per_shard.tolist() == [3, 3, 2]
    assert cache.held_out_D.tolist() == [is_held_out(document.doc_id) for document in documents]
    assert cache.rows_D.tolist() == [len(document.segment) for document in documents]
    assert cache.text_bytes_D.tolist() == [len(document.text.encode()) for document in documents]
    assert cache.manifest.k == 8
    assert cache.manifest.teacher["name"] == "tiny"
    assert cache.vocabulary == some_vocabulary(300)
    assert "8 documents" in repr(cache)


def test_ids_are_not_opened_unless_wanted(fresh: tuple[Path, list[CachedDocument]]) -> None:
    path, documents = fresh
    ids = [
        file
        for file in path.rglob("*")
        if file.is_file() and any(part in str(file.relative_to(path)) for part in ("id_", ".ids."))
    ]
    assert len(ids) >= 6
    for file in ids:
        file.unlink()
    (path / "vocabulary.parquet").unlink()
    cache = open_cache(path, ids=False)
    for number, (document, read) in enumerate(zip(documents, cache, strict=True)):
        assert_stored(document, read, ids=False)
        assert_stored(document, open_cache(path, ids=False)[number], ids=False)
    with pytest.raises(MissingObjectError):
        open_cache(path)[0]


def test_no_ids_in_the_cache(tmp_path: Path) -> None:
    documents = some_documents(3, k_ids=0)
    write_cache(tmp_path, documents, some_settings(k_ids=0))
    cache = open_cache(tmp_path)
    assert cache.vocabulary is None
    assert cache[0].token_ids is None
    assert_stored(documents[0], cache[0])


def test_the_last_shards_stay_decoded(
    written: tuple[Path, list[CachedDocument]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    real = LocalObjects.fetch
    monkeypatch.setattr(
        LocalObjects, "fetch", lambda self, stored: (fetched.append(stored.name), real(self, stored))[1]
    )
    monkeypatch.setattr(reader, "DECODED_SHARDS_KEPT", 2)
    cache = open_cache(written[0])
    fetched.clear()

    def shards_read(*numbers: int) -> list[str]:
        fetched.clear()
        for number in numbers:
            cache.streamed(number)
        return sorted({name.split("/")[1].split(".")[0] for name in fetched})

    assert shards_read(0, 1, 2, 0) == ["000000"]
    assert shards_read(3, 0, 5) == ["000001"]
    assert shards_read(6) == ["000002"]
    assert shards_read(4, 7) == []
    assert shards_read(0) == ["000000"]


def read_elsewhere(cache: Cache, queue: "multiprocessing.Queue[str]") -> None:
    queue.put(cache[7].doc_id)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_other_processes(written: tuple[Path, list[CachedDocument]], method: str) -> None:
    """A data loader's workers: forked after the parent has read, or spawned."""
    path, documents = written
    cache = open_cache(path)
    assert cache[0].doc_id == documents[0].doc_id
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=read_elsewhere, args=(cache, queue))
    worker.start()
    assert queue.get(timeout=240) == documents[7].doc_id
    worker.join(timeout=240)
    assert worker.exitcode == 0


def test_threads_and_pickle(written: tuple[Path, list[CachedDocument]]) -> None:
    path, documents = written
    cache = pickle.loads(pickle.dumps(open_cache(path, ids=False)))
    found: list[tuple[int, str]] = []
    threads = [
        threading.Thread(target=lambda n=number: found.append((n, cache[n].doc_id)))
        for number in range(8)
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(found)) == [(number, document.doc_id) for number, document in enumerate(documents)]
    assert len(found) == 24
    assert cache[0].token_ids is None


def test_no_cache_here(tmp_path: Path) -> None:
    with pytest.raises(NotACacheError, match=r"no cache here: expected manifest\.json"):
        open_cache(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(NotACacheError):
            open_cache(path)


def test_unfinished_cache(tmp_path: Path) -> None:
    documents = some_documents(8)
    plan = make_plan(documents, 3)
    writer = CacheWriter(tmp_path, some_settings(), plan)
    writer.write_shard(1, documents[3:6])
    with pytest.raises(IncompleteCacheError, match="2 of 3 shards are missing; run the same `cache-builder build`"):
        open_cache(tmp_path)
    writer.write_shard(0, documents[:3])
    writer.write_shard(2, documents[6:])
    with pytest.raises(IncompleteCacheError, match="0 of 3 shards are missing; run `cache-builder finalize"):
        open_cache(tmp_path)


DAMAGE: dict[str, tuple[Callable[[bytes], bytes | None], type[CorruptCacheError]]] = {
    "deleted": (lambda data: None, MissingObjectError),
    "empty": (lambda data: b"", SizeMismatchError),
    "truncated": (lambda data: data[:-1], SizeMismatchError),
    "extended": (lambda data: data + b"\0", SizeMismatchError),
    "flipped": (lambda data: data[:-1] + bytes([data[-1] ^ 128]), ChecksumMismatchError),
    "zeroed": (lambda data: bytes(len(data)), ChecksumMismatchError),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_objects_raise_before_they_are_decoded(
    fresh: tuple[Path, list[CachedDocument]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = fresh
    damage, error = DAMAGE[name]
    table = table_from_object((path / "shards.parquet").read_bytes(), 7)
    decodes = monkeypatch.setattr(f"storage_specs.{open_cache(path).manifest.store}_store.decode", None)
    assert decodes is None
    for stored in table.objects[0][:-1]:
        good = (path / stored.name).read_bytes()
        bad = damage(good)
        (path / stored.name).unlink()
        if bad is not None:
            (path / stored.name).write_bytes(bad)
        with pytest.raises(error, match=rf"^{stored.name}: expected .*found .*build"):
            open_cache(path).streamed(0)
        (path / stored.name).write_bytes(good)
    for top in ("shards.parquet", "vocabulary.parquet"):
        good = (path / top).read_bytes()
        bad = damage(good)
        (path / top).unlink()
        if bad is not None:
            (path / top).write_bytes(bad)
        with pytest.raises(error, match=f"^{top}: expected .*found"):
            operator.attrgetter("vocabulary")(open_cache(path))
        (path / top).write_bytes(good)


def test_random_access_reads_little_and_returns_nothing_damaged(fresh: tuple[Path, list[CachedDocument]]) -> None:
    """Each byte of the first shard flipped, object by object: one document read alone is right, or an error."""
    path, documents = fresh
    table = table_from_object((path / "shards.parquet").read_bytes(), len(documents))
    seen = {True: 0, False: 0}
    for stored in table.objects[0]:
        good = (path / stored.name).read_bytes()
        for place in range(0, len(good), max(1, len(good) // 40)):
            (path / stored.name).write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            try:
                assert_stored(documents[0], open_cache(path)[0])
                seen[True] += 1
            except (ChecksumMismatchError, MalformedObjectError):
                seen[False] += 1
        (path / stored.name).write_bytes(good)
    assert seen[False] > 10 * seen[True]  # a shard this small is one part of each object, nearly
    for error, damage in ((MissingObjectError, None), (SizeMismatchError, b"")):
        for stored in table.objects[0][1:]:
            good = (path / stored.name).read_bytes()
            (path / stored.name).unlink()
            if damage is not None:
                (path / stored.name).write_bytes(damage)
            if "documents/zarr.json" in stored.name or stored.name.endswith(".json"):
                with pytest.raises(error, match=stored.name):
                    open_cache(path)[0]
            (path / stored.name).write_bytes(good)


def test_one_document_is_read_without_its_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a shard of many chunks only those that hold the document are asked for."""
    monkeypatch.setattr(zarr_store, "ROWS_PER_CHUNK", 16)
    monkeypatch.setattr(arrow_store, "ROWS_PER_GROUP", 16)
    monkeypatch.setattr(shard_bytes, "SMALL", 0)
    documents = some_documents(30, words=20)
    for store in STORES:
        path = tmp_path / store
        write_cache(path, documents, some_settings(store), documents_per_shard=30)
        cache, asked = open_cache(path), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalObjects, "read_range", counting(LocalObjects.read_range, asked))
            patch.setattr(ShardReader, "columns", pytest.fail)
            assert_stored(documents[17], cache[17])
        assert 0 < sum(asked) < 0.5 * sum(stored.size for stored in cache.table.objects[0])


def counting(read_range: Callable[..., bytes], asked: list[int]) -> Callable[..., bytes]:
    """`read_range`, which also notes how many bytes it is asked for."""

    def counted(self: LocalObjects, name: str, offset: int, size: int) -> bytes:
        asked.append(size)
        return read_range(self, name, offset, size)

    return counted


def test_swapped_shards_are_noticed(fresh: tuple[Path, list[CachedDocument]]) -> None:
    path, _ = fresh
    table = table_from_object((path / "shards.parquet").read_bytes(), 7)
    for first, second in zip(table.objects[0], table.objects[1], strict=True):
        if (path / first.name).read_bytes() == (path / second.name).read_bytes():
            continue
        temporary = path / "swap"
        (path / first.name).rename(temporary)
        (path / second.name).rename(path / first.name)
        temporary.rename(path / second.name)
    with pytest.raises((SizeMismatchError, ChecksumMismatchError), match="shards/000000"):
        open_cache(path).streamed(0)
    with pytest.raises((SizeMismatchError, ChecksumMismatchError), match="shards/000000"):
        open_cache(path)[0]


def resealed(path: Path, **changes: object) -> None:
    """Rewrite manifest.json with other fields and a cache_id that fits them."""
    value = json.loads((path / "manifest.json").read_bytes()) | changes
    del value["cache_id"]
    (path / "manifest.json").write_bytes(seal(value, "cache_id"))


@pytest.mark.parametrize("version", [2, 999])
def test_newer_versions_are_refused(fresh: tuple[Path, list[CachedDocument]], version: object) -> None:
    path, _ = fresh
    value = json.loads((path / "manifest.json").read_bytes()) | {"spec_version": version, "new": "field"}
    (path / "manifest.json").write_bytes(canonical_json(value))
    with pytest.raises(SpecVersionError, match=rf"manifest\.json: spec_version is {version!r}, .*reads version 1 only"):
        open_cache(path)


@pytest.mark.parametrize("version", ["1", None, 1.0])
def test_versions_that_are_none_are_refused(fresh: tuple[Path, list[CachedDocument]], version: object) -> None:
    path, _ = fresh
    value = json.loads((path / "manifest.json").read_bytes()) | {"spec_version": version}
    (path / "manifest.json").write_bytes(canonical_json(value))
    with pytest.raises(MalformedObjectError, match=r"manifest\.json: it has no spec_version"):
        open_cache(path)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "shards/../../x", ""])
@pytest.mark.parametrize("key", ["plan", "shards", "vocabulary"])
def test_paths_out_of_the_cache_are_refused(fresh: tuple[Path, list[CachedDocument]], name: str, key: str) -> None:
    path, _ = fresh
    resealed(path, **{key: {"name": name, "size": 1, "crc32c": 1}})
    with pytest.raises(MalformedObjectError, match="refused object name"):
        open_cache(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 0},
        {"k": 301},
        {"k": 8.0},
        {"k_ids": 9},
        {"k_ids": 0},
        {"vocab_size": 2**32 + 1},
        {"store": "hdf5"},
        {"codec": {"profile": "compact"}},
        {"codec": []},
        {"counts": {"rows": 1}},
        {"counts": None},
        {
            "counts": dict.fromkeys(
                ("documents", "rows", "end_rows", "empty_documents", "text_bytes", "unscored_bytes"), -1
            )
        },
        {"vocabulary": None},
        {"shards": None},
        {"more": 1},
    ],
)
def test_manifests_that_make_no_sense_are_refused(fresh: tuple[Path, list[CachedDocument]], changes: dict) -> None:
    path, _ = fresh
    resealed(path, **changes)
    with pytest.raises(MalformedObjectError, match=r"^manifest\.json"):
        open_cache(path)


def test_other_counts_than_the_table_are_refused(fresh: tuple[Path, list[CachedDocument]]) -> None:
    path, _ = fresh
    manifest = open_cache(path).manifest
    for name in ("documents", "rows", "empty_documents", "text_bytes"):
        resealed(path, counts=manifest.counts | {name: manifest.counts[name] + 1})
        with pytest.raises(MalformedObjectError, match=f"{name}, but the manifest counts"):
            open_cache(path)


def test_a_huge_manifest_is_refused_unread(fresh: tuple[Path, list[CachedDocument]]) -> None:
    path, _ = fresh
    resealed(path, teacher={"name": "x" * 1_000_000})
    with pytest.raises(MalformedObjectError, match="above the limit of 1000000"):
        open_cache(path)


def test_a_shard_of_another_cache_that_verifies_is_malformed(tmp_path: Path) -> None:
    """A table that names foreign objects with their right checksums: the documents give it away."""
    settings = some_settings("arrow", k_ids=0)
    write_cache(tmp_path / "one", some_documents(3, k_ids=0), settings)
    write_cache(tmp_path / "two", some_documents(3, k_ids=0, seed=1), settings)
    name = "shards/000000.parquet"
    data = (tmp_path / "two" / name).read_bytes()
    (tmp_path / "one" / name).write_bytes(data)
    cache = open_cache(tmp_path / "one")
    cache.table.__dict__["objects"] = ((StoredObject.of(name, data), cache.table.objects[0][-1]),)
    with pytest.raises(MalformedObjectError, match=r"shards/000000: .*expected"):
        cache.streamed(0)


def test_importing_the_reader_is_cheap() -> None:
    code = (
        "import sys, storage_specs.reader, storage_specs.writer, storage_specs.verification\n"
        "heavy = {'zarr', 'numcodecs', 'pyarrow', 'pandas', 'torch', 'transformers', 'tokenizers'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
