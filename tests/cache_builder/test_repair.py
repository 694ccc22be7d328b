"""`repair` with a teacher: the damaged shards are scored again, under new names, with the cache's own settings."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_teacher import files_of, make_tiny_teacher, write_corpus

from cache_builder import shard_worker
from cache_builder.build_config import BuildConfig
from cache_builder.builder import build
from cache_builder.main import main
from cache_builder.pipeline import Job, OpenShard
from cache_builder.repair import repair
from distill.checkpoint import read_record, write_record
from distill.main import main as distill
from storage_specs.errors import CacheMismatchError, CheckpointError, ConfigError, CorpusError, CorruptCacheError
from storage_specs.reader import open_cache
from storage_specs.verification import verify_cache

TEXTS = ["Bern is a city. " * 5, "one", "two two", "three", "Bern lies on the Aare. " * 4, "four"]


@pytest.fixture(params=["zarr", "arrow"])
def config(request: pytest.FixtureRequest, teacher: Path, tmp_path: Path) -> BuildConfig:
    """A finished cache of unusual settings, which a repair must find out by itself."""
    config = BuildConfig(
        teacher=str(teacher),
        corpus=str(write_corpus(tmp_path / "corpus.jsonl", TEXTS)),
        output=tmp_path / "cache",
        engine="transformers",
        documents_per_shard=2,
        max_model_len=24,
        window_overlap=6,
        k=16,
        k_ids=3,
        store=request.param,
    )
    build(config)
    return config


def flags_of(config: BuildConfig) -> dict[str, Any]:
    return {"teacher": config.teacher, "corpus": config.corpus}


def damage(cache: Path, shard: int) -> None:
    """Flip a bit in the middle of the largest object of a shard."""
    files = [file for file in cache.glob(f"shards/{shard:06d}*/**/*") if file.is_file()]
    victim = max(files or cache.glob(f"shards/{shard:06d}.*parquet"), key=lambda file: file.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Shards that went to the engine."""
    shards: list[int] = []
    real = shard_worker.windows_of_shard

    def noted(job: Job, **options: Any) -> OpenShard:
        shards.append(job[0])
        return real(job, **options)

    monkeypatch.setattr(shard_worker, "windows_of_shard", noted)
    return shards


def test_exactly_the_damaged_shards_are_scored_again(config: BuildConfig, scored: list[int]) -> None:
    cache = Path(config.output)
    first, whole = open_cache(cache).manifest, list(open_cache(cache))
    damage(cache, 0)
    damage(cache, 2)
    (cache / "shards/000001.json").unlink()
    report = repair(cache, flags_of(config))
    assert (report.restored, report.shards_scored, scored) == (("shards/000001.json",), 2, [0, 2])
    assert report.manifest == open_cache(cache).manifest
    assert report.manifest is not None
    assert report.manifest.replaces == [first.cache_id]
    assert verify_cache(cache).ok
    for read, expected in zip(open_cache(cache), whole, strict=True):
        assert read.text == expected.text
        assert read.probs.tobytes() == expected.probs.tobytes()
    again = repair(cache, flags_of(config))
    assert (again.shards_scored, again.restored, again.manifest) == (0, (), report.manifest)
    assert scored == [0, 2]


