"""Objects: atomic, durable, verified, and inside the folder."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from storage_specs import local_objects as module
from storage_specs.errors import (
    ChecksumMismatchError,
    CorruptCacheError,
    MalformedObjectError,
    MissingObjectError,
    OutputFolderError,
    SizeMismatchError,
    StorageFullError,
)
from storage_specs.local_objects import WRITING_FOLDER, LocalObjects
from storage_specs.stored_object import StoredObject


def test_written_objects_are_read_back(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path / "new" / "cache")
    objects.write_all({"a": b"1", "deep/er/b": b"", "deep/c": b"x" * 100_000})
    assert objects.read("a") == b"1"
    assert objects.size("deep/er/b") == 0
    assert objects.size("deep/none") is None
    assert objects.size("a/below") is None
    objects.write_all({"a": b"22"})
    assert objects.fetch(StoredObject.of("a", b"22")) == b"22"
    objects.delete("a")
    objects.delete("a")
    assert objects.size("a") is None


def test_create_keeps_what_is_there(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path)
    assert objects.create("one", b"first")
    assert not objects.create("one", b"second")
    assert objects.read("one") == b"first"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["one"]


def test_create_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    objects = LocalObjects(tmp_path)
    assert objects.create("one", b"first")
    assert not objects.create("one", b"second")
    assert objects.read("one") == b"first"


def test_bytes_are_durable_before_they_have_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    for name in ("fsync", "replace", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (steps.append(name), real(*a))[1])
    objects = LocalObjects(tmp_path / "cache")
    objects.write_all({"a": b"1"})
    # the file; its name; then the entries of the cache's folder and of the folder above, which is new
    assert steps == ["fsync", "replace", "fsync", "fsync"]
    steps.clear()
    objects.create("b", b"1")
    assert steps == ["fsync", "link", "fsync"]


def test_damage_is_told_apart(tmp_path: Path) -> None:
    objects, stored = LocalObjects(tmp_path), StoredObject.of("shards/x", b"0123456789")
    with pytest.raises(MissingObjectError, match=r"shards/x: expected 10 bytes, found no object .*build"):
        objects.fetch(stored)
    objects.write_all({"shards/x": b"012345678"})
    with pytest.raises(SizeMismatchError, match=r"shards/x: expected 10 bytes, found 9.*build"):
        objects.fetch(stored)
    objects.write_all({"shards/x": b"012345678X"})
    with pytest.raises(ChecksumMismatchError, match=r"shards/x: expected crc32c 280c069e, found [0-9a-f]{8}.*build"):
        objects.fetch(stored)
    objects.check_size(stored)
    (tmp_path / "shards" / "x").unlink()
    (tmp_path / "shards" / "x").mkdir()
    with pytest.raises(CorruptCacheError):
        objects.fetch(stored)


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "..", "C:\\x", "a\\b", "a\0b", None, 7]
)
def test_names_outside_the_cache_are_refused(name: object) -> None:
    with pytest.raises(MalformedObjectError, match="refused object name"):
        StoredObject.from_json({"name": name, "size": 1, "crc32c": 1}, "manifest.json")


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        {"name": "a", "size": 1},
        {"name": "a", "size": -1, "crc32c": 0},
        {"name": "a", "size": True, "crc32c": 0},
        {"name": "a", "size": 1, "crc32c": 2**32},
    ],
)
def test_half_descriptions_are_refused(value: object) -> None:
    with pytest.raises(MalformedObjectError):
        StoredObject.from_json(value, "manifest.json")


def test_sweep_takes_only_what_killed_writers_of_this_host_left(tmp_path: Path) -> None:
    objects, host = LocalObjects(tmp_path), socket.gethostname()
    folder = tmp_path / WRITING_FOLDER
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", "pass"]) as dead:
        dead.wait()
    alive = os.getppid()
    for name in (f"{host}-{dead.pid}-0", f"{host}-{os.getpid()}-7", f"{host}-{alive}-0", "elsewhere-1-0", "README"):
        (folder / name).touch()
    objects.sweep()
    assert sorted(os.listdir(folder)) == sorted([f"{host}-{alive}-0", "elsewhere-1-0", "README"])


def test_sweep_leaves_what_this_process_is_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = LocalObjects(tmp_path)
    place = module._place
    monkeypatch.setattr(module, "_place", lambda *paths: (objects.sweep(), place(*paths))[1])
    assert objects.create("one", b"first")
    objects.sweep()
    assert os.listdir(tmp_path) == ["one"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("step", ["fsync", "replace", "link"])
def test_full_disk_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: str) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    objects = LocalObjects(tmp_path)
    monkeypatch.setattr(os, step, full)
    with pytest.raises(StorageFullError, match=r"one: no space left .* run the same command again"):
        objects.create("one", b"1") if step == "link" else objects.write_all({"one": b"1"})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("step", ["create", "write_all"])
def test_a_place_that_cannot_be_written_is_a_typed_error(tmp_path: Path, step: str) -> None:
    (tmp_path / "file").touch()
    below_a_file, below_proc = LocalObjects(tmp_path / "file" / "cache"), LocalObjects("/proc/none/cache")
    for objects in (below_a_file, below_proc):
        with pytest.raises(OutputFolderError, match=r"cache: cannot be written .* choose another output folder"):
            objects.create("x", b"1") if step == "create" else objects.write_all({"x": b"1"})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("step", ["mkdir", "open", "fsync", "replace"])
def test_refusals_of_the_system_are_typed_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    objects = LocalObjects(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, refuse)
        with pytest.raises(OutputFolderError, match=os.strerror(number)):
            objects.write_all({"deep/one": b"1"})
