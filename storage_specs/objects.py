"""Objects: named byte strings under one root, written atomically and never read unverified.

Names are relative, with `/` between parts. A root is a local folder or the URL of one in an object store
(`object_roots.open_objects`). All reading, writing and checking of a cache's bytes happens through this interface.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from storage_specs.errors import MalformedObjectError, MissingObjectError, SizeMismatchError
from storage_specs.stored_object import StoredObject, remedy_at

ByteRange = tuple[str, int, int]  # of an object: its name, offset, size


class Objects(ABC):
    """Objects under `root`: a pathlib.Path, or a URL as str. Threads may share it.

    An object appears whole or not at all. Every method raises, where the root is in an object store,
    StoreUnavailableError and StoreAccessError.
    """

    root: Path | str

    @property
    def place(self) -> str:
        """The root, for messages."""
        return str(self.root)

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of an object; None where there is none."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole object, unverified. Raises MissingObjectError."""

    @abstractmethod
    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`, unverified. Raises MissingObjectError, SizeMismatchError."""

    def expect(self, ranges: Sequence[ByteRange]) -> dict[ByteRange, bytes]:
        """Say which (name, offset, size) will be read next, so that they are fetched together: {range: its bytes},
        unverified, of those that had better be taken from here. Of what is left out `read_range` says what is wrong.
        """
        return {}  # where nothing is gained by knowing it

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(name, size in bytes) of every object whose name starts with `prefix`, in no order."""

    @abstractmethod
    def write_all(self, contents: Mapping[str, bytes]) -> None:
        """Write objects, each atomically, replacing what was there. Raises StorageFullError, OutputFolderError."""

    @contextmanager
    def staged(self, contents: Mapping[str, bytes]) -> Iterator[Callable[[], None]]:
        """`write_all` in two steps, the slow one now and the other when what this yields is called, inside the block.

        Without that call nothing was written. Raises as `write_all`, in either step.
        """
        yield partial(self.write_all, contents)  # an object store has no step that could be done before

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write an object only if there is none of that name: whether it is there now with these bytes.

        So False means that another writer was first, with other bytes; they are left as they are. Raises
        StorageFullError, OutputFolderError, StoreUnsupportedError.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete an object, if there is one, for good. Raises StorageFullError, OutputFolderError."""

    @abstractmethod
    def age(self, name: str) -> float | None:
        """Seconds since an object was written or linked here; None where there is none."""

    def leftovers(self, grace: float) -> Iterator[tuple[str, int]]:
        """(name, size) of what writers left half written: those of this host that are gone, and others where it is
        older than `grace` seconds. Nothing in object stores, where an object appears whole."""
        return iter(())

    @abstractmethod
    def sweep(self, grace: float = math.inf) -> None:
        """Remove `leftovers(grace)`, and folders that have been empty for longer; what live processes write stays."""

    def link_all(self, source: "Objects", names: Mapping[str, StoredObject]) -> None:
        """Take over objects of another root under new names: {name here: the object there}, replacing what was here.

        Between folders of one file system they are hard links, of which only the sizes were looked at; else copies,
        verified. Raises CorruptCacheError's kinds (the source's), StorageFullError, OutputFolderError.
        """
        contents = source.fetch_all(list(names.values()))
        self.write_all({name: contents[stored.name] for name, stored in names.items()})

    def check_size(self, stored: StoredObject, sizes: Mapping[str, int] | None = None) -> None:
        """Raises MissingObjectError, SizeMismatchError; reads nothing.

        sizes: what `list` said, where many objects are looked at.
        """
        found = self.size(stored.name) if sizes is None else sizes.get(stored.name)
        if found is None:
            raise MissingObjectError(
                f"{stored.name}: expected {stored.size} bytes, found no object in {self.place}; {remedy_at(self.place)}"
            )
        if found != stored.size:
            raise SizeMismatchError(
                f"{stored.name}: expected {stored.size} bytes, found {found}; {remedy_at(self.place)}"
            )

    def fetch(self, stored: StoredObject) -> bytes:
        """The object's bytes, verified: what is checked is what is returned.

        Raises MissingObjectError, SizeMismatchError (before reading), ChecksumMismatchError.
        """
        self.check_size(stored)
        data = self.read(stored.name)
        stored.check(data, remedy_at(self.place))
        return data

    def read_within(self, name: str, limit: int) -> bytes:
        """The whole object, unverified, of at most `limit` bytes. Raises MissingObjectError, MalformedObjectError."""
        size = self.size(name)
        if size is not None and size > limit:
            raise MalformedObjectError(f"{name}: {size} bytes, above the limit of {limit}")
        return self.read(name)

    def fetch_all(self, wanted: Sequence[StoredObject]) -> dict[str, bytes]:
        """{name: bytes} of several objects, verified; object stores are asked for many at a time.

        Raises what `fetch` raises for the first object, in the order of `wanted`, that is not what was written.
        """
        return {stored.name: self.fetch(stored) for stored in wanted}
