"""Writing: atomic, resumable after anything, refusing what does not belong."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from small_caches import (
    STORES,
    assert_stored,
    begun,
    files_of,
    some_documents,
    some_settings,
    some_vocabulary,
    write_cache,
)

from storage_specs import CacheWriter, open_cache, verify_cache
from storage_specs.document import is_held_out
from storage_specs.errors import (
    CacheMismatchError,
    ChecksumMismatchError,
    ConfigError,
    CorruptCacheError,
    IncompleteCacheError,
    InvalidDocumentError,
    NotACacheError,
    OutputFolderError,
)
from storage_specs.plan import make_plan
from storage_specs.writer import finalize_cache

HERE = Path(__file__).parent


SUFFIXES = (".json", ".parquet", ".ids.parquet", ".id_word_steps.parquet")


@pytest.mark.parametrize("store", STORES)
def test_layout_and_manifest(tmp_path: Path, store: str) -> None:
    documents, settings = some_documents(7), some_settings(store)
    manifest = write_cache(tmp_path / "cache", documents, settings)
    names = set(files_of(tmp_path / "cache"))
    shards = {f"shards/{shard:06d}" for shard in range(3)}
    top = {"plan.json", "vocabulary.parquet", "shards.parquet", "documents.parquet", "manifest.json"}
    assert top | {f"{shard}.json" for shard in shards} <= names
    if store == "arrow":
        assert names == top | {shard + suffix for shard in shards for suffix in SUFFIXES}
    else:
        assert all(f"{shard}.zarr/probs/c/0/0" in names for shard in shards)
    assert manifest.counts == {
        "documents": 7,
        "rows": sum(len(document.segment) for document in documents),
        "end_rows": sum(int(document.is_end.sum()) for document in documents),
        "empty_documents": 1,
        "text_bytes": sum(len(document.text.encode()) for document in documents),
        "unscored_bytes": 1,
    }
    assert manifest.held_out == {
        "rule": "crc32c(doc_id) % 10 == 0",
        "documents": sum(is_held_out(document.doc_id) for document in documents),
    }
    assert (manifest.k, manifest.k_ids, manifest.vocab_size, manifest.store) == (8, 4, 300, store)
    assert manifest.teacher == settings.teacher
    assert manifest.config_digest == settings.config_digest
    assert manifest.corpus == {"digest": make_plan(documents, 3).corpus_digest, "documents": 7}
    assert manifest.rank_edges is None
    assert manifest.codec["profile"] == "half"
    assert 0 < manifest.codec["mean_l1_error"] < manifest.codec["max_l1_error"] < 2e-3
    errors = [
        float(abs(read.probs.astype(float) - written.probs).sum(1).max())
        for read, written in zip(open_cache(tmp_path / "cache"), documents, strict=True)
        if len(read.probs)
    ]
    assert max(errors) <= manifest.codec["max_l1_error"] <= 2 * max(errors) + 1e-6
    on_disk = json.loads((tmp_path / "cache" / "manifest.json").read_bytes())
    assert on_disk == manifest.to_json()
    assert "vocabulary" in on_disk


def test_no_ids_no_vocabulary(tmp_path: Path) -> None:
    manifest = write_cache(tmp_path, some_documents(3, k_ids=0), some_settings(k_ids=0))
    assert manifest.vocabulary is None
    assert not [name for name in files_of(tmp_path) if "token_ids" in name or "vocabulary" in name]


@pytest.mark.parametrize("store", STORES)
def test_the_order_of_shards_and_of_runs_leaves_no_trace(tmp_path: Path, store: str) -> None:
    write_cache(tmp_path / "whole", some_documents(7), some_settings(store))
    documents, settings = some_documents(7), some_settings(store)
    plan = make_plan(documents, 3)
    for shard in (2, 0, 1):
        writer = CacheWriter(tmp_path / "pieces", settings, plan)
        assert shard in writer.missing_shards()
        writer.write_shard(shard, [documents[number] for number in plan.shards[shard]])
    assert CacheWriter(tmp_path / "pieces", settings, plan).finalize() == open_cache(tmp_path / "whole").manifest
    assert files_of(tmp_path / "pieces") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("store", STORES)
def test_resuming_redoes_what_does_not_verify_and_nothing_else(tmp_path: Path, store: str) -> None:
    _, documents, settings, plan = begun(tmp_path / "cache", store, shards=3)
    whole = tmp_path / "whole"
    write_cache(whole, documents, settings)
    names = sorted(name for name in files_of(tmp_path / "cache") if name.startswith("shards/000001"))
    for name in names:
        file = tmp_path / "cache" / name
        good = file.read_bytes()
        for bad in (None, b"", good[:-1], bytes([good[0] ^ 1]) + good[1:], (whole / "plan.json").read_bytes()):
            if bad is None:
                file.unlink()
            else:
                file.write_bytes(bad)
            resumed = CacheWriter(tmp_path / "cache", settings, plan)
            assert resumed.missing_shards() == [1], (name, bad)
        file.write_bytes(good)
    assert CacheWriter(tmp_path / "cache", settings, plan).missing_shards() == []
    file.unlink()
    resumed = CacheWriter(tmp_path / "cache", settings, plan)
    with pytest.raises(IncompleteCacheError, match=r"1 of 3 shards are missing \(the first is 1\)"):
        resumed.finalize()
    resumed.write_shard(1, documents[3:6])
    resumed.finalize()
    assert files_of(tmp_path / "cache") == files_of(whole)


def test_a_record_swapped_with_another_does_not_count(tmp_path: Path) -> None:
    _, _, settings, plan = begun(tmp_path)
    (tmp_path / "shards/000001.json").write_bytes((tmp_path / "shards/000000.json").read_bytes())
    assert CacheWriter(tmp_path, settings, plan).missing_shards() == [1, 2]


def test_a_finished_cache_stays_as_it_is(tmp_path: Path) -> None:
    documents, settings = some_documents(7), some_settings()
    manifest = write_cache(tmp_path, documents, settings)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    writer = CacheWriter(tmp_path, settings, make_plan(documents, 3))
    assert writer.missing_shards() == []
    assert writer.finalize() == finalize_cache(tmp_path) == manifest
    with pytest.raises(ConfigError, match="finished cache is never written to"):
        writer.write_shard(0, documents[:3])
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    (tmp_path / "shards/000000.json").write_bytes(b"")
    with pytest.raises(CorruptCacheError, match=r"shards/000000\.json: expected \d+ bytes, found 0"):
        writer.missing_shards()


def test_nothing_is_claimed_before_the_first_shard(tmp_path: Path) -> None:
    """A build that failed before its first shard does not refuse the next one, of other settings."""
    documents, settings = some_documents(7), some_settings()
    plan = make_plan(documents, 3)
    assert CacheWriter(tmp_path / "cache", settings, plan).missing_shards() == [0, 1, 2]
    assert files_of(tmp_path / "cache") == {}
    late = CacheWriter(tmp_path / "cache", settings, plan)
    other = replace(settings, teacher={"name": "other"})
    CacheWriter(tmp_path / "cache", other, plan).write_shard(2, documents[6:])
    before = files_of(tmp_path / "cache")
    assert {"plan.json", "shards/000002.json", "vocabulary.parquet"} <= before.keys()
    with pytest.raises(CacheMismatchError, match=r"teacher\.name: 'other'"):
        late.write_shard(0, documents[:3])
    assert files_of(tmp_path / "cache") == before


def test_a_shard_that_another_builder_wrote_over_is_read_again(tmp_path: Path) -> None:
    """Two builders of one cache whose teachers do not compute bit for bit: what is named is what lies there."""
    writer, documents, settings, plan = begun(tmp_path, shards=3)
    other = [replace(item, gold_logprob=item.gold_logprob - 1) for item in documents[:3]]
    (tmp_path / "shards/000000.json").unlink()  # as where there are no locks, and both write at once
    CacheWriter(tmp_path, settings, plan).write_shard(0, other)
    manifest = writer.finalize()
    assert verify_cache(tmp_path).ok
    assert_stored(other[0], open_cache(tmp_path)[0])
    assert manifest == open_cache(tmp_path).manifest
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "shards/000002.json").unlink()
    with pytest.raises(IncompleteCacheError, match="1 of 3 shards are missing"):
        writer.finalize()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher": {"name": "other"}}, r"teacher\.name: 'tiny', not 'other'"),
        ({"tokenizer": {"digest": "0"}}, r"tokenizer\.digest: 'cdcd"),
        ({"store": "arrow"}, "store: 'zarr', not 'arrow'"),
        ({"chat_template": None}, "chat_template: {'digest'"),
        ({"vocabulary": replace(some_vocabulary(300), special_roles={})}, "vocabulary_digest: '"),
    ],
)
def test_another_build_is_refused_by_name(tmp_path: Path, change: dict, named: str) -> None:
    _, _, settings, plan = begun(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(CacheMismatchError, match=named):
        CacheWriter(tmp_path, replace(settings, **change), plan)
    assert files_of(tmp_path) == before


def test_another_corpus_or_cut_is_refused(tmp_path: Path) -> None:
    _, documents, settings, _ = begun(tmp_path)
    with pytest.raises(CacheMismatchError, match="corpus: 7 documents, not these 6"):
        CacheWriter(tmp_path, settings, make_plan(documents[:6], 3))
    with pytest.raises(CacheMismatchError, match="documents per shard: 3, not 2"):
        CacheWriter(tmp_path, settings, make_plan(documents, 2))


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    documents, settings = some_documents(3), some_settings()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputFolderError, match=r"holds something else \(thesis\.tex\); nothing was touched"):
        CacheWriter(tmp_path, settings, make_plan(documents, 3))
    with pytest.raises(OutputFolderError, match="is a file, not a folder"):
        CacheWriter(tmp_path / "thesis.tex", settings, make_plan(documents, 3))
    assert files_of(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_damaged_plan_is_not_built_upon(tmp_path: Path) -> None:
    _, _, settings, plan = begun(tmp_path)
    data = bytearray((tmp_path / "plan.json").read_bytes())
    data[data.index(b"tiny")] ^= 1
    (tmp_path / "plan.json").write_bytes(data)
    with pytest.raises(ChecksumMismatchError, match=r"plan\.json: plan_digest is"):
        CacheWriter(tmp_path, settings, plan)


def test_bad_documents_write_nothing(tmp_path: Path) -> None:
    writer, documents, _, _ = begun(tmp_path, shards=2)
    before = files_of(tmp_path)
    last = documents[6]
    for bad, message in (
        ([], "not those that the plan names"),
        ([documents[0]], "not those that the plan names"),
        ([last, last], "not those that the plan names"),
        ([replace(last, probs=last.probs[:, ::-1].copy())], "document 0: probs are not sorted"),
        ([replace(last, metadata={"when": object()})], "not JSON serializable"),
        ([replace(last, metadata={"score": math.nan})], "not JSON compliant"),
    ):
        with pytest.raises(InvalidDocumentError, match=rf"shard 2: .*{message}.*nothing was written"):
            writer.write_shard(2, bad)
    with pytest.raises(ConfigError, match="shard 3 is not in the plan"):
        writer.write_shard(3, [last])
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        {"k": 0},
        {"k": 301},
        {"k_ids": 9},
        {"k_ids": -1},
        {"k_ids": 0},
        {"vocab_size": 2**32 + 1},
        {"store": "hdf5"},
        {"vocabulary": None},
        {"vocabulary": some_vocabulary(299)},
    ],
)
def test_settings_that_cannot_be(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(some_settings(), **change)


def test_settings_that_are_no_json() -> None:
    with pytest.raises(ConfigError, match="must be JSON"):
        some_settings(teacher={"path": Path()}).config_digest  # noqa: B018
    assert (
        some_settings(teacher={"sizes": (1, 2)}).config_digest == some_settings(teacher={"sizes": [1, 2]}).config_digest
    )


def test_finishing_by_hand(tmp_path: Path) -> None:
    with pytest.raises(NotACacheError, match=r"none begun: expected plan\.json"):
        finalize_cache(tmp_path)
    writer, documents, settings, plan = begun(tmp_path / "cache", shards=2)
    with pytest.raises(IncompleteCacheError, match="1 of 3 shards are missing or damaged"):
        finalize_cache(tmp_path / "cache")
    writer.write_shard(2, documents[6:])
    vocabulary = tmp_path / "cache/vocabulary.parquet"
    good = vocabulary.read_bytes()
    for bad in (None, b"", good[:-1], good.replace(b"bos", b"eos")):
        vocabulary.unlink(missing_ok=True)
        if bad is not None:
            vocabulary.write_bytes(bad)
        with pytest.raises(CorruptCacheError, match=r"vocabulary\.parquet"):
            finalize_cache(tmp_path / "cache")
    assert not (tmp_path / "cache/manifest.json").exists()
    CacheWriter(tmp_path / "cache", settings, plan).claim()  # puts it back
    finalize_cache(tmp_path / "cache")
    write_cache(tmp_path / "whole", documents, settings)
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "whole")


def test_another_builder_may_have_finished_first(tmp_path: Path) -> None:
    writer, documents, settings, _ = begun(tmp_path / "cache", shards=3)
    write_cache(tmp_path / "whole", documents, settings)
    theirs = (tmp_path / "whole/manifest.json").read_bytes()
    real_create = writer.objects.create

    def late(name: str, data: bytes) -> bool:
        (tmp_path / "cache" / name).write_bytes(theirs)
        return real_create(name, data)

    writer.objects.create = late
    assert writer.finalize().cache_id == json.loads(theirs)["cache_id"]
    (tmp_path / "cache/manifest.json").unlink()
    theirs = theirs.replace(b"tiny", b"tidy")
    with pytest.raises(CacheMismatchError, match="another builder finished this cache with other bytes"):
        writer.finalize()
    assert (tmp_path / "cache/manifest.json").read_bytes() == theirs
