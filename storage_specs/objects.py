"""Objects: named byte strings under one root, written atomically and never read unverified.

Names are relative, with `/` between parts. All reading, writing, checksums and syncing of a cache happen here.
"""

import errno
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from storage_specs.checksum import crc32c
from storage_specs.confinement import open_inside
from storage_specs.errors import (
    ChecksumMismatchError,
    MalformedObjectError,
    MissingObjectError,
    OutputFolderError,
    SizeMismatchError,
    StorageFullError,
    TeachOnceError,
)

# Files being written lie here, named host-pid-number, and are renamed into place; what a killed writer left is swept.
WRITING_FOLDER = ".writing"
REMEDY = (
    "fetch the cache again if this is a copy; else delete manifest.json and run the same `cache-builder build` "
    "command: it redoes only the damaged shards"
)
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_numbers = count()
_in_use: set[str] = set()


@dataclass(frozen=True)
class StoredObject:
    """What is known of an object before it is read: its name, its size in bytes and its crc32c."""

    name: str
    size: int
    crc32c: int

    @classmethod
    def of(cls, name: str, data: bytes) -> "StoredObject":
        return cls(name, len(data), crc32c(data))

    @classmethod
    def from_json(cls, value: Any, place: str) -> "StoredObject":
        """From {"name", "size", "crc32c"}. Raises MalformedObjectError naming `place`."""
        if not isinstance(value, dict) or set(value) != {"name", "size", "crc32c"}:
            raise MalformedObjectError(f"{place}: expected an object's name, size and crc32c, found {value!r:.200}")
        check_name(value["name"], place)
        for key, limit in (("size", 2**63), ("crc32c", 2**32)):
            if type(value[key]) is not int or not 0 <= value[key] < limit:
                raise MalformedObjectError(f"{place}: {key} of {value['name']!r} is {value[key]!r}")
        return cls(**value)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "size": self.size, "crc32c": self.crc32c}

    def check(self, data: bytes) -> None:
        """Raises SizeMismatchError or ChecksumMismatchError where `data` is not what was written."""
        if len(data) != self.size:
            raise SizeMismatchError(f"{self.name}: expected {self.size} bytes, found {len(data)}; {REMEDY}")
        found = crc32c(data)
        if found != self.crc32c:
            raise ChecksumMismatchError(f"{self.name}: expected crc32c {self.crc32c:08x}, found {found:08x}; {REMEDY}")


