"""Objects as files under a folder: synced, then renamed into place."""

import errno
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeVar

from storage_specs.confinement import open_inside
from storage_specs.errors import (
    MalformedObjectError,
    MissingObjectError,
    OutputFolderError,
    StorageFullError,
    TeachOnceError,
)
from storage_specs.objects import ByteRange, Objects
from storage_specs.stored_object import StoredObject, check_length, remedy_at

# Files being written lie here, named host-pid-number, and are renamed into place; what a killed writer left is swept.
WRITING_FOLDER = ".writing"
_FOLDER_TRIES = 100
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_numbers = count()
_in_use: set[str] = set()
Made = TypeVar("Made")


class LocalObjects(Objects):
    """Objects as files under a folder. An object appears whole or not at all, and stays after a power cut.

    Sizes and bytes come from regular files only: MalformedObjectError for symlinks, pipes and devices.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def size(self, name: str) -> int | None:
        try:
            descriptor = open_inside(self.root, name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def read(self, name: str) -> bytes:
        try:
            with open(open_inside(self.root, name), "rb") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(name) from None

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        try:
            with open(open_inside(self.root, name), "rb") as file:
                there = max(0, os.fstat(file.fileno()).st_size - offset)
                file.seek(offset)
                data = file.read(min(size, there))  # read() allocates what it is asked for
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(name) from None
        check_length(name, offset, size, len(data), remedy_at(self.root))
        return data

    def expect(self, ranges: Sequence[ByteRange]) -> dict[ByteRange, bytes]:
        """Nothing: the kernel reads ahead."""
        for name, offset, size in ranges if hasattr(os, "posix_fadvise") else ():
            with suppress(OSError, MalformedObjectError):  # reading it says what is wrong
                descriptor = open_inside(self.root, name)
                try:
                    os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)
        return {}

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        for folder, folders, files in os.walk(self.root / prefix.rpartition("/")[0]):
            if Path(folder) == self.root and WRITING_FOLDER in folders:
                folders.remove(WRITING_FOLDER)
            for file in files:
                name = Path(folder, file).relative_to(self.root).as_posix()
                size = self.size(name)
                if name.startswith(prefix) and size is not None:  # it may be gone by now
                    yield name, size

    def write_all(self, contents: Mapping[str, bytes]) -> None:
        with self.staged(contents) as publish:
            publish()

    @contextmanager
    def staged(self, contents: Mapping[str, bytes]) -> Iterator[Callable[[], None]]:
        """The bytes are on disk, under other names, when it yields."""
        folders = self._make_folder(self.root)
        with ExitStack() as stack:
            written = {
                name: stack.enter_context(self._written(data, self.root / name)) for name, data in contents.items()
            }
            yield partial(self._publish, written, folders)

    def _publish(self, written: Mapping[str, Path], folders: set[Path]) -> None:
        """Give temporary files their names, for good. folders: more to be synced."""
        folders = set(folders)
        for name, temporary in written.items():
            target = self.root / name
            folders |= self._make_folder(target.parent)
            with writing(target):
                os.replace(temporary, target)
            folders.add(target.parent)
        for folder in sorted(folders):
            _sync(folder)

    def link_all(self, source: Objects, names: Mapping[str, StoredObject]) -> None:
        folders: set[Path] = set()
        for name, stored in names.items():
            target = self.root / name
            folders |= self._make_folder(target.parent)
            if not (isinstance(source, LocalObjects) and self._linked(source, stored, target)):
                with self._written(source.fetch(stored), target) as temporary:
                    os.replace(temporary, target)
            folders.add(target.parent)
        for folder in sorted(folders):
            _sync(folder)

    def create(self, name: str, data: bytes) -> bool:
        target = self.root / name
        folders = self._make_folder(target.parent)
        with self._written(data, target) as temporary:
            created = _place(temporary, target)
        for folder in sorted(folders | {target.parent}):
            _sync(folder)
        return created or self.read(name) == data

    def delete(self, name: str) -> None:
        with writing(self.root / name):
            (self.root / name).unlink(missing_ok=True)
        if (self.root / name).parent.is_dir():
            _sync((self.root / name).parent)

    def age(self, name: str) -> float | None:
        try:
            status = (self.root / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return time.time() - max(status.st_mtime, status.st_ctime)  # a hard link keeps the time of its writing

    def leftovers(self, grace: float) -> Iterator[tuple[str, int]]:
        try:
            files = os.listdir(self.root / WRITING_FOLDER)
        except (FileNotFoundError, NotADirectoryError):  # never made, or swept
            return
        for file in files:
            host, process = _owner(file)
            name = f"{WRITING_FOLDER}/{file}"
            age, size = self.age(name), self.size(name)
            if age is None or size is None:  # renamed into place by now
                continue
            ours = host == socket.gethostname()
            if file not in _in_use and (not process_is_alive(process) if ours else age > grace):
                yield name, size

    def sweep(self, grace: float = math.inf) -> None:
        for name, _ in self.leftovers(grace):
            (self.root / name).unlink(missing_ok=True)
        with suppress(OSError):  # never made, or another builder is writing
            (self.root / WRITING_FOLDER).rmdir()
        for folder, _, _ in os.walk(self.root, topdown=False) if grace < math.inf else ():
            name = os.path.relpath(folder, self.root)
            if name != "." and (self.age(name) or 0) >= grace:
                with suppress(OSError):  # not empty
                    os.rmdir(folder)

    def _missing(self, name: str) -> MissingObjectError:
        return MissingObjectError(f"{name}: expected an object, found none in {self.root}; {remedy_at(self.root)}")

    def _make_folder(self, folder: Path) -> set[Path]:
        """Make a folder and its parents; returns the folders that got a new entry, to be synced."""
        with writing(folder):
            if self.root.exists() and not self.root.is_dir():
                raise OutputFolderError(f"{self.root} is a file, not a folder; choose another output folder")
            inside = [step for step in (folder, *folder.parents) if step != self.root and self.root in step.parents]
            if any(step.is_symlink() for step in inside):  # readers would refuse it, and it may lead anywhere
                raise OutputFolderError(f"{folder} is or lies behind a symlink; choose another output folder")
            missing = [step for step in (folder, *folder.parents) if not step.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        return {step.parent for step in missing}

    def _linked(self, source: "LocalObjects", stored: StoredObject, target: Path) -> bool:
        """Make `target` a hard link of a file of another root: whether that could be."""
        source.check_size(stored)
        with self._temporary() as temporary, writing(target):
            try:
                _made_in_folder(temporary, lambda: os.link(source.root / stored.name, temporary))
            except OSError as error:
                if error.errno in (*_NO_HARD_LINKS, errno.EXDEV):
                    return False
                raise
            os.replace(temporary, target)
        return True

    @contextmanager
    def _written(self, data: bytes, target: Path) -> Iterator[Path]:
        """A synced temporary file with `data`, gone afterwards unless it was renamed."""
        with self._temporary() as temporary, writing(target):  # renaming and linking need space too
            with _made_in_folder(temporary, lambda: open(temporary, "xb")) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A name for a file being written, which is gone afterwards unless it was renamed."""
        name = f"{socket.gethostname()}-{os.getpid()}-{next(_numbers)}"
        _in_use.add(name)
        try:
            yield self.root / WRITING_FOLDER / name
        finally:
            with suppress(OSError):  # swept later
                (self.root / WRITING_FOLDER / name).unlink(missing_ok=True)
            _in_use.discard(name)


@contextmanager
def writing(target: Path | str) -> Iterator[None]:
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


def process_is_alive(process: int) -> bool:
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


def _made_in_folder(path: Path, make: Callable[[], Made]) -> Made:
    """What `make` returns, in the folder of `path`: another builder removes that as soon as it sees it empty."""
    for _ in range(_FOLDER_TRIES):
        with suppress(FileExistsError):
            os.mkdir(path.parent)
        with suppress(FileNotFoundError):
            return make()
    return make()


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
