"""Diagnosis and repair without a teacher: every derived object comes back bit for bit, and what is lost is named."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from small_caches import STORES, files_of, some_documents, some_settings, write_cache

from storage_specs import open_cache, verify_cache
from storage_specs.diagnosis import diagnose
from storage_specs.document import CachedDocument
from storage_specs.errors import CorruptCacheError, IncompleteCacheError, MalformedObjectError, NotACacheError
from storage_specs.object_roots import open_objects
from storage_specs.plan import make_plan, plan_to_bytes
from storage_specs.repairing import commit_revision, lost_documents, restore
from storage_specs.settings import CacheSettings
from storage_specs.writer import encoded_shard

DERIVED = ("plan.json", "shards.parquet", "documents.parquet", "manifest.json", "shards/000001.json")


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cache(tmp_path: Path, store: str) -> Path:
    write_cache(tmp_path / "cache", some_documents(7), some_settings(store))
    return tmp_path / "cache"


def damages(file: Path) -> Iterator[bytes | None]:
    """Ways in which a file may be wrong; None is no file."""
    good = file.read_bytes()
    yield None
    yield b""
    yield good[:-1]
    yield bytes([*good[:20], good[20] ^ 1, *good[21:]])


def damage(file: Path, data: bytes | None = None) -> None:
    file.unlink()
    if data is not None:
        file.write_bytes(data)


@pytest.mark.parametrize("name", DERIVED)
def test_what_is_derived_comes_back_as_it_was(cache: Path, name: str) -> None:
    before = files_of(cache)
    for bad in damages(cache / name):
        damage(cache / name, bad)
        if name == "manifest.json" and bad is None:
            with pytest.raises(IncompleteCacheError, match="cache-builder finalize"):
                diagnose(cache)
            (cache / name).write_bytes(before[name])
            continue
        diagnosis = diagnose(cache)
        assert not diagnosis.is_sound
        assert not diagnosis.needs_teacher
        manifest = restore(diagnosis)
        assert files_of(cache) == before
        assert manifest == open_cache(cache).manifest
        assert diagnose(cache).is_sound


def test_all_records_and_the_plan_come_back_together(cache: Path) -> None:
    before = files_of(cache)
    for name in ("plan.json", "documents.parquet", *(f"shards/00000{shard}.json" for shard in range(3))):
        damage(cache / name)
    diagnosis = diagnose(cache)
    assert len(diagnosis.restorable) == 5
    restore(diagnosis)
    assert files_of(cache) == before


def data_objects(cache: Path, shard: int) -> list[Path]:
    files = [file for file in cache.glob(f"shards/{shard:06d}*/**/*") if file.is_file()]
    return files or sorted(cache.glob(f"shards/{shard:06d}*.parquet"))


def test_damaged_data_are_lost_and_nothing_else(cache: Path) -> None:
    before = files_of(cache)
    for file in data_objects(cache, 1):
        name, good = file.relative_to(cache).as_posix(), file.read_bytes()
        for bad in damages(file):
            damage(file, bad)
            diagnosis = diagnose(cache)
            assert diagnosis.lost_shards == [1], name
            assert restore(diagnosis) is None
            file.write_bytes(good)
    assert files_of(cache) == before
    assert diagnose(cache).is_sound


def test_lost_documents_are_named_with_their_words_where_the_text_verifies(cache: Path, store: str) -> None:
    documents = some_documents(7)[3:6]
    victim = cache / ("shards/000001.zarr/is_end/c/0" if store == "zarr" else "shards/000001.parquet")
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    found = lost_documents(diagnose(cache), 1)
    assert [doc_id for doc_id, _ in found] == [document.doc_id for document in documents]
    if store == "zarr":  # in a Parquet file the flipped byte may be one of the text
        assert [text for _, text in found] == [document.text for document in documents]
    for (_, text), document in zip(found, documents, strict=True):
        assert text in (None, document.text)
    damage(cache / "shards/000001.json")
    assert [text for _, text in lost_documents(diagnose(cache), 1)] == [None] * 3


def revise(cache: Path, documents: list[CachedDocument], settings: CacheSettings) -> str:
    """What the builder does with a teacher; returns the new cache_id."""
    diagnosis = diagnose(cache)
    records, plan = list(diagnosis.records), make_plan(documents, 3)
    for shard in diagnosis.lost_shards:
        members = [documents[number] for number in plan.shards[shard]]
        record, contents = encoded_shard(shard, members, settings, plan.doc_ids_of(shard), diagnosis.replaces)
        diagnosis.objects.write_all(contents | {record.name: record.to_bytes()})
        records[shard] = record
    return commit_revision(diagnosis, records).cache_id


def test_a_new_revision_replaces_the_old_one_and_edits_nothing(cache: Path, store: str) -> None:
    documents, settings = some_documents(7), some_settings(store)
    first = open_cache(cache).manifest
    whole = [document for document in open_cache(cache)]
    damage(data_objects(cache, 1)[-1])
    before = files_of(cache)
    second_id = revise(cache, documents, settings)
    after = files_of(cache)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    assert after["manifest.r0.json"] == before["manifest.json"]
    new = after.keys() - before.keys() - {"manifest.r0.json"}
    assert {name.split("/")[1].partition(".")[0] for name in new if "/" in name} == {"000001"}
    assert all(".r1." in name for name in new)
    manifest = open_cache(cache).manifest
    assert manifest.cache_id == second_id != first.cache_id
    assert (manifest.replaces, manifest.revision) == ([first.cache_id], 1)
    assert manifest.counts == first.counts
    assert verify_cache(cache).ok
    for read, expected in zip(open_cache(cache), whole, strict=True):
        assert read.doc_id == expected.doc_id
        assert read.probs.tobytes() == expected.probs.tobytes()
    assert open_cache(cache)[4].text == documents[4].text

    damage(data_objects(cache, 0)[0])
    third = revise(cache, documents, settings)
    assert open_cache(cache).manifest.replaces == [first.cache_id, second_id]
    assert [open_cache(cache).table.revision_of(shard) for shard in range(3)] == [2, 1, 0]
    assert verify_cache(cache).ok
    for name in ("manifest.json", "shards.r2.parquet", "documents.r2.parquet", "plan.json", "shards/000001.r1.json"):
        good = files_of(cache)
        damage(cache / name, b"{}")
        assert restore(diagnose(cache)).cache_id == third, name
        assert files_of(cache) == good, name


def test_what_other_libraries_encode_otherwise_becomes_a_new_revision(
    cache: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table whose rebuilt bytes are not the old ones gets a name of its own; rows and documents are the same."""
    import storage_specs.parquet

    first = open_cache(cache).manifest
    damage(cache / "shards.parquet")
    real = storage_specs.parquet.table_to_bytes
    monkeypatch.setattr(
        "storage_specs.shard_table.table_to_bytes", lambda table, **options: real(table, rows_per_group=2)
    )
    diagnosis = diagnose(cache)
    assert diagnosis.renewed
    manifest = restore(diagnosis)
    assert manifest is not None
    assert manifest.replaces == [first.cache_id]
    assert manifest.shards.name == "shards.r1.parquet"
    assert verify_cache(cache).ok


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_plan_that_only_the_build_can_make_again(cache: Path, store: str, with_manifest: bool) -> None:
    """A damaged shard's documents are nowhere else listed: the plan must be given, and is not believed blindly."""
    documents, settings = some_documents(7), some_settings(store)
    damage(cache / "shards/000001.json")
    damage(data_objects(cache, 1)[0])
    good = (cache / "plan.json").read_bytes()
    damage(cache / "plan.json", b"{}")
    if not with_manifest:
        damage(cache / "manifest.json", b"{}")
    other = plan_to_bytes(make_plan(documents, 3), replace(settings, teacher={"name": "other"}).config)
    for supposed in (None, other):
        with pytest.raises(MalformedObjectError, match=r"plan\.json is damaged, and too much else.*all other flags"):
            diagnose(cache, supposed_plan=supposed)
    diagnosis = diagnose(cache, supposed_plan=good)
    assert diagnosis.restorable == {"plan.json": good}
    assert diagnosis.lost_shards == [1]


