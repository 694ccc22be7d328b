"""The lease: one writer of a cache per machine, whatever became of the one before."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage_specs.errors import CacheInUseError
from storage_specs.lease import lease
from storage_specs.objects import open_objects

HOLD = (
    "import sys, time\n"
    "from storage_specs.lease import lease\n"
    "from storage_specs.objects import open_objects\n"
    "with lease(open_objects(sys.argv[1]), shared=len(sys.argv) > 2):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(600)\n"
)


def hold(folder: Path, *shared: str) -> subprocess.Popen[str]:
    """Another process that holds the folder until it is killed."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(folder), *shared]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_one_process_at_a_time_and_none_after_a_kill(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    objects = open_objects(tmp_path / "cache")
    process = hold(tmp_path / "cache")
    try:
        for shared in (False, True):
            with pytest.raises(CacheInUseError, match="another process of this machine"), lease(objects, shared=shared):
                raise AssertionError("held twice")
    finally:
        end(process)
    with lease(objects):
        assert list((tmp_path / "cache").iterdir()) == []


def test_builders_of_other_shards_share_it(tmp_path: Path) -> None:
    objects = open_objects(tmp_path)
    process = hold(tmp_path, "shared")
    try:
        with lease(objects, shared=True):
            pass
        with pytest.raises(CacheInUseError), lease(objects):
            raise AssertionError("not shared")
    finally:
        end(process)


def test_nothing_is_made_where_there_is_no_folder(tmp_path: Path) -> None:
    with lease(open_objects(tmp_path / "cache")):
        assert not (tmp_path / "cache").exists()
