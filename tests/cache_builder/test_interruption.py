"""A real `cache-builder build` is killed at random moments; the same command makes the same folder, byte for byte."""

import random
import signal
import time
from pathlib import Path

import pytest
from building import Gate, digests, records, slow_disk, start_build, wait_until
from tiny_teacher import write_corpus

from cache_builder.main import main

SHARDS = 24


def finished_shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every commit record: a shard that is written again gets others."""
    status = {name: (folder / "shards" / name).stat() for name in records(folder)}
    return {name: (found.st_ino, found.st_mtime_ns) for name, found in status.items()}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, teacher: Path, wiki_texts: list[str]) -> list[str]:
    folder = tmp_path_factory.mktemp("interruption")
    corpus = write_corpus(folder / "corpus.jsonl", [text[:300] for text in wiki_texts[: 2 * SHARDS]])
    values = {"teacher": teacher, "corpus": corpus, "documents_per_shard": 2, "max_model_len": 64}
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def uninterrupted(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "cache"
    assert main(["build", *flags, "--output", str(output)]) == 0
    return output


def interrupt(
    flags: list[str], output: Path, slow: Gate, signal_number: int, shards: int, delay: float
) -> tuple[int, str]:
    """Start the build; `delay` seconds after it has finished `shards` shards, send it the signal."""
    process = start_build(flags, output, slow.environment)
    try:
        wait_until(lambda: len(records(output)) >= shards, process)
        time.sleep(delay)
        process.send_signal(signal_number)
        slow.open()  # an interrupted build writes what it has scored
        _, err = process.communicate(timeout=200)
    finally:
        process.kill()
    return process.returncode, err


@pytest.mark.parametrize(("signal_number", "times"), [(signal.SIGKILL, 2), (signal.SIGINT, 1)])
def test_the_same_command_resumes_to_the_same_bytes(
    flags: list[str],
    uninterrupted: Path,
    tmp_path: Path,
    signal_number: int,
    times: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Interruptions at random moments, then the command once more; and again, which changes nothing."""
    chance, output = random.Random(signal_number), tmp_path / "cache"
    kept: dict[str, tuple[int, int]] = {}
    for number in range(times):
        shards = len(kept) + chance.randrange(1, SHARDS // 3)
        slow = slow_disk(tmp_path / f"slow-{number}", 0.005, output, most=shards + 2)
        code, err = interrupt(flags, output, slow, signal_number, shards, chance.uniform(0, 0.05))
        if signal_number == signal.SIGINT:
            assert code == 130, err
            # Not always the last line: asyncio may still name a task of Zarr's that the signal cut off.
            assert any(line.startswith("interrupted: what was finished is kept") for line in err.splitlines()), err
        else:
            assert code == -signal.SIGKILL
        now = finished_shards(output)
        assert len(kept) < len(now) < SHARDS
        assert kept.items() <= now.items()
        kept = now
    for answer in (f"wrote {SHARDS - len(kept)} shards", "already complete"):
        assert main(["build", *flags, "--output", str(output)]) == 0
        assert answer in capsys.readouterr().out
        now = finished_shards(output)
        assert len(now) == SHARDS
        assert kept.items() <= now.items()
        assert digests(output) == digests(uninterrupted)
