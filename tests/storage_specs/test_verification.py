"""verify_cache: nothing damaged passes, and everything damaged is listed."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_caches import STORES, files_of, some_documents, some_settings, write_cache

from storage_specs import CacheSettings, open_cache, row_coding, verify_cache
from storage_specs.column_building import columns_of
from storage_specs.columns import RowShape
from storage_specs.document import CachedDocument
from storage_specs.errors import IncompleteCacheError, NotACacheError, SpecVersionError, TeachOnceError
from storage_specs.finalization import commit
from storage_specs.local_objects import LocalObjects
from storage_specs.plan import make_plan
from storage_specs.sealed_json import seal
from storage_specs.shard_names import stem_of
from storage_specs.shard_record import described, read_record
from storage_specs.stored_shard import StoredShard
from storage_specs.stores import shard_store

FLIPS_PER_STORE = 300


@pytest.fixture(params=STORES)
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Three documents in two shards, small so that flips meet every kind of byte."""
    write_cache(
        tmp_path,
        some_documents(3, words=4, vocab_size=40),
        some_settings(request.param, vocab_size=40),
        documents_per_shard=2,
    )
    return tmp_path


def detected(path: Path, *, fast: bool = False) -> list[str]:
    """What verify says is wrong; a version that it cannot read counts."""
    try:
        return list(verify_cache(path, fast=fast).problems)
    except SpecVersionError as error:
        return [str(error)]


def test_a_good_cache(cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_cache(cache, progress=lambda done, all_shards: seen.append((done, all_shards)))
    files = files_of(cache)
    assert report.ok
    assert report.problems == ()
    assert report.objects == len(files)
    assert report.bytes == sum(map(len, files.values()))
    assert report.documents == 3
    assert report.rows == open_cache(cache).manifest.counts["rows"]
    assert seen == [(1, 2), (2, 2)]
    assert str(report).endswith(
        f"good: {report.objects} objects, {report.bytes} bytes, 3 documents, {report.rows} rows (every byte)"
    )
    fast = verify_cache(cache, fast=True)
    assert (fast.ok, fast.objects, fast.bytes) == (True, report.objects, report.bytes)


def flips(path: Path) -> Iterator[tuple[Path, int, int]]:
    """(file, byte, bit): random places in every object, more in longer ones, the first and last byte always."""
    generator = random.Random(0)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    total = sum(file.stat().st_size for file in files)
    for file in files:
        size = file.stat().st_size
        count = max(1, round(FLIPS_PER_STORE * size / total))
        for place in {0, size - 1, *(generator.randrange(size) for _ in range(count))}:
            yield file, place, generator.randrange(8)


def test_every_single_bit_flip_is_detected(cache: Path) -> None:
    missed, tried = [], 0
    for file, place, bit in flips(cache):
        good = file.read_bytes()
        bad = bytearray(good)
        bad[place] ^= 1 << bit
        file.write_bytes(bad)
        found = detected(cache)
        tried += 1
        if not any(file.relative_to(cache).as_posix() in problem for problem in found):
            missed.append((file.name, place, bit, found))
        file.write_bytes(good)
    assert tried >= FLIPS_PER_STORE
    assert missed == []
    assert verify_cache(cache).ok


def test_deleted_truncated_and_swapped_objects_are_detected_even_fast(cache: Path) -> None:
    files = sorted(file for file in cache.rglob("*") if file.is_file() and file.name != "manifest.json")
    for file, other in zip(files, files[1:] + files[:1], strict=True):
        good, name = file.read_bytes(), file.relative_to(cache).as_posix()
        for bad in (None, b"", good[: len(good) // 2], other.read_bytes()):
            if bad is None:
                file.unlink()
            elif bad == good:
                continue
            else:
                file.write_bytes(bad)
            assert any(name in problem for problem in detected(cache)), (name, bad)
            if bad is None or len(bad) != len(good):
                assert any(name in problem for problem in detected(cache, fast=True)), (name, bad)
        file.write_bytes(good)


def test_all_damage_is_listed(cache: Path) -> None:
    damaged = [file for file in sorted((cache / "shards").rglob("*")) if file.is_file()][::3]
    for file in damaged:
        file.write_bytes(file.read_bytes()[:-1] + b"\xff\xff")
    report = verify_cache(cache)
    assert not report.ok
    assert len(report.problems) == len(damaged)
    assert str(report).startswith(f"{cache}: {len(damaged)} problems in")
    for file in damaged:
        assert file.relative_to(cache).as_posix() in str(report)


def test_what_is_no_finished_cache(tmp_path: Path) -> None:
    with pytest.raises(NotACacheError):
        verify_cache(tmp_path)
    write_cache(tmp_path, some_documents(3), some_settings())
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(IncompleteCacheError, match="0 of 1 shards are missing"):
        verify_cache(tmp_path)


SHAPE = RowShape(k=8, k_ids=4, vocab_size=40, profile="half")


def lying_cache(path: Path, store: str, change: dict) -> None:
    """A cache whose checksums all fit, with a record that says something else than its shard."""
    documents, settings = some_documents(3, words=4, vocab_size=40), some_settings(store, vocab_size=40)
    write_cache(path, documents, settings)
    objects = LocalObjects(path)
    record = replace(read_record(objects, 0), **change)
    objects.write_all({record.name: record.to_bytes()})
    objects.delete("manifest.json")
    commit(objects, settings.config, make_plan(documents, 3), [record])


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"end_rows": 1}, "its record counts other end rows"),
        ({"unscored_bytes": 0}, "its record counts other end rows or unscored bytes"),
        ({"config_digest": "0" * 64}, "its record belongs to other settings"),
    ],
)
def test_records_that_lie_are_detected(tmp_path: Path, store: str, change: dict, problem: str) -> None:
    lying_cache(tmp_path, store, change)
    assert any(problem in line for line in verify_cache(tmp_path).problems)


