"""One writer at a time: while a process builds, repairs or cleans a cache in a folder, others of this host keep off.

The system's lock on the folder itself (flock): nothing is left behind, and it ends with the process however that dies.
Object stores, and file systems without such locks, have none: there the conditional create of plan.json and
manifest.json, and `gc`'s grace period, keep writers apart.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from storage_specs.errors import CacheInUseError
from storage_specs.local_objects import writing
from storage_specs.objects import Objects

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
        folder = os.open(objects.root / "shards", os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(folder)


@contextmanager
def lease(objects: Objects, *, shared: bool = False) -> Iterator[None]:
    """Hold a cache's folder, if there is one.

    shared: beside others that share it (builders of other shards). Raises CacheInUseError where a process of this host
    holds it otherwise, OutputFolderError.
    """
    if isinstance(objects.root, str) or not objects.root.is_dir():
        yield
        return
    with writing(objects.root):
        folder = os.open(objects.root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheInUseError(
                f"{objects.place}: another process of this machine is writing this cache; wait for it, or choose "
                "another output folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(folder)
