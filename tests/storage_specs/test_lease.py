"""The lease: one writer of a cache per machine, whatever became of the one before."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage_specs.errors import CacheInUseError
from storage_specs.lease import lease
from storage_specs.object_roots import open_objects

HOLD = (
    "import sys, time\n"
    "from storage_specs.lease import lease\n"
    "from storage_specs.object_roots import open_objects\n"
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


# argv: a folder. A process that is forked while every kind of lock is held outlives all three.
FORKED = """
import os, sys, time
from pathlib import Path
from storage_specs.disk_cache import _locked
from storage_specs.lease import commit_turn, lease
from storage_specs.object_roots import open_objects
objects = open_objects(sys.argv[1])
with lease(objects), commit_turn(objects), _locked(Path(sys.argv[1]) / "disk"):
    if not os.fork():
        time.sleep(600)
print("given back", flush=True)
time.sleep(600)
"""


def test_a_process_that_was_forked_meanwhile_keeps_no_lock(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", FORKED, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "given back\n"
        for place in (tmp_path, tmp_path / "shards", tmp_path / "disk"):
            descriptor = os.open(place, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(descriptor)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