@pytest.mark.parametrize(
    ("field", "change", "problem"),
    [
        ("counts", {"end_rows": 0}, "its counts are not those of the shards"),
        ("counts", {"unscored_bytes": 0}, "its counts are not those of the shards"),
        ("codec", {"max_l1_error": 0.0}, "its L1 errors are not those of the shards"),
        ("corpus", {"digest": "0" * 64}, "its corpus is not the plan's"),
        ("held_out", {"documents": 3}, "held-out documents are miscounted"),
    ],
)
def test_manifests_that_lie_are_detected(cache: Path, field: str, change: dict, problem: str) -> None:
    value = json.loads((cache / "manifest.json").read_bytes())
    value[field] |= change
    del value["cache_id"]
    (cache / "manifest.json").write_bytes(seal(value, "cache_id"))
    assert any(problem in line for line in verify_cache(cache).problems)


def forge(path: Path, settings: CacheSettings, documents: list[CachedDocument], shard: StoredShard) -> None:
    """Put another shard in the place of the first, and make every checksum fit."""
    wanted = row_coding.arrays_of(SHAPE, shard.size.rows)
    contents = shard_store(settings.store).encode(shard, wanted, stem_of(0))
    objects = LocalObjects(path)
    objects.write_all({name: item.data for name, item in contents.items()})
    stored, parts = described(contents)
    record = replace(read_record(objects, 0), objects=stored, parts=parts)
    objects.write_all({record.name: record.to_bytes()})
    objects.delete("manifest.json")
    commit(objects, settings.config, make_plan(documents, 3), [record])


@pytest.mark.parametrize("store", STORES)
def test_content_under_another_id_is_detected(tmp_path: Path, store: str) -> None:
    """A shard rewritten with another text of the same length, and every checksum made to fit."""
    documents, settings = some_documents(3, vocab_size=40), some_settings(store, vocab_size=40)
    shard, _ = row_coding.encode(columns_of(documents, SHAPE), SHAPE)
    other = documents[2].text.replace("e", "E")
    assert other != documents[2].text
    write_cache(tmp_path, documents, settings)
    forge(tmp_path, settings, documents, replace(shard, documents=(*documents[:2], replace(documents[2], text=other))))
    assert open_cache(tmp_path)[2].text == other  # readers trust checksums; verify looks at the content
    assert any("another doc_id" in line for line in verify_cache(tmp_path).problems)


@pytest.mark.parametrize("store", STORES)
def test_shards_that_break_the_rules_are_detected(tmp_path: Path, store: str) -> None:
    documents, settings = some_documents(3, words=4, vocab_size=40), some_settings(store, vocab_size=40)
    shard, _ = row_coding.encode(columns_of(documents, SHAPE), SHAPE)
    write_cache(tmp_path, documents, settings)
    flipped = shard.arrays | {"prob_drops": shard.arrays["prob_drops"] + np.uint16(0x3C00)}
    forge(tmp_path, settings, documents, replace(shard, arrays=flipped))
    for read in (lambda cache: cache[0], lambda cache: cache.streamed(0)):
        with pytest.raises(TeachOnceError, match="shards/000000: ValueError: a probability is above 1"):
            read(open_cache(tmp_path))
    assert any("above 1" in line for line in verify_cache(tmp_path).problems)
