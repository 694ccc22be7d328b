"""The one interface of a shard's bytes: columns <-> {object name: bytes}, by the store's name."""

import importlib
from collections.abc import Mapping
from typing import Protocol

from storage_specs.columns import Columns, RowShape, ShardSize

STORES = {"zarr": "storage_specs.zarr_store", "arrow": "storage_specs.arrow_store"}


class ShardStore(Protocol):
    """What a store's module has. Pure functions: reading, writing and checksums are the business of `objects`."""

    def encode(self, columns: Columns, stem: str) -> dict[str, bytes]: ...

    def decode(self, contents: Mapping[str, bytes], stem: str, shape: RowShape, size: ShardSize) -> Columns: ...

    def holds_ids(self, name: str, stem: str) -> bool: ...


def shard_store(name: str) -> ShardStore:
    """The store of that name, a key of STORES."""
    return importlib.import_module(STORES[name])


def stem_of(shard: int, revision: int = 0) -> str:
    """What the names of all objects of a shard start with; a repaired shard has names of its own."""
    return f"shards/{shard:06d}{revision_mark(revision)}"


def revision_mark(revision: int) -> str:
    """What the n-th repair of a cache puts into the names of what it writes; nothing in a cache as it was built."""
    return f".r{revision}" if revision else ""
