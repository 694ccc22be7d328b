"""A cache's documents as a map-style dataset: training and held-out documents apart, numbered shard after shard."""

from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from storage_specs.document import CachedDocument
from storage_specs.reader import Cache, open_cache


class CachedDocuments(Dataset[CachedDocument]):
    """The documents of a cache that may be trained on, or with `held_out` those that never are.

    Documents without a single teacher row are left out of both. Items are decoded and verified when asked for; the
    cache keeps the last few shards. `cache` is an open cache, or its folder or URL, of which ids are read only with
    `ids`. Raises what `open_cache` raises.
    """

    def __init__(self, cache: Cache | str | Path, held_out: bool = False, ids: bool = False) -> None:
        self.cache = cache if isinstance(cache, Cache) else open_cache(cache, ids=ids)
        shard_of = np.repeat(np.arange(len(self.cache.documents_per_shard)), self.cache.documents_per_shard)
        self.numbers = np.flatnonzero((self.cache.rows_D > 0) & (self.cache.held_out_D == held_out))
        self.documents_per_shard: list[int] = np.bincount(
            shard_of[self.numbers], minlength=len(self.cache.documents_per_shard)
        ).tolist()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> CachedDocument:
        return self.cache.streamed(int(self.numbers[index]))
