"""The one interface of a shard's bytes: a stored shard <-> {object name: bytes}, by the store's name."""

import importlib
from typing import Protocol

from storage_specs.shard_bytes import EncodedObject, ShardBytes
from storage_specs.shard_record import ShardRecord
from storage_specs.stored_shard import Selection, ShardArrays, ShardSize, StoredShard

STORES = {"zarr": "storage_specs.zarr_store", "arrow": "storage_specs.arrow_store"}


class ShardStore(Protocol):
    """What a store's module has. Pure functions: reading, writing and checksums are the business of `objects`."""

    def encode(self, shard: StoredShard, wanted: ShardArrays, stem: str) -> dict[str, EncodedObject]:
        """The objects of a shard; their names start with `stem`. The same shard gives the same bytes."""

    def decode(
        self, source: ShardBytes, stem: str, wanted: ShardArrays, size: ShardSize, selection: Selection
    ) -> StoredShard:
        """The selected documents of a shard of `size`, with the wanted arrays.

        Types, shapes and sizes are compared with what is expected before anything is allocated. Raises ValueError.
        """

    def columns_of(self, name: str, stem: str) -> frozenset[str]:
        """The columns that an object of a shard holds; none for what belongs to all of them."""

    def likely_chunks(
        self, name: str, stem: str, wanted: ShardArrays, record: ShardRecord, selection: Selection
    ) -> range:
        """Which parts of an object of several parts, the last of which is its index, hold the selected documents.

        A guess by how shards are written: it is made before the index is read.
        """


def shard_store(name: str) -> ShardStore:
    """The store of that name, a key of STORES."""
    return importlib.import_module(STORES[name])
