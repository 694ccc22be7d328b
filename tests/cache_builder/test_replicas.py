"""Several processes build one cache: replicas, shard ranges, workers that die, and errors of children."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from building import children, digests, records, run_build, start_build, wait_until
from safetensors.torch import load_file, save_file
from tiny_teacher import make_tiny_teacher, write_corpus

from cache_builder.build_config import BuildConfig
from cache_builder.builder import build
from cache_builder.replicas import _devices
from storage_specs.errors import ConfigError
from storage_specs.verification import verify_cache

SHARDS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path, wiki_texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    make_tiny_teacher(folder / "tiny", smollm2_path)
    write_corpus(folder / "corpus.jsonl", [*(text[:400] for text in wiki_texts[: 2 * SHARDS - 1]), ""])
    return folder


@pytest.fixture(scope="module")
def flags(folder: Path) -> list[str]:
    values = {"teacher": folder / "tiny", "corpus": folder / "corpus.jsonl", "engine": "transformers"}
    return [f"--{name}={value}" for name, value in {**values, "documents_per_shard": 2, "max_model_len": 64}.items()]


@pytest.fixture(scope="module")
def alone(folder: Path, flags: list[str]) -> dict[str, str]:
    """The digests of a build in one process."""
    run_build(flags, folder / "alone")
    return digests(folder / "alone")


def test_two_replicas_write_the_same_bytes(flags: list[str], alone: dict[str, str], tmp_path: Path) -> None:
    out, err = run_build([*flags, "--data-parallel-size", "2"], tmp_path / "cache")
    assert f"wrote {SHARDS} shards" in out
    assert [line.partition(":")[0] for line in err.splitlines()] == [
        f"shard {shard + 1} of {SHARDS}" for shard in range(SHARDS)
    ]
    assert digests(tmp_path / "cache") == alone


def test_a_replica_that_is_killed_loses_only_what_it_had_open(
    flags: list[str], alone: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "cache"
    process = start_build([*flags, "--data-parallel-size", "2"], output)
    wait_until(lambda: len(records(output)) >= 3, process)
    replicas = [child for child, command in children(process.pid).items() if "spawn_main" in command]
    assert len(replicas) == 2
    os.kill(replicas[0], signal.SIGKILL)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert "worker 0 is lost, others go on: replica 0 died with exit code -9" in err
    assert digests(output) == alone


def test_ctrl_c_ends_replicas_too_and_the_same_command_resumes(
    flags: list[str], alone: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "cache"
    process = start_build([*flags, "--data-parallel-size", "2"], output)
    wait_until(lambda: len(records(output)) >= 2, process)
    inside = [child for child, command in children(process.pid).items() if "spawn_main" in command]
    for one in (process.pid, *inside):  # a terminal sends it to all of them
        os.kill(one, signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{child}").exists() for child in inside)
    kept = records(output)
    assert 2 <= len(kept) < SHARDS
    out, _ = run_build([*flags, "--data-parallel-size", "2"], output)
    assert f"wrote {SHARDS - len(kept)} shards" in out
    assert digests(output) == alone


def test_an_error_in_every_replica_is_one_typed_line(folder: Path, flags: list[str], tmp_path: Path) -> None:
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    weights = load_file(tmp_path / "tiny" / "model.safetensors")
    weights["model.norm.weight"] *= float("nan")
    save_file(weights, tmp_path / "tiny" / "model.safetensors", {"format": "pt"})
    broken = [*flags, f"--teacher={tmp_path / 'tiny'}", "--data-parallel-size=2"]
    _, err = run_build(broken, tmp_path / "cache", code=2)
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: the teacher returned log-probabilities that are not finite")


def test_ranges_are_built_apart_and_the_last_writes_the_manifest(
    folder: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    def build_range(first: int, end: int | None) -> tuple[int, int, bool]:
        report = build(
            BuildConfig(
                teacher=str(folder / "tiny"),
                corpus=str(folder / "corpus.jsonl"),
                output=tmp_path / "cache",
                engine="transformers",
                documents_per_shard=2,
                max_model_len=64,
                shard_range=(first, end),
            )
        )
        return report.shards_written, report.shards_missing, report.manifest is not None

    assert build_range(10, None) == (2, 10, False)
    assert records(tmp_path / "cache") == ["000010.json", "000011.json"]
    assert build_range(8, 11) == (2, 8, False)
    assert build_range(0, 8) == (8, 0, True)
    assert build_range(40, 50) == (0, 0, True)
    assert digests(tmp_path / "cache") == alone


def test_ranges_say_what_is_missing_and_are_checked(flags: list[str], tmp_path: Path) -> None:
    out, _ = run_build([*flags, "--shard-range", "11:"], tmp_path / "cache")
    assert "11 shards of other ranges are missing" in out
    for wrong in ("5", "5:5", "-1:3", "a:b"):
        _, err = run_build([*flags, f"--shard-range={wrong}"], tmp_path / "cache", code=2)
        assert "shard_range" in err


def test_a_job_array_on_one_folder(flags: list[str], alone: dict[str, str], tmp_path: Path) -> None:
    """Three processes at once, two of them with overlapping ranges."""
    output = tmp_path / "cache"
    processes = [start_build([*flags, "--shard-range", part], output) for part in ("0:5", "3:8", "8:12")]
    outs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outs
    assert verify_cache(output).ok
    assert digests(output) == alone


@pytest.mark.parametrize(
    ("visible", "size", "gpus", "expected"),
    [
        (None, 2, 2, ["0,1", "2,3"]),
        ("4,5,6,7", 4, 1, ["4", "5", "6", "7"]),
        ("GPU-a, GPU-b", 2, 1, ["GPU-a", "GPU-b"]),
        ("", 2, 1, ["0", "1"]),
    ],
)
def test_every_replica_sees_its_own_gpus(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, size: int, gpus: int, expected: list[str]
) -> None:
    monkeypatch.setattr("cache_builder.engines.gpu_count", lambda: 4 if not visible else visible.count(",") + 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _devices(size, gpus) == expected
    with pytest.raises(ConfigError, match="GPUs are visible"):
        _devices(size, 3)
    monkeypatch.setattr("cache_builder.engines.gpu_count", lambda: 0)
    assert _devices(3, 3) == [None] * 3