def check_name(name: Any, place: str) -> None:
    """Raises MalformedObjectError unless `name` is a relative path that stays below the cache's root."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") for part in parts) or any(sign in name for sign in "\\:\0"):
        raise MalformedObjectError(f"{place}: refused object name {name!r:.200}: it must be a path inside the cache")


class LocalObjects:
    """Objects as files under a folder. An object appears whole or not at all, and stays after a power cut."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def size(self, name: str) -> int | None:
        """Bytes of an object; None where there is none. MalformedObjectError for symlinks, pipes and devices."""
        try:
            descriptor = open_inside(self.root, name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def read(self, name: str) -> bytes:
        """Raises MissingObjectError; MalformedObjectError for symlinks, pipes and devices."""
        try:
            with open(open_inside(self.root, name), "rb") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            raise MissingObjectError(f"{name}: expected an object, found none in {self.root}; {REMEDY}") from None

    def check_size(self, stored: StoredObject) -> None:
        """Raises MissingObjectError, SizeMismatchError; reads nothing."""
        found = self.size(stored.name)
        if found is None:
            raise MissingObjectError(
                f"{stored.name}: expected {stored.size} bytes, found no object in {self.root}; {REMEDY}"
            )
        if found != stored.size:
            raise SizeMismatchError(f"{stored.name}: expected {stored.size} bytes, found {found}; {REMEDY}")

    def fetch(self, stored: StoredObject) -> bytes:
        """The object's bytes, verified: what is checked is what is returned.

        Raises MissingObjectError, SizeMismatchError (before reading), ChecksumMismatchError.
        """
        self.check_size(stored)
        data = self.read(stored.name)
        stored.check(data)
        return data

    def write_all(self, contents: Mapping[str, bytes]) -> None:
        """Write objects, each atomically, replacing what was there. Raises StorageFullError, OutputFolderError."""
        folders: set[Path] = set()
        for name, data in contents.items():
            target = self.root / name
            folders |= self._make_folder(target.parent)
            with self._written(data, target) as temporary:
                os.replace(temporary, target)
            folders.add(target.parent)
        for folder in sorted(folders):
            _sync(folder)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object only if there is none of that name: whether it was written.

        Raises StorageFullError, OutputFolderError.
        """
        target = self.root / name
        folders = self._make_folder(target.parent)
        with self._written(data, target) as temporary:
            created = _place(temporary, target)
        for folder in sorted(folders | {target.parent}):
            _sync(folder)
        return created

    def delete(self, name: str) -> None:
        """Delete an object, if there is one, for good. Raises StorageFullError, OutputFolderError."""
        with writing(self.root / name):
            (self.root / name).unlink(missing_ok=True)
        if (self.root / name).parent.is_dir():
            _sync((self.root / name).parent)

    def sweep(self) -> None:
        """Remove what killed writers of this host left half written; files of live processes stay."""
        folder = self.root / WRITING_FOLDER
        for path in folder.iterdir() if folder.is_dir() else ():
            host, process = _owner(path.name)
            if host == socket.gethostname() and path.name not in _in_use and not _alive(process):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # never made, or another builder is writing
            folder.rmdir()

    def _make_folder(self, folder: Path) -> set[Path]:
        """Make a folder and its parents; returns the folders that got a new entry, to be synced."""
        with writing(folder):
            missing = [step for step in (folder, *folder.parents) if not step.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        return {step.parent for step in missing}

    @contextmanager
    def _written(self, data: bytes, target: Path) -> Iterator[Path]:
        """A synced temporary file with `data`, gone afterwards unless it was renamed."""
        folder = self.root / WRITING_FOLDER
        name = f"{socket.gethostname()}-{os.getpid()}-{next(_numbers)}"
        _in_use.add(name)
        try:
            with writing(target):
                folder.mkdir(exist_ok=True)
                with open(folder / name, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield folder / name  # renaming and linking need space too
        finally:
            with suppress(OSError):  # swept later
                (folder / name).unlink(missing_ok=True)
            _in_use.discard(name)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Gives the system's errors their types: StorageFullError, or OutputFolderError for all that is not about space."""
    try:
        yield
    except TeachOnceError:
        raise
    except OSError as error:
        if error.errno not in _OUT_OF_SPACE:
            raise OutputFolderError(
                f"{target}: cannot be written ({error.strerror or error}); finished shards are kept: make it writable, "
                "or choose another output folder"
            ) from error
        raise StorageFullError(
            f"{target}: no space left to write it ({error.strerror}); finished shards are kept: free space "
            "and run the same command again"
        ) from error


def _owner(name: str) -> tuple[str, int]:
    """Host and process of a temporary file's name."""
    host, process, _ = name.rsplit("-", 2) if name.count("-") >= 2 else ("", "0", "")
    return host, int(process) if process.isdecimal() else 0


def _alive(process: int) -> bool:
    """Whether another process of this host has that id. Our own id on a file not in use means an earlier process."""
    if process in (0, os.getpid()):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _place(temporary: Path, target: Path) -> bool:
    """Give a finished file its name if nothing has that name: whether it was given."""
    try:
        try:
            os.link(temporary, target)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            os.close(os.open(target, os.O_CREAT | os.O_EXCL))  # claims the name, on file systems without hard links
            os.replace(temporary, target)
    except FileExistsError:
        return False
    return True


def _sync(folder: Path) -> None:
    """Make a folder's entries durable."""
    with writing(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
