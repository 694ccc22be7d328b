"""A real `cache-builder build` is killed at random moments; the same command makes the same folder, byte for byte."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_teacher import make_tiny_teacher, write_corpus

SHARDS = 24
ROOT = Path(__file__).parents[2]


def digests(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def finished_shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every commit record: a shard that is written again gets others."""
    found = {}
    for file in folder.glob("shards/*.json"):
        status = file.stat()
        found[file.name] = (status.st_ino, status.st_mtime_ns)
    return found


class Build:
    """The same command, as often as it takes."""

    def __init__(self, teacher: Path, corpus: Path) -> None:
        self.words = ["--teacher", teacher, "--corpus", corpus, "--documents_per_shard", "2", "--max_model_len", "64"]

    def start(self, output: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cache_builder", "build", *self.words, "--output", output]
        return subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )

    def run(self, output: Path) -> str:
        process = self.start(output)
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
        return out


def environment() -> dict[str, str]:
    """One thread: the trials are many starts of a small model."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path, wiki_texts: list[str]) -> Build:
    folder = tmp_path_factory.mktemp("interruption")
    corpus = write_corpus(folder / "corpus.jsonl", [text[:300] for text in wiki_texts[: 2 * SHARDS]])
    return Build(make_tiny_teacher(folder / "tiny", smollm2_path), corpus)


@pytest.fixture(scope="module")
def uninterrupted(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "cache"
    build.run(output)
    return output


def interrupt(build: Build, output: Path, signal_number: int, shards: int, delay: float) -> tuple[int, str]:
    """Start the build; `delay` seconds after it has finished `shards` shards, send it the signal."""
    process = build.start(output)
    try:
        deadline = time.monotonic() + 300
        while len(finished_shards(output)) < shards and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal_number)
        _, err = process.communicate(timeout=200)
    finally:
        process.kill()
    return process.returncode, err


@pytest.mark.parametrize(("signal_number", "times"), [(signal.SIGKILL, 2), (signal.SIGINT, 1)])
def test_the_same_command_resumes_to_the_same_bytes(
    build: Build, uninterrupted: Path, tmp_path: Path, signal_number: int, times: int
) -> None:
    """Interruptions at random moments, then the command once more."""
    chance = random.Random(signal_number)
    kept: dict[str, tuple[int, int]] = {}
    for _ in range(times):
        shards = len(kept) + chance.randrange(1, SHARDS // 3)
        code, err = interrupt(build, tmp_path / "cache", signal_number, shards, chance.uniform(0, 0.05))
        if signal_number == signal.SIGINT:
            assert code == 130, err
            # Not always the last line: asyncio may still name a task of Zarr's that the signal cut off.
            assert any(line.startswith("interrupted: what was finished is kept") for line in err.splitlines()), err
        else:
            assert code == -signal.SIGKILL
        now = finished_shards(tmp_path / "cache")
        assert len(kept) < len(now) < SHARDS
        assert kept.items() <= now.items()
        kept = now
    build.run(tmp_path / "cache")
    now = finished_shards(tmp_path / "cache")
    assert len(now) == SHARDS
    assert kept.items() <= now.items()
    assert digests(tmp_path / "cache") == digests(uninterrupted)


def test_the_command_after_the_end_says_so_and_changes_nothing(build: Build, uninterrupted: Path) -> None:
    before = digests(uninterrupted)
    assert "already complete" in build.run(uninterrupted)
    assert digests(uninterrupted) == before
