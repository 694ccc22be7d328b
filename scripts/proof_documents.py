"""What a cell of scripts/proof.py learns from: a cache decoded once, and views of it with other rows, ids or documents.

The product reads what these views give as it reads any cache; nothing of it knows that it is measured.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache as cached

import numpy as np

from distill import CachedDocuments
from storage_specs.checksum import crc32c
from storage_specs.columns import Columns
from storage_specs.document import CachedDocument
from storage_specs.reader import Cache
from storage_specs.writer import CacheSettings, encoded_shard

# What a row says; everything else of it says where it stands.
CONTENT = ("gold_logprob", "tail_mass", "probs", "token_ids", "tail_bins")


class View(Cache):
    """An open cache, seen otherwise. Its shards are decoded at most once, however many views of it are trained on.

    k_ids: only the ids of so many ranks. fraction: only that share of the documents to train on, the same for every
    view; documents held out stay. shuffled: the rows of each document at other places of it, by its number and nothing
    else; rows at the end of a message, which stand where no other may, stay.
    """

    def __init__(self, cache: Cache, k_ids: int, fraction: float = 1.0, shuffled: bool = False) -> None:
        if k_ids > cache.manifest.k_ids:
            raise ValueError(f"k_ids is {k_ids}, but the cache holds the ids of {cache.manifest.k_ids} ranks")
        vars(self).update(vars(cache))
        self.manifest = replace(cache.manifest, k_ids=k_ids)
        self.with_ids = k_ids > 0
        self.k_ids, self.shuffled = k_ids, shuffled
        self._held: OrderedDict[int, Columns] = OrderedDict()  # not the other's, whose rows are others
        left_out_D = ~cache.held_out_D & (_drawn(cache) >= fraction)
        self.rows_D = np.where(left_out_D, 0, cache.rows_D)  # documents without rows are not trained on
        self._decoded = cached(cache.read_columns) if not isinstance(cache, View) else cache._decoded
        self._seen: dict[int, Columns] = {}

    def read_columns(self, shard: int) -> Columns:
        if shard not in self._seen:
            columns = self._decoded(shard)
            ids = None if columns.token_ids is None else columns.token_ids[:, : self.k_ids]
            columns = replace(columns, token_ids=ids)
            self._seen[shard] = shuffled_rows(columns, shard) if self.shuffled else columns
        return self._seen[shard]


def shuffled_rows(columns: Columns, seed: int) -> Columns:
    """The same shard, the rows of each document (but those at the end of a message) permuted among its places."""
    order_N = np.arange(len(columns.segment))
    random = np.random.default_rng(seed)
    for first, last in zip(columns.row_offsets[:-1], columns.row_offsets[1:], strict=True):
        moved = first + np.flatnonzero(~columns.is_end[first:last])
        order_N[moved] = random.permutation(moved)
    present = [name for name in CONTENT if getattr(columns, name) is not None]
    return replace(columns, **{name: getattr(columns, name)[order_N] for name in present})


def _drawn(cache: Cache) -> np.ndarray:
    """(D,) float64 in [0, 1): a number for each document that its text alone decides."""
    return np.array([crc32c(b"share" + doc_id.encode()) for doc_id in cache.doc_ids]) / 2**32


def bytes_per_row(view: Cache) -> float:
    """What a row of a cache costs on disk, text and all: its first shard, encoded as a build would."""
    manifest = view.manifest
    settings = CacheSettings(
        **{name: getattr(manifest, name) for name in ("teacher", "tokenizer", "chat_template", "engine", "windows")},
        **{name: getattr(manifest, name) for name in ("k", "k_ids", "vocab_size", "store")},
        vocabulary=view.vocabulary if manifest.k_ids else None,
    )
    columns = view.read_columns(0)
    documents = [columns.document(number) for number in range(len(columns.documents))]
    _, contents = encoded_shard(0, documents, settings, tuple(document.doc_id for document in documents))
    return sum(map(len, contents.values())) / len(columns.segment)


def held_out_halves(cache: Cache, test: int) -> tuple[list[CachedDocument], list[CachedDocument]]:
    """(validation, test) of the held-out documents, every other one; at most `test` of each."""
    documents = CachedDocuments(cache, held_out=True)
    halves: Sequence[list[CachedDocument]] = ([], [])
    for number in range(min(len(documents), 2 * test)):
        halves[number % 2].append(documents[number])
    return halves[0], halves[1]
