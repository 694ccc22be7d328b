"""`build --extend`: old shards taken over, new documents scored: the cache that `merge` would make of them."""

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_teacher import files_of, write_corpus

from cache_builder import shard_worker
from cache_builder.build_config import BuildConfig
from cache_builder.builder import build
from cache_builder.engines.transformers import TransformersEngine
from storage_specs.errors import CacheMismatchError, CorpusError
from storage_specs.merging import merge_caches
from storage_specs.reader import open_cache
from storage_specs.verification import verify_cache

OLD = ["Bern is a city.", "one", "two two"]
NEW = ["three", "Bern lies on the Aare. " * 4, "four"]


@pytest.fixture
def old(teacher: Path, tmp_path: Path) -> BuildConfig:
    config = BuildConfig(
        teacher=str(teacher),
        corpus=str(write_corpus(tmp_path / "old.jsonl", OLD)),
        output=tmp_path / "old",
        engine="transformers",
        documents_per_shard=2,
        max_model_len=24,
    )
    build(config)
    return config


def test_an_extended_cache_is_the_merged_one_and_scores_only_what_is_new(
    old: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    real = shard_worker.windows_of_shard
    monkeypatch.setattr(
        shard_worker, "windows_of_shard", lambda job, **options: scored.append(job[0]) or real(job, **options)
    )
    both = dataclasses.replace(
        old,
        corpus=str(write_corpus(tmp_path / "both.jsonl", [NEW[0], *OLD, *NEW[1:]])),
        output=tmp_path / "extended",
        extend=str(old.output),
    )
    report = build(both)
    assert (report.shards_written, scored) == (2, [2, 3])
    only_new = dataclasses.replace(old, corpus=str(write_corpus(tmp_path / "new.jsonl", NEW)), output=tmp_path / "new")
    build(only_new)
    assert merge_caches([old.output, only_new.output], tmp_path / "merged") == report.manifest
    assert files_of(tmp_path / "extended") == files_of(tmp_path / "merged")
    assert [document.text for document in open_cache(tmp_path / "extended")] == OLD + NEW
    assert verify_cache(tmp_path / "extended").ok
    again = build(both)
    assert (again.shards_written, again.manifest) == (0, report.manifest)


def test_an_interrupted_extension_resumes(old: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(
        old, corpus=str(write_corpus(tmp_path / "new.jsonl", NEW)), output=tmp_path / "new", extend=str(old.output)
    )
    build(dataclasses.replace(config, output=tmp_path / "whole"))

    def interrupted(self: TransformersEngine, windows: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(config)
    assert (tmp_path / "new/shards/000001.json").is_file()
    build(config)
    assert files_of(tmp_path / "new") == files_of(tmp_path / "whole")


def test_chats_join_a_cache_of_texts(old: BuildConfig, tmp_path: Path, teacher: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    config = dataclasses.replace(
        old, corpus=str(tmp_path / "chats.jsonl"), output=tmp_path / "new", extend=str(old.output)
    )
    manifest = build(config).manifest
    assert manifest is not None
    assert manifest.chat_template is not None
    assert manifest.counts["documents"] == 4
    texts = dataclasses.replace(
        old,
        corpus=str(write_corpus(tmp_path / "new.jsonl", NEW)),
        output=tmp_path / "newer",
        extend=str(tmp_path / "new"),
    )
    newest = build(texts).manifest
    assert newest is not None
    assert newest.chat_template == manifest.chat_template
    assert verify_cache(tmp_path / "newer").ok


def test_what_cannot_be_extended(old: BuildConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(old, output=tmp_path / "new", extend=str(old.output))
    with pytest.raises(CorpusError, match="nothing to add"):
        build(config)
    with pytest.raises(CacheMismatchError, match="k: 64, not 8; k_ids: 16, not 8"):
        build(dataclasses.replace(config, k=8, corpus=str(write_corpus(tmp_path / "new.jsonl", NEW))))
    assert not (tmp_path / "new").exists()