def test_an_interrupted_repair_goes_on_where_it_was(
    config: BuildConfig, scored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(config.output)
    damage(cache, 0)
    damage(cache, 2)
    noted = shard_worker.windows_of_shard

    def once(job: Job, **options: Any) -> OpenShard:
        if scored:
            raise KeyboardInterrupt
        return noted(job, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shard_worker, "windows_of_shard", once)
        with pytest.raises(KeyboardInterrupt):
            repair(cache, flags_of(config))
    before = files_of(cache)
    assert "shards/000000.r1.json" in before
    assert "manifest.r0.json" not in before
    report = repair(cache, flags_of(config))
    assert scored == [0, 2]
    assert report.manifest is not None
    assert report.manifest.revision == 1
    assert verify_cache(cache).ok


def test_a_damaged_manifest_and_shard_together(config: BuildConfig, scored: list[int]) -> None:
    cache = Path(config.output)
    before = files_of(cache)
    damage(cache, 1)
    (cache / "manifest.json").write_bytes(b"")
    report = repair(cache, flags_of(config))
    assert (scored, report.shards_scored) == ([1], 1)
    assert files_of(cache) == before  # on this machine the teacher says the same again


def test_a_lost_vocabulary_is_put_back_without_scoring(config: BuildConfig, scored: list[int]) -> None:
    cache = Path(config.output)
    before = files_of(cache)
    (cache / "vocabulary.parquet").write_bytes(b"PAR1")
    assert repair(cache, {}).vocabulary_lost
    report = repair(cache, flags_of(config))
    assert (report.shards_scored, scored) == (0, [])
    assert files_of(cache) == before
    (cache / "vocabulary.parquet").unlink()
    (cache / "manifest.json").write_bytes(b"")
    repair(cache, flags_of(config))
    assert files_of(cache) == before


def test_a_lost_plan_is_made_again_by_the_flags_of_the_build(config: BuildConfig, scored: list[int]) -> None:
    cache = Path(config.output)
    damage(cache, 0)
    (cache / "shards/000000.json").unlink()
    (cache / "plan.json").write_bytes(b"{}")
    flags = {
        name: getattr(config, name)
        for name in ("k", "k_ids", "store", "engine", "max_model_len", "window_overlap", "documents_per_shard")
    }
    report = repair(cache, flags_of(config) | flags)
    assert (report.shards_scored, report.restored) == (1, ("plan.json",))
    assert verify_cache(cache).ok


def test_another_teacher_or_corpus_is_refused(config: BuildConfig, tmp_path: Path, smollm2_path: Path) -> None:
    cache = Path(config.output)
    damage(cache, 1)
    before = files_of(cache)
    other = make_tiny_teacher(tmp_path / "tiny", smollm2_path, seed=1)
    with pytest.raises(CacheMismatchError, match=r"teacher\.weights_digest"):
        repair(cache, flags_of(config) | {"teacher": str(other)})
    with pytest.raises(CacheMismatchError, match="k: 16, not 8"):
        repair(cache, flags_of(config) | {"k": 8})
    shorter = write_corpus(tmp_path / "shorter.jsonl", TEXTS[:3])
    with pytest.raises(CorpusError, match="lacks 1 of the 2 documents of the damaged shards"):
        repair(cache, flags_of(config) | {"corpus": str(shorter)})
    assert files_of(cache) == before
    shuffled = write_corpus(tmp_path / "shuffled.jsonl", ["more", *reversed(TEXTS)])
    assert repair(cache, flags_of(config) | {"corpus": str(shuffled)}).shards_scored == 1


def test_the_command(config: BuildConfig, capsys: pytest.CaptureFixture[str]) -> None:
    cache = str(config.output)
    assert main(["repair", cache]) == 0
    assert "nothing to repair" in capsys.readouterr().out
    damage(Path(cache), 1)
    assert main(["verify", cache]) == 2
    assert f"`cache-builder repair {cache}`" in capsys.readouterr().err
    assert main(["repair", cache]) == 2
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    doc_ids = open_cache(cache).doc_ids[2:4]
    assert [line.split(", ")[:2] for line in lines] == [["lost: shard 1", doc_id] for doc_id in doc_ids]
    if config.store == "zarr":
        assert [line.split(", ", 2)[2] for line in lines] == ["'two two'", "'three'"]
    assert "error: " in captured.err
    assert "2 documents of 1 shards" in captured.err
    with pytest.raises(ConfigError, match="needs --teacher and --corpus both"):
        main(["repair", cache, "--teacher", config.teacher])
    assert main(["repair", cache, "--teacher", config.teacher, "--corpus", config.corpus]) == 0
    assert "1 shards scored again; replaces" in capsys.readouterr().out
    assert main(["verify", cache]) == 0


def test_a_repaired_cache_is_merged_and_extended_like_any_other(config: BuildConfig, tmp_path: Path) -> None:
    before = files_of(Path(config.output))
    damage(Path(config.output), 1)
    repair(config.output, flags_of(config))
    more = dataclasses.replace(
        config,
        corpus=str(write_corpus(tmp_path / "more.jsonl", [*TEXTS, "five"])),
        output=tmp_path / "more",
        extend=str(config.output),
    )
    manifest = build(more).manifest
    assert manifest is not None
    assert (manifest.replaces, manifest.counts["documents"]) == ([], 7)
    assert verify_cache(tmp_path / "more").ok
    after = files_of(tmp_path / "more")
    assert {name: after[name] for name in before if name.startswith("shards/") and not name.endswith(".json")} == {
        name: data for name, data in before.items() if name.startswith("shards/") and not name.endswith(".json")
    }


def test_a_students_run_goes_on_with_the_repaired_cache(config: BuildConfig, tmp_path: Path) -> None:
    """Only when told so, and then to the very weights of a run on a cache that was never damaged."""
    cache, straight, resumed = Path(config.output), tmp_path / "straight", tmp_path / "resumed"

    def train(output: Path, *more: str) -> int:
        flags = ["train", "--model_name_or_path", config.teacher, "--cache", str(cache), "--output_dir", str(output)]
        flags += ["--max_length", "24", "--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "2"]
        return distill([*flags, "--learning_rate", "1e-2", "--loss", "ce:1,uld:1,mapped:1", "--use_cpu", *more])

    assert train(straight) == 0
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    write_record(resumed, {"run": read_record(straight)["run"], "finished": False})
    damage(cache, 0)
    with pytest.raises(CorruptCacheError):
        train(tmp_path / "new")
    repair(cache, flags_of(config))
    with pytest.raises(CheckpointError, match="--accept_repaired"):
        train(resumed)
    assert train(resumed, "--accept_repaired") == 0
    weights = [load_file(folder / "model.safetensors") for folder in (straight, resumed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(
        torch.equal(load_file(Path(config.teacher) / "model.safetensors")[n], w) for n, w in weights[0].items()
    )
