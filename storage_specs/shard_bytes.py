"""A shard's bytes for its decoder: nothing is handed out that did not verify, be it whole objects or parts.

Parts tile an object: consecutive ranges, each with its own crc32c in the shard's commit record (every inner chunk and
the index of a Zarr array; every column chunk and the footer of a Parquet file). Streaming reads whole objects; random
access fetches the parts it needs.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from storage_specs.checksum import crc32c
from storage_specs.errors import ChecksumMismatchError, CorruptCacheError, MalformedObjectError, SizeMismatchError
from storage_specs.objects import Objects
from storage_specs.stored_object import StoredObject, remedy_at

SMALL = 1 << 14  # bytes of an object that is fetched in one request, whatever is wanted of it


@dataclass(frozen=True, kw_only=True)
class Parts:
    """How an object is cut: sizes in bytes and crc32c of consecutive ranges, which cover it without gaps."""

    sizes: tuple[int, ...]
    crc32c: tuple[int, ...]

    @classmethod
    def of(cls, data: bytes, sizes: Iterable[int]) -> "Parts":
        sizes, view = tuple(sizes), memoryview(data)
        ends = list(accumulate(sizes))
        if not sizes or min(sizes) < 1 or ends[-1] != len(data):
            raise ValueError(f"parts of {sizes} bytes do not cover {len(data)}")
        return cls(
            sizes=sizes, crc32c=tuple(crc32c(view[end - size : end]) for size, end in zip(sizes, ends, strict=True))
        )

    @classmethod
    def from_json(cls, value: Any, stored: StoredObject, place: str) -> "Parts":
        """From [[size, crc32c], ...]. Raises MalformedObjectError unless they cover the object that `stored` names."""
        numbers = [number for pair in value for number in pair] if _is_pairs(value) else [-1]
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or not numbers:
            raise MalformedObjectError(f"{place}: parts of {stored.name} are not pairs of size and crc32c")
        sizes, sums = tuple(numbers[::2]), tuple(numbers[1::2])
        if min(sizes) < 1 or max(sums) >= 2**32 or sum(sizes) != stored.size:
            raise MalformedObjectError(f"{place}: the parts of {stored.name} do not cover its {stored.size} bytes")
        return cls(sizes=sizes, crc32c=sums)

    def to_json(self) -> list[list[int]]:
        return [list(pair) for pair in zip(self.sizes, self.crc32c, strict=True)]


class EncodedObject(NamedTuple):
    """An object to be written. part_sizes: bytes of the parts that it is cut into; None where it is one."""

    data: bytes
    part_sizes: Sequence[int] | None = None


class ShardBytes(Protocol):
    """Verified bytes of a shard's objects, by name."""

    names: Collection[str]

    def size(self, name: str) -> int:
        """Bytes of an object. Raises ValueError where the shard has none of that name."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """The object's bytes `start` to `stop` (its end), verified. Raises CorruptCacheError's kinds, ValueError."""


class WholeObjects:
    """Objects in memory, verified by whoever fetched them."""

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        self.names: Collection[str] = contents.keys()
        self._contents = contents

    def size(self, name: str) -> int:
        return len(self.read(name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        if name not in self._contents:
            raise ValueError(f"there is no object {name}")
        return memoryview(self._contents[name])[start:stop]


class ObjectParts:
    """Objects where they lie, of which only the parts are fetched that hold what is asked for."""

    def __init__(self, objects: Objects, stored: Iterable[StoredObject], parts: Mapping[str, Parts]) -> None:
        self._objects = objects
        self._stored = {item.name: item for item in stored}
        self._parts = {
            item.name: parts.get(item.name) or Parts(sizes=(item.size,), crc32c=(item.crc32c,))
            for item in self._stored.values()
        }
        self._ends = {name: list(accumulate(item.sizes)) for name, item in self._parts.items()}
        self._fetched: dict[str, list[tuple[int, memoryview]]] = {name: [] for name in self._stored}
        self.names: Collection[str] = self._stored.keys()

    def expect(self, likely: Mapping[str, Iterable[range]]) -> None:
        """Fetch together what will probably be read: runs of parts of objects of several; all other objects whole."""
        runs = {}
        for name, ends in self._ends.items():
            for run in [range(len(ends))] if ends[-1] <= SMALL else likely.get(name, [range(len(ends))]):
                if run:
                    begin = ends[run.start - 1] if run.start else 0
                    runs[name, begin, ends[run.stop - 1] - begin] = run
        for wanted, data in self._objects.expect(list(runs)).items():
            with suppress(CorruptCacheError):  # it may have happened on the way, and may not be read at all
                self._keep(*wanted[:2], data, runs[wanted])

    def size(self, name: str) -> int:
        if name not in self._stored:
            raise ValueError(f"there is no object {name}")
        return self._stored[name].size

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        stop = self.size(name) if stop is None else stop
        ends = self._ends[name]
        if not 0 <= start <= stop <= ends[-1]:
            raise ValueError(f"{name}: bytes {start} to {stop} of {ends[-1]}")
        for begin, data in self._fetched[name]:
            if begin <= start and stop <= begin + len(data):
                return data[start - begin : stop - begin]
        if ends[-1] <= SMALL:
            run = range(len(ends))
        else:
            run = range(bisect_right(ends, start), min(len(ends), bisect_right(ends, max(start, stop - 1)) + 1))
        begin = ends[run.start - 1] if run.start else 0
        data = self._keep(name, begin, self._objects.read_range(name, begin, ends[run.stop - 1] - begin), run)
        return data[start - begin : stop - begin]

    def _keep(self, name: str, begin: int, fetched: bytes, run: range) -> memoryview:
        """Bytes from `begin` on, verified as these parts. Raises SizeMismatchError, ChecksumMismatchError."""
        data, parts, place = memoryview(fetched), self._parts[name], 0
        size = sum(parts.sizes[run.start : run.stop])
        if len(data) != size:
            raise SizeMismatchError(
                f"{name}: expected {size} bytes from byte {begin}, found {len(data)}; {remedy_at(self._objects.place)}"
            )
        for part in run:
            end = place + parts.sizes[part]
            found = crc32c(data[place:end])
            if found != parts.crc32c[part]:
                raise ChecksumMismatchError(
                    f"{name}, bytes {begin + place} to {begin + end}: expected crc32c {parts.crc32c[part]:08x}, "
                    f"found {found:08x}; {remedy_at(self._objects.place)}"
                )
            place = end
        self._fetched[name].append((begin, data))
        return data


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
