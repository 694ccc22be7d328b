"""Full disks and kills: nothing finished is lost, and the resumed cache is byte for byte the uninterrupted one."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_caches import STORES, begun, files_of, some_documents, some_settings, write_cache

from storage_specs import verify_cache
from storage_specs.errors import StorageFullError
from storage_specs.local_objects import WRITING_FOLDER

HERE = Path(__file__).parent


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_keeps_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    writer, documents, settings, _ = begun(tmp_path / "cache", shards=2)
    before = files_of(tmp_path / "cache")
    calls = iter(range(100))

    def full(descriptor: int, real: Callable[[int], None] = os.fsync) -> None:
        if 8 < next(calls) < 20:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFullError, match="finished shards are kept"):
            writer.write_shard(2, documents[6:])
    assert files_of(tmp_path / "cache") == before
    write_cache(tmp_path / "cache", documents, settings)
    write_cache(tmp_path / "whole", documents, settings)
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "whole")


def test_a_real_file_size_limit(tmp_path: Path) -> None:
    """The operating system itself refuses the bytes of the last shard, in a process of its own."""
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from small_caches import some_documents, some_settings, write_cache\n"
        "from storage_specs.errors import StorageFullError\n"
        "documents = some_documents(3) + some_documents(3, seed=1, words=400)\n"
        "if len(sys.argv) > 2:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "try:\n"
        "    write_cache(Path(sys.argv[1]), documents, some_settings('arrow'))\n"
        "except StorageFullError as error:\n"
        "    print(error)\n"
    )

    def build(folder: str, *limit: str) -> str:
        command = [sys.executable, "-c", script, str(tmp_path / folder), *limit]
        return subprocess.run(
            command, cwd=HERE, env=child_environment(), capture_output=True, text=True, check=True
        ).stdout

    told = build("cache", "20000")
    assert "shards/000001.parquet: no space left to write it (File too large)" in told
    kept = files_of(tmp_path / "cache")
    assert sorted(kept) == [
        "plan.json",
        "shards/000000.id_word_steps.parquet",
        "shards/000000.ids.parquet",
        "shards/000000.json",
        "shards/000000.parquet",
        "vocabulary.parquet",
    ]
    assert build("cache") == build("whole") == ""
    whole = files_of(tmp_path / "whole")
    assert files_of(tmp_path / "cache") == whole
    assert max(map(len, whole.values())) > 20_000


@pytest.mark.parametrize("store", STORES)
def test_sigkill_anywhere_then_resume(tmp_path: Path, store: str) -> None:
    """Real SIGKILLs before and after steps of the commit protocol (kill_trials.py); the resumed bytes are the same."""
    every = "5" if store == "arrow" else "31"  # steps come in threes, so all kinds are met
    done = subprocess.run(
        [sys.executable, "kill_trials.py", store, str(tmp_path), every],
        cwd=HERE,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads(done.stdout)
    assert trials["killed"] >= 12
    assert trials["different"] == []


def test_leftovers_of_a_killed_writer_go(tmp_path: Path) -> None:
    folder = tmp_path / WRITING_FOLDER
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", "pass"]) as dead:
        dead.wait()
    (folder / f"{socket.gethostname()}-{dead.pid}-3").write_bytes(b"half")
    write_cache(tmp_path, some_documents(3), some_settings())
    assert not folder.exists()
    assert verify_cache(tmp_path).ok


def child_environment() -> dict[str, str]:
    """This environment, with our packages importable from any folder."""
    return os.environ | {"PYTHONPATH": str(HERE.parents[1])}