def test_a_lost_vocabulary_needs_the_teacher(cache: Path) -> None:
    damage(cache / "vocabulary.parquet", b"PAR1")
    diagnosis = diagnose(cache)
    assert (diagnosis.vocabulary_lost, diagnosis.lost_shards) == (True, [])
    assert restore(diagnosis) is None


def test_a_shard_that_lies_is_lost(cache: Path, store: str) -> None:
    """Checksums that fit, content that does not: another text under the same id."""
    documents, settings = some_documents(7), some_settings(store)
    other = replace(documents[3], text=documents[3].text.replace("e", "E"))
    assert other.doc_id != documents[3].doc_id
    plan = make_plan(documents, 3)
    record, contents = encoded_shard(1, [other, *documents[4:6]], settings, (other.doc_id, *plan.doc_ids_of(1)[1:]))
    lying = replace(record, doc_ids=plan.doc_ids_of(1))
    objects = open_objects(cache)
    objects.write_all(contents | {lying.name: lying.to_bytes()})
    objects.delete("manifest.json")
    write_cache(cache, documents, settings)
    assert not verify_cache(cache).ok
    assert diagnose(cache).lost_shards == [1]


def test_no_cache_and_no_finished_cache(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(NotACacheError):
        diagnose(tmp_path / "nothing")
    (cache / "manifest.json").unlink()
    (cache / "shards/000000.json").unlink()
    with pytest.raises(IncompleteCacheError, match=r"1 of 3 shards are missing; run the same `cache-builder build`"):
        diagnose(cache)


def test_errors_name_the_command_that_repairs(cache: Path) -> None:
    damage(data_objects(cache, 0)[0], b"bad")
    with pytest.raises(CorruptCacheError, match=rf"expected \d+ bytes, found 3; .*`cache-builder repair {cache}`"):
        open_cache(cache).shard(0)
    report = verify_cache(cache)
    assert f"`cache-builder repair {cache}`" in str(report)
