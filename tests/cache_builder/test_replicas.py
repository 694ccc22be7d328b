"""Several processes build one cache: replicas, shard ranges, workers that die, and errors of children."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from building import ROOT, children, digests, late_replicas, records, slow_disk, start_build, wait_until
from safetensors.torch import load_file, save_file
from tiny_teacher import write_corpus

from cache_builder.build_config import BuildConfig
from cache_builder.builder import build
from cache_builder.main import main
from cache_builder.pipeline import Job
from cache_builder.progress import Progress, Work
from cache_builder.replicas import _devices, _replica
from storage_specs.errors import ConfigError, EngineError
from storage_specs.verification import verify_cache

SHARDS = 12
SYNC_SECONDS = 0.01  # of a slow disk: a third of a second per shard

# argv: three ranges, and a build's command without its range. A process each, at once, in which all is imported.
JOB_ARRAY = """
import os, sys
import zarr, transformers.models.llama.modeling_llama, cache_builder.engines.transformers
from cache_builder.main import main
from storage_specs.command_line import run
processes = []
for part in sys.argv[1:4]:
    processes.append(os.fork())
    if not processes[-1]:
        run(main, [*sys.argv[4:], "--shard-range", part])
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, wiki_texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    write_corpus(folder / "corpus.jsonl", [*(text[:400] for text in wiki_texts[: 2 * SHARDS - 1]), ""])
    return folder


@pytest.fixture(scope="module")
def flags(folder: Path, teacher: Path) -> list[str]:
    values = {"teacher": teacher, "corpus": folder / "corpus.jsonl", "engine": "transformers"}
    return [f"--{name}={value}" for name, value in {**values, "documents_per_shard": 2, "max_model_len": 64}.items()]


@pytest.fixture(scope="module")
def alone(folder: Path, flags: list[str]) -> dict[str, str]:
    """The digests of a build in one process."""
    assert main(["build", *flags, "--output", str(folder / "alone")]) == 0
    return digests(folder / "alone")


def replicas_of(process: int) -> list[int]:
    return [child for child, command in children(process).items() if "spawn_main" in command]


