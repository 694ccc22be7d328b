"""merge and convert: the same documents and rows in other places, byte for byte."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from small_caches import STORES, assert_stored, files_of, some_documents, some_settings, write_cache

from storage_specs import open_cache, verify_cache
from storage_specs.conversion import convert_cache
from storage_specs.document import CachedDocument
from storage_specs.errors import CacheMismatchError, ConfigError, OutputFolderError, SizeMismatchError
from storage_specs.local_objects import LocalObjects
from storage_specs.merging import merge_caches


def parts(count: int) -> list[list[CachedDocument]]:
    """Documents of several corpora."""
    return [some_documents(4 + number, seed=number) for number in range(count)]


@pytest.mark.parametrize("store", STORES)
def test_merged_caches_are_what_one_build_would_have_written(tmp_path: Path, store: str) -> None:
    """Shards of 4, 2, 4 documents are those of one build in which the documents came in that order."""
    first, second = some_documents(4), some_documents(6, seed=1)
    settings = some_settings(store)
    write_cache(tmp_path / "first", first, settings, documents_per_shard=2)
    write_cache(tmp_path / "second", second, settings, documents_per_shard=2)
    seen: list[tuple[int, int]] = []
    manifest = merge_caches(
        [tmp_path / "first", tmp_path / "second"], tmp_path / "merged", progress=lambda *step: seen.append(step)
    )
    write_cache(tmp_path / "whole", [*first, *second], settings, documents_per_shard=2)
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "whole")
    assert manifest == open_cache(tmp_path / "whole").manifest
    assert seen == [(done, 5) for done in range(1, 6)]
    assert verify_cache(tmp_path / "merged").ok


def test_shards_of_any_size_and_number(tmp_path: Path) -> None:
    corpora = parts(3)
    for number, documents in enumerate(corpora):
        write_cache(tmp_path / str(number), documents, some_settings(), documents_per_shard=number + 1)
    merge_caches([tmp_path / "2", tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    merged = open_cache(tmp_path / "merged")
    assert merged.documents_per_shard.tolist() == [3, 3, 1, 1, 1, 1, 2, 2, 1]
    for read, written in zip(merged, corpora[2] + corpora[0] + corpora[1], strict=True):
        assert_stored(written, read)
    assert verify_cache(tmp_path / "merged").ok


def test_shards_are_hard_links_and_outlive_their_source(tmp_path: Path) -> None:
    for number, documents in enumerate(parts(2)):
        write_cache(tmp_path / str(number), documents, some_settings("arrow"))
    merge_caches([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    source, target = tmp_path / "1/shards/000000.parquet", tmp_path / "merged/shards/000002.parquet"
    assert source.stat().st_ino == target.stat().st_ino
    LocalObjects(tmp_path / "1").write_all({"shards/000000.parquet": b"written anew"})
    assert verify_cache(tmp_path / "merged").ok


def test_between_file_systems_shards_are_copied_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, documents in enumerate(parts(2)):
        write_cache(tmp_path / str(number), documents, some_settings("arrow"))

    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    real_link = os.link
    monkeypatch.setattr(
        os, "link", lambda source, target: (refuse if ".writing" not in str(source) else real_link)(source, target)
    )
    merge_caches([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    assert (tmp_path / "merged/shards/000000.parquet").stat().st_nlink == 1
    assert verify_cache(tmp_path / "merged").ok
    victim = tmp_path / "1/shards/000000.parquet"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(SizeMismatchError, match="cache-builder repair"):
        merge_caches([tmp_path / "0", tmp_path / "1"], tmp_path / "other")


def test_an_interrupted_merge_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, documents in enumerate(parts(2)):
        write_cache(tmp_path / str(number), documents, some_settings("arrow"))
    sources = [tmp_path / "0", tmp_path / "1"]
    merge_caches(sources, tmp_path / "whole")
    steps = iter(range(100))

    def failing(source: Path, target: Path, real=os.link) -> None:
        if next(steps) == 5:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", failing)
        with pytest.raises(KeyboardInterrupt):
            merge_caches(sources, tmp_path / "merged")
    assert not (tmp_path / "merged/manifest.json").exists()
    merge_caches(sources, tmp_path / "merged")
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher": {"name": "other"}}, r"teacher\.name: 'tiny', not 'other'"),
        ({"tokenizer": {"digest": "0"}}, r"tokenizer\.digest"),
        ({"chat_template": {"digest": "0"}}, r"chat_template\.digest"),
        ({"engine": {"name": "random", "version": "2"}}, r"engine\.version: '1', not '2'"),
        ({"k": 9}, "k: 8, not 9"),
        ({"store": "arrow"}, "store: 'zarr', not 'arrow'"),
        ({"windows": {"max_model_len": 256, "overlap": 64}}, r"windows\.max_model_len: 512, not 256"),
    ],
)
def test_what_does_not_go_together_is_named(tmp_path: Path, change: dict, named: str) -> None:
    shape = {"k": change.get("k", 8)}
    write_cache(tmp_path / "a", some_documents(3), some_settings())
    write_cache(tmp_path / "b", some_documents(3, seed=1, **shape), replace(some_settings(), **change))
    with pytest.raises(CacheMismatchError, match=named):
        merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_corpus_without_chats_goes_with_any_template(tmp_path: Path) -> None:
    texts = [document for document in some_documents(9, seed=5) if document.kind != "chat"]
    settings = some_settings()
    write_cache(tmp_path / "texts", texts, replace(settings, chat_template=None))
    write_cache(tmp_path / "chats", some_documents(3), settings)
    for order in (["texts", "chats"], ["chats", "texts"]):
        manifest = merge_caches([tmp_path / name for name in order], tmp_path / "-".join(order))
        assert manifest.chat_template == settings.chat_template
        assert verify_cache(tmp_path / "-".join(order)).ok


def test_duplicates_are_refused_or_kept(tmp_path: Path) -> None:
    write_cache(tmp_path / "a", some_documents(5), some_settings())
    write_cache(tmp_path / "b", [*some_documents(3, seed=1), *some_documents(5)[3:]], some_settings())
    with pytest.raises(CacheMismatchError, match=r"b holds 2 documents that .*a holds, too .*--keep_duplicates"):
        merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    manifest = merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "merged", keep_duplicates=True)
    assert manifest.counts["documents"] == 10
    assert verify_cache(tmp_path / "merged").ok


def test_one_cache_is_no_merge_and_a_used_folder_no_output(tmp_path: Path) -> None:
    for number, documents in enumerate(parts(2)):
        write_cache(tmp_path / str(number), documents, some_settings())
    with pytest.raises(ConfigError, match="two caches or more"):
        merge_caches([tmp_path / "0"], tmp_path / "merged")
    with pytest.raises(CacheMismatchError, match="holds a cache of another build"):
        merge_caches([tmp_path / "0", tmp_path / "1"], tmp_path / "0")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/thesis.tex").touch()
    with pytest.raises(OutputFolderError, match="holds something else"):
        merge_caches([tmp_path / "0", tmp_path / "1"], tmp_path / "used")


@pytest.mark.parametrize("k_ids", [0, 4])
@pytest.mark.parametrize("store", STORES)
def test_converting_there_and_back_gives_the_same_cache(tmp_path: Path, store: str, k_ids: int) -> None:
    documents, settings = some_documents(7, k_ids=k_ids), some_settings(store, k_ids=k_ids)
    manifest = write_cache(tmp_path / "cache", documents, settings)
    other = next(name for name in STORES if name != store)
    converted = convert_cache(tmp_path / "cache", tmp_path / "converted", other)
    assert converted.store == other
    assert converted.cache_id != manifest.cache_id
    assert verify_cache(tmp_path / "converted").ok
    for first, second in zip(open_cache(tmp_path / "cache"), open_cache(tmp_path / "converted"), strict=True):
        assert first.messages == second.messages
        assert (first.text, first.metadata) == (second.text, second.metadata)
        for name, expected in vars(first).items():
            if hasattr(expected, "dtype"):
                assert expected.tobytes() == getattr(second, name).tobytes(), name
    assert convert_cache(tmp_path / "converted", tmp_path / "back", store) == manifest
    assert files_of(tmp_path / "back") == files_of(tmp_path / "cache")
    write_cache(tmp_path / "direct", documents, replace(settings, store=other))
    assert files_of(tmp_path / "direct") == files_of(tmp_path / "converted")


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", some_documents(3), some_settings())
    with pytest.raises(ConfigError, match="of the zarr store already"):
        convert_cache(tmp_path / "cache", tmp_path / "other", "zarr")
    with pytest.raises(ConfigError, match="must be zarr or arrow"):
        convert_cache(tmp_path / "cache", tmp_path / "other", "hdf5")
