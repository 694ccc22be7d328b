"""A shard in memory, or some documents of one, in the types that readers get.

Documents one after the other; their rows one after the other in flat arrays, cut by offsets.

Legend: D documents, T rows of one document, N rows of all of them, K top-k ranks, J tail bins, I ranks whose ids are
kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from storage_specs.codecs import codec_of
from storage_specs.codecs.base import Codec
from storage_specs.document import CachedDocument, Document

_ROW_ARRAYS = ("segment", "byte_start", "byte_end", "is_end", "gold_logprob", "tail_mass", "probs")
_OPTIONAL_ROW_ARRAYS = ("token_ids", "tail_bins")


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """What every row of a cache has: k sorted values, the ids of the first k_ids ranks, ids below vocab_size.

    profile and parameters: the value codec that stores them, as `codec_of` takes them.
    """

    k: int
    k_ids: int
    vocab_size: int
    profile: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def codec(self) -> Codec:
        return codec_of(self.profile, k=self.k, parameters=self.parameters)

    @property
    def bins(self) -> int | None:
        """Bins of the tail, where the profile keeps them."""
        edges = self.rank_edges
        return None if edges is None else len(edges) - 1

    @property
    def rank_edges(self) -> tuple[int, ...] | None:
        """Ranks between which the bins lie, the first k, the last vocab_size."""
        return getattr(self.codec, "rank_edges", None)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """documents: D of them. row_offsets: (D + 1,) int64; document d has the rows row_offsets[d] to row_offsets[d + 1].

    segment, byte_start, byte_end: (N,) int64. is_end: (N,) bool. gold_logprob, tail_mass: (N,) float32. probs: (N, K)
    float32. token_ids: (N, I) int64, or None. tail_bins: (N, J) float32, or None.
    """

    documents: tuple[Document, ...]
    row_offsets: np.ndarray
    segment: np.ndarray
    byte_start: np.ndarray
    byte_end: np.ndarray
    is_end: np.ndarray
    gold_logprob: np.ndarray
    tail_mass: np.ndarray
    probs: np.ndarray
    token_ids: np.ndarray | None = None
    tail_bins: np.ndarray | None = None

    def document(self, number: int) -> CachedDocument:
        """One document with its rows; its arrays are copies."""
        rows = slice(*self.row_offsets[number : number + 2])
        present = [*_ROW_ARRAYS, *(name for name in _OPTIONAL_ROW_ARRAYS if getattr(self, name) is not None)]
        return CachedDocument(
            **{item.name: getattr(self.documents[number], item.name) for item in fields(Document)},
            **{name: getattr(self, name)[rows].copy() for name in present},
        )
