"""One writer at a time: while a process builds, repairs or cleans a cache, others keep off.

In a folder it is the system's lock on the folder itself (flock): nothing is left behind, and it ends with the process
however that dies; file systems without such locks have none. In an object store see `store_lease`.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from storage_specs.errors import CacheInUseError
from storage_specs.local_objects import writing
from storage_specs.objects import Objects
from storage_specs.store_lease import store_lease

_NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def commit_turn(objects: Objects) -> Iterator[None]:
    """Wait until nobody else of this host commits a shard of this cache, or finishes it.

    Workers that share the lease may have the same shard; without turns the objects of two versions of it could end up
    side by side, which no record proves. It is the folder `shards` that is locked, made where it is not there yet.
    """
    if isinstance(objects.root, str):
        yield
        return
    with writing(objects.root):
        (objects.root / "shards").mkdir(parents=True, exist_ok=True)
    folder = _locked(objects.root / "shards", fcntl.LOCK_EX)
    try:
        yield
    finally:
        unlocked(folder)


@contextmanager
def lease(objects: Objects, *, shared: bool = False) -> Iterator[None]:
    """Hold a cache: its folder, if there is one, or its place in an object store.

    shared: beside others that share it (builders of other shards); in an object store these hold nothing. Raises
    CacheInUseError where another process holds it otherwise, OutputFolderError, and what a store raises.
    """
    if isinstance(objects.root, str):
        with nullcontext() if shared else store_lease(objects):
            yield
        return
    if not objects.root.is_dir():
        yield
        return
    try:
        folder = _locked(objects.root, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CacheInUseError(
            f"{objects.place}: another process of this machine is writing this cache; wait for it, or choose another "
            "output folder"
        ) from None
    try:
        yield
    finally:
        unlocked(folder)


def _locked(folder: Path, how: int) -> int:
    """A descriptor that holds a folder's lock, if its file system has locks, until it is closed.

    Raises BlockingIOError, OutputFolderError.
    """
    with writing(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    return descriptor


def unlocked(descriptor: int) -> None:
    """Give a lock back and close its descriptor, of which a process that was forked meanwhile has a copy.

    Closing alone would leave the lock with that process until it ends, a data loader's worker after the last epoch.
    """
    with suppress(OSError):  # no such locks here
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
