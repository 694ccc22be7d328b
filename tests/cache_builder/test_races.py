"""Two builders of one place: one wins, the other says so, and nothing of the winner's is touched."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from tiny_teacher import files_of, write_corpus

from cache_builder.build_config import BuildConfig
from cache_builder.builder import build
from cache_builder.engines.transformers import TransformersEngine
from storage_specs.errors import CacheInUseError, CacheMismatchError, EngineError
from storage_specs.garbage import collect_garbage
from storage_specs.verification import verify_cache


@pytest.fixture
def config(teacher: Path, tmp_path: Path) -> BuildConfig:
    return BuildConfig(
        teacher=str(teacher),
        corpus=str(write_corpus(tmp_path / "corpus.jsonl", ["one two", "three", "four five", "six"])),
        output=tmp_path / "cache",
        engine="transformers",
        documents_per_shard=2,
        k=8,
    )


def test_the_second_builder_is_refused_while_the_first_one_builds(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring, refused = Event(), Event()
    real = TransformersEngine._score

    def slow(self: TransformersEngine, window: Any) -> Any:
        scoring.set()
        assert refused.wait(300)
        return real(self, window)

    monkeypatch.setattr(TransformersEngine, "_score", slow)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(build, config)
        try:
            assert scoring.wait(300)
            for other in (config, dataclasses.replace(config, k=4)):  # the place is not claimed yet
                with pytest.raises(CacheInUseError, match="another process of this machine is writing this cache"):
                    build(other)
            with pytest.raises(CacheInUseError):
                collect_garbage(config.output, grace=0)
        finally:
            refused.set()
        assert first.result().manifest is not None
    assert verify_cache(config.output).ok
    before = files_of(Path(config.output))
    assert build(config).shards_written == 0
    with pytest.raises(CacheMismatchError, match="k: 8, not 4"):
        build(dataclasses.replace(config, k=4))
    assert files_of(Path(config.output)) == before


def test_a_teacher_that_cannot_be_loaded_leaves_the_place_free(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """plan.json stands only once a shard does: another dtype is not refused for one that ran out of memory."""

    def fail(self: TransformersEngine, window: Any) -> Any:
        raise EngineError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "_score", fail)
        with pytest.raises(EngineError, match="out of memory"):
            build(config)
    assert files_of(Path(config.output)) == {}
    assert build(dataclasses.replace(config, k=4)).shards_written == 2