def test_a_replica_that_is_killed_loses_only_what_it_had_open(
    flags: list[str],
    alone: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "cache"
    slow = slow_disk(tmp_path / "slow", SYNC_SECONDS, output, most=5)
    for name, value in slow.environment.items():
        monkeypatch.setenv(name, value)

    def kill_one() -> int:
        wait_until(lambda: len(records(output)) >= 3)
        try:
            first, _ = replicas_of(os.getpid())
            os.kill(first, signal.SIGKILL)
        finally:
            slow.open()
        return first

    with ThreadPoolExecutor(1) as threads:
        killed = threads.submit(kill_one)
        assert main(["build", *flags, "--data-parallel-size", "2", "--output", str(output)]) == 0
        assert killed.result() not in replicas_of(os.getpid())
    assert "worker 0 is lost, others go on: replica 0 died with exit code -9" in capfd.readouterr().err
    assert digests(output) == alone


def test_ctrl_c_ends_replicas_too_and_two_of_them_resume_to_the_same_bytes(
    flags: list[str], alone: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output, two = tmp_path / "cache", [*flags, "--data-parallel-size", "2"]
    slow = slow_disk(tmp_path / "slow", SYNC_SECONDS, output, most=3)
    process = start_build(two, output, slow.environment)
    wait_until(lambda: len(records(output)) >= 2, process)
    inside = replicas_of(process.pid)
    for one in (process.pid, *inside):  # a terminal sends it to all of them
        os.kill(one, signal.SIGINT)
    slow.open()
    _, err = process.communicate(timeout=400)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert len(inside) == 2
    assert not any(Path(f"/proc/{child}").exists() for child in inside)
    kept = records(output)
    assert 2 <= len(kept) < SHARDS
    left = SHARDS - len(kept)
    assert main(["build", *two, "--output", str(output)]) == 0
    told = capfd.readouterr()
    assert f"wrote {left} shards" in told.out
    assert [line.partition(":")[0] for line in told.err.splitlines()] == [
        f"shard {shard + 1} of {SHARDS}" for shard in range(len(kept), SHARDS)
    ]
    assert digests(output) == alone


def test_ctrl_c_before_replicas_have_started(flags: list[str], tmp_path: Path) -> None:
    """They still import what they need, and must not answer with a traceback each."""
    late = late_replicas(tmp_path / "late")
    process = start_build([*flags, "--data-parallel-size", "2"], tmp_path / "cache", late.environment)
    wait_until(lambda: len(replicas_of(process.pid)) == 2, process)
    inside = replicas_of(process.pid)
    for one in (process.pid, *inside):
        os.kill(one, signal.SIGINT)
    late.open()
    _, err = process.communicate(timeout=400)
    assert process.returncode == 130, err
    assert err.splitlines() == ["interrupted: what was finished is kept; run the same command again to resume"]
    assert not any(Path(f"/proc/{child}").exists() for child in inside)


@pytest.fixture
def interrupt_handler() -> Iterator[None]:
    """For what sets its own: put back afterwards."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interrupt_handler")
def test_a_replica_is_interrupted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Again while it leaves, as by its parent, who has lost patience, or at its end: no traceback of that.

    It ends its engine, whose own processes would else outlive it.
    """
    reached: list[str] = []

    def interrupted(place: str) -> None:
        reached.append(place)
        signal.raise_signal(signal.SIGINT)
        reached.append(f"{place} goes on")

    engine = SimpleNamespace(close=lambda: reached.append("engine"))
    worker = SimpleNamespace(run=lambda *_: interrupted("run"), close=lambda: interrupted("close"), engine=engine)
    monkeypatch.setattr("cache_builder.replicas.ShardWorker", lambda recipe: worker)
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        ours.send((0, []))
        _replica(theirs, None)
        interrupted("end")
    assert reached == ["run", "engine", "close", "close goes on", "end", "end goes on"]


@pytest.mark.usefixtures("interrupt_handler")
@pytest.mark.parametrize("asks", [True, False])
def test_a_replica_whose_parent_left_its_news_unread_ends_quietly(monkeypatch: pytest.MonkeyPatch, asks: bool) -> None:
    """The system then calls the pipe reset where it is read, and broken where it is written to."""
    ours, theirs = multiprocessing.Pipe()
    errors: list[type[OSError]] = []

    def run(jobs: Iterator[Job], done: Callable[[int, Work], None], progress: Progress) -> None:
        assert next(jobs) == (0, [])
        ours.close()
        try:
            next(jobs) if asks else done(0, Work())
        except OSError as error:
            errors.append(type(error))
            raise

    worker = SimpleNamespace(run=run, close=lambda: None, engine=SimpleNamespace(close=lambda: None))
    monkeypatch.setattr("cache_builder.replicas.ShardWorker", lambda recipe: worker)
    with theirs:
        ours.send((0, []))
        _replica(theirs, None)
    assert errors == [ConnectionResetError if asks else BrokenPipeError]


def test_an_error_in_every_replica_is_one_typed_error(
    teacher: Path, flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(teacher, tmp_path / "tiny")
    weights = load_file(tmp_path / "tiny" / "model.safetensors")
    weights["model.norm.weight"] *= float("nan")
    save_file(weights, tmp_path / "tiny" / "model.safetensors", {"format": "pt"})
    broken = ["build", *flags, f"--teacher={tmp_path / 'tiny'}", "--data-parallel-size=2"]
    with pytest.raises(EngineError, match="the teacher returned log-probabilities that are not finite"):
        main([*broken, f"--output={tmp_path / 'cache'}"])
    assert "Traceback" not in capfd.readouterr().err


def test_ranges_are_built_apart_and_the_last_writes_the_manifest(
    folder: Path, teacher: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    def build_range(first: int, end: int | None) -> tuple[int, int, bool]:
        report = build(
            BuildConfig(
                teacher=str(teacher),
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


def test_ranges_say_what_is_missing_and_are_checked(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", *flags, "--output", str(tmp_path / "cache")]
    assert main([*command, "--shard-range", "11:"]) == 0
    assert "wrote 1 shards" in capsys.readouterr().out
    assert main([*command, "--shard-range", "11:"]) == 0
    said = capsys.readouterr().out
    assert "no shard of this range is missing, nothing to do\n11 shards of other ranges are missing" in said
    for wrong in ("5", "5:5", "-1:3", "a:b"):
        with pytest.raises(ConfigError, match=r"shard_range.*A:B"):
            main([*command, f"--shard-range={wrong}"])


def test_a_job_array_on_one_folder(flags: list[str], alone: dict[str, str], tmp_path: Path) -> None:
    """Three processes at once, two of them with overlapping ranges."""
    output = tmp_path / "cache"
    command = [sys.executable, "-c", JOB_ARRAY, "0:5", "3:8", "8:12", "build", *flags, "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
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
