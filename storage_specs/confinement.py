"""Opening files of a cache folder so that nothing leads out of it: no symlink is followed, no device or pipe opened."""

import errno
import os
import stat
from pathlib import Path

from storage_specs.errors import MalformedObjectError

_REMEDY = "a cache consists of regular files: copy it with its files (`cp -rL`) if you trust whoever made it"


def open_inside(root: Path, name: str) -> int:
    """A descriptor, for reading, of the regular file `name` below `root`; `root` itself may be a symlink.

    Every step is taken from the folder before it (openat), so that nothing can be exchanged between check and use.
    Raises FileNotFoundError (also where a folder stands in its place), MalformedObjectError for what is no regular file
    or lies behind a symlink.
    """
    *folders, last = name.split("/")
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            descriptor = _step(descriptor, folder, os.O_DIRECTORY, root, name)
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        descriptor = _step(descriptor, last, os.O_NONBLOCK, root, name)
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise FileNotFoundError(errno.ENOENT, "a folder, not an object", str(root / name))
        if not stat.S_ISREG(mode):
            raise MalformedObjectError(f"{name}: no regular file in {root}; {_REMEDY}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _step(folder: int, part: str, flags: int, root: Path, name: str) -> int:
    """Open one part of a path below an open folder, which is closed once that has worked."""
    try:
        descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_symlink(part, folder):
            raise MalformedObjectError(f"{name}: {part} is a symlink in {root}; {_REMEDY}") from None
        if error.errno == errno.ENXIO:  # a socket, or a device without a driver
            raise MalformedObjectError(f"{name}: no regular file in {root}; {_REMEDY}") from None
        if error.errno == errno.ENOTDIR:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(root / name)) from None
        raise
    os.close(folder)
    return descriptor


def _is_symlink(part: str, folder: int) -> bool:
    return stat.S_ISLNK(os.stat(part, dir_fd=folder, follow_symlinks=False).st_mode)
