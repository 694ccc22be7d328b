"""A real `cache-builder build` straight into S3: killed, resumed under faults, and the same bytes as in a folder."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from object_stores import S3, objects_of
from tiny_teacher import write_corpus

from cache_builder.main import main
from storage_specs import open_cache
from storage_specs.command_line import run

SHARDS = 12
RECORD = r"shards/\d+\.json"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, teacher: Path, wiki_texts: list[str]) -> list[str]:
    folder = tmp_path_factory.mktemp("remote")
    corpus = write_corpus(folder / "corpus.jsonl", [text[:200] for text in wiki_texts[: 2 * SHARDS]])
    more = ["--documents_per_shard", "2", "--max_model_len", "64", "--store", "arrow", "--engine", "transformers"]
    return ["build", "--teacher", str(teacher), "--corpus", str(corpus), *more]


def kill(flags: list[str], place: str, s3: S3, records: int, delay: float) -> None:
    """SIGKILL a build `delay` seconds after it has written that many commit records.

    It never writes more than two beyond them, so that it is still at work, however late we look.
    """
    others = set(s3.proxy.connections)
    s3.proxy.fail("hang", method="PUT", path=RECORD, times=SHARDS, skip=records + 2)
    s3.proxy.delay_seconds = 0.05
    command = [sys.executable, "-m", "cache_builder", *flags, "--output", place]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while s3.proxy.count("PUT", RECORD) < records and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    s3.proxy.delay_seconds = 0.0
    s3.proxy.heal()
    s3.proxy.settle(others)


def test_killed_builds_resume_to_the_bytes_of_a_folder(
    s3: S3, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, chance = f"{s3.url}/caches/wiki", random.Random(3)
    assert main([*flags, "--output", str(tmp_path / "cache")]) == 0
    for records in (2, 3):
        s3.proxy.requests.clear()
        kill(flags, place, s3, records, chance.uniform(0, 0.05))
    before = {name for name in objects_of(place) if name.startswith("shards/") and name.endswith(".json")}
    assert 3 <= len(before) < SHARDS
    for fault in (500, 503, "lose", "refuse"):
        s3.proxy.fail(fault, path="/shards/", method="PUT")
    for fault in (503, "reset", "truncate", "garble", "lose"):
        s3.proxy.fail(fault, path=r"/shards/.*parquet", method="GET")
    for name in ("plan", "manifest"):
        s3.proxy.fail("lose", path=f"{name}.json", method="PUT")
    s3.proxy.requests.clear()
    capsys.readouterr()
    assert main([*flags, "--output", place]) == 0
    told = capsys.readouterr()
    assert f"{place}: wrote {SHARDS - len(before)} shards" in told.out
    assert not [fault for fault in s3.proxy.faults if fault.times]
    s3.proxy.heal()
    assert objects_of(place) == objects_of(str(tmp_path / "cache"))
    assert main(["verify", place]) == 0
    assert main(["verify", "--fast", place]) == 0
    assert main(["inspect", place]) == 0
    assert main(["finalize", place]) == 0
    assert "already complete" in _out(main, [*flags, "--output", place], capsys)
    assert "0 of" in _out(main, ["push", str(tmp_path / "cache"), place], capsys)
    assert "wrote" in _out(main, ["push", place, str(tmp_path / "pulled")], capsys)
    assert objects_of(str(tmp_path / "pulled")) == objects_of(place)
    assert [document.doc_id for document in open_cache(place)] == open_cache(tmp_path / "cache").doc_ids


def test_refusals_are_one_line_at_the_command_line(
    s3: S3, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "s3://no-such-bucket-at-all/x": "there is no such bucket",
        "https://host/x": "https:// is none of s3://, gs://, az://, hf://",
        "s3://": "expected s3://BUCKET/PREFIX",
    }
    for place, words in cases.items():
        for command in ([*flags, "--output", place], ["verify", place]):
            with pytest.raises(SystemExit) as ended:
                run(main, command)
            told = capsys.readouterr().err.splitlines()
            assert ended.value.code == 2
            assert told[-1].startswith("error: ")
            assert words in told[-1]
            assert "Traceback" not in "".join(told)


def _out(main, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 0
    return capsys.readouterr().out
