"""Objects of a remote cache kept on a local disk, within a bound, shared by all processes of the host.

A file is named after everything that identifies its object, placed by a rename, and verified every time that it is
read: a damaged one is fetched again. One process fetches an object while others wait for it (a lock per object), so
that the store is read once per host. Beyond the bound the files go that were not used for longest.

    CACHE_DIR/objects/1f/<sha256 of URL, name, size, crc32c>    CACHE_DIR/used    bytes promised so far
    CACHE_DIR/locks/1f3, locks/used                             CACHE_DIR/writing  files not yet in place
"""

import fcntl
import hashlib
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from storage_specs.document import canonical_json
from storage_specs.errors import ConfigError, CorruptCacheError
from storage_specs.lease import unlocked
from storage_specs.objects import ByteRange, Objects
from storage_specs.stored_object import StoredObject

DEFAULT_BYTES = 32 << 30
OBJECTS_AT_ONCE = 16
KEPT_AFTER_EVICTION = 0.9  # of the bound, so that not every new object looks through the folder
ABANDONED_SECONDS = 3600  # after which a file that was being written belongs to nobody


class DiskCache(Objects):
    """The reading half of Objects, before another one. What was fetched verified is kept; all else passes through."""

    def __init__(self, source: Objects, folder: str | os.PathLike[str], limit_bytes: int) -> None:
        """Raises ConfigError: a folder that cannot be written, a bound that is not positive."""
        if limit_bytes < 1:
            raise ConfigError(f"cache_bytes is {limit_bytes}, but must be at least 1")
        self.root, self.source, self.folder, self.limit_bytes = source.root, source, Path(folder), limit_bytes
        try:
            for name in ("objects", "locks", "writing"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cache_dir {folder}: cannot be written ({error.strerror}); choose another") from None

    def __reduce__(self) -> tuple:
        return DiskCache, (self.source, self.folder, self.limit_bytes)

    def size(self, name: str) -> int | None:
        return self.source.size(name)

    def read(self, name: str) -> bytes:
        return self.source.read(name)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        return self.source.read_range(name, offset, size)

    def expect(self, ranges: Sequence[ByteRange]) -> dict[ByteRange, bytes]:
        return self.source.expect(ranges)

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        return self.source.list(prefix)

    def fetch(self, stored: StoredObject) -> bytes:
        file = self._file_of(stored)
        data = _intact(file, stored)
        if data is None:
            with _locked(self.folder / "locks" / file.name[:3]):  # so many that few objects ever share one
                data = _intact(file, stored)  # another process may have brought it meanwhile
                if data is None:
                    data = self.source.fetch(stored)
                    self._keep(file, data)
        return data

    def fetch_all(self, wanted: Sequence[StoredObject]) -> dict[str, bytes]:
        with ThreadPoolExecutor(OBJECTS_AT_ONCE) as threads:
            return dict(zip((stored.name for stored in wanted), threads.map(self.fetch, wanted), strict=True))

    def write_all(self, contents: Mapping[str, bytes]) -> None:
        self.source.write_all(contents)

    def create(self, name: str, data: bytes) -> bool:
        return self.source.create(name, data)

    def delete(self, name: str) -> None:
        self.source.delete(name)

    def age(self, name: str) -> float | None:
        return self.source.age(name)

    def sweep(self, grace: float = math.inf) -> None:
        self.source.sweep(grace)

    def _file_of(self, stored: StoredObject) -> Path:
        key = hashlib.sha256(canonical_json([self.place, stored.to_json()])).hexdigest()
        return self.folder / "objects" / key[:2] / key

    def _keep(self, file: Path, data: bytes) -> None:
        """Put a file in place, room made for it before. A disk that is full, or gone, only costs the next reading."""
        temporary = self.folder / "writing" / f"{file.name}-{os.getpid()}-{threading.get_ident()}"
        with suppress(OSError):
            if self._reserved(temporary, len(data)):
                file.parent.mkdir(exist_ok=True)
                temporary.write_bytes(data)
                os.replace(temporary, file)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)

    def _reserved(self, temporary: Path, size: int) -> bool:
        """Count `size` bytes as used and give them to a file, old files removed where they would not fit: if they do.

        The count is never too low, as it grows before a file does; it may be too high (a process died, a file was
        replaced) until the next look through the folder.
        """
        if size > self.limit_bytes:
            return False
        count = self.folder / "used"
        with _locked(self.folder / "locks" / "used"):
            try:
                used = int(count.read_text())
            except (OSError, ValueError):
                used = self.limit_bytes  # unknown
            if used + size > self.limit_bytes:
                used = self._evict(min(self.limit_bytes - size, int(self.limit_bytes * KEPT_AFTER_EVICTION)))
            fits = used + size <= self.limit_bytes
            count.write_text(str(used + size * fits))
            if fits:
                with open(temporary, "wb") as file:
                    file.truncate(size)  # so that others see what is coming
        return fits

    def _evict(self, target_bytes: int) -> int:
        """Remove the files not used for longest until at most `target_bytes` are left, if it can be: the bytes left."""
        oldest, files = time.time() - ABANDONED_SECONDS, []
        # in this order: what is put in place meanwhile is counted twice, not overlooked
        for path in chain(self.folder.glob("writing/*"), self.folder.glob("objects/*/*")):
            with suppress(OSError):
                status = path.stat()
                kept = path.parent.name == "writing" and status.st_mtime > oldest
                files.append((kept, status.st_mtime, status.st_size, path))
        left = sum(size for _, _, size, _ in files)
        for kept, _, size, path in sorted(files):
            if kept or left <= target_bytes:
                break
            with suppress(OSError):
                path.unlink()
                left -= size
        return left


def _intact(file: Path, stored: StoredObject) -> bytes | None:
    """The object's bytes from a file of the disk cache, if they are there and what they should be."""
    try:
        data = file.read_bytes()
        stored.check(data)
    except (OSError, CorruptCacheError):
        return None
    with suppress(OSError):
        os.utime(file)  # used now
    return data


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among all threads and processes of this host; where a file system has no locks, more is read, no harm."""
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            unlocked(descriptor)
