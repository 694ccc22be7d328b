"""What is known of an object before it is read: name, size and crc32c, against which its bytes are checked."""

from dataclasses import dataclass
from typing import Any

from storage_specs.checksum import crc32c
from storage_specs.errors import ChecksumMismatchError, MalformedObjectError, SizeMismatchError


def remedy_at(place: object) -> str:
    """What to do about a damaged object of the cache at `place`."""
    return f"fetch the cache again if this is a copy, or run `cache-builder repair {place}`"


REMEDY = remedy_at("CACHE")


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

    def check(self, data: bytes, remedy: str = REMEDY) -> None:
        """Raises SizeMismatchError or ChecksumMismatchError where `data` is not what was written."""
        if len(data) != self.size:
            raise SizeMismatchError(f"{self.name}: expected {self.size} bytes, found {len(data)}; {remedy}")
        found = crc32c(data)
        if found != self.crc32c:
            raise ChecksumMismatchError(f"{self.name}: expected crc32c {self.crc32c:08x}, found {found:08x}; {remedy}")


def check_name(name: Any, place: str) -> None:
    """Raises MalformedObjectError unless `name` is a relative path that stays below the cache's root."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") for part in parts) or any(sign in name for sign in "\\:\0"):
        raise MalformedObjectError(f"{place}: refused object name {name!r:.200}: it must be a path inside the cache")


def check_length(name: str, offset: int, size: int, found: int, remedy: str = REMEDY) -> None:
    """Raises SizeMismatchError unless a read of `size` bytes from `offset` on found that many."""
    if found != size:
        raise SizeMismatchError(f"{name}: expected {size} bytes from {offset} on, found {found}; {remedy}")
