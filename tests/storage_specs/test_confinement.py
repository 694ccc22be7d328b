"""Files of a cache folder are opened only where they are regular and lie inside it."""

import os
import shutil
import socket
from pathlib import Path

import pytest
from small_caches import some_documents, some_settings, write_cache

from storage_specs import open_cache
from storage_specs.confinement import open_inside
from storage_specs.errors import CorruptCacheError, MalformedObjectError


def content(root: Path, name: str) -> bytes:
    with open(open_inside(root, name), "rb") as file:
        return file.read()


def test_regular_files_are_opened_below_a_root_that_may_be_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "real/a/b").mkdir(parents=True)
    (tmp_path / "real/a/b/c").write_bytes(b"content")
    (tmp_path / "link").symlink_to("real")
    assert content(tmp_path / "real", "a/b/c") == content(tmp_path / "link", "a/b/c") == b"content"


@pytest.mark.parametrize("name", ["a/x", "x", "a", "a/b/c/d", "x/y"])
def test_what_is_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_bytes(b"content")
    with pytest.raises(FileNotFoundError):
        open_inside(tmp_path, name)


def test_symlinks_pipes_and_sockets_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/c").write_bytes(b"content")
    (tmp_path / "file").symlink_to("a/c")
    (tmp_path / "folder").symlink_to("a")
    (tmp_path / "nowhere").symlink_to("none")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket"))  # its name may have 107 bytes
        for name, problem in {
            "file": "file is a symlink",
            "folder/c": "folder is a symlink",
            "nowhere": "nowhere is a symlink",
            "pipe": "no regular file",
            "socket": "no regular file",
        }.items():
            with pytest.raises(MalformedObjectError, match=problem):
                open_inside(tmp_path, name)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/link").symlink_to("c")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("a/link", "a/none", "none/none", "a"):
        with pytest.raises((FileNotFoundError, MalformedObjectError)):
            open_inside(tmp_path, name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_cache_with_a_symlink_in_it_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", some_documents(3), some_settings("arrow"))
    shutil.move(tmp_path / "cache/shards", tmp_path / "elsewhere")
    (tmp_path / "cache/shards").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptCacheError, match=r"shards is a symlink .*cp -rL"):
        open_cache(tmp_path / "cache")[0]
