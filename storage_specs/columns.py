"""The columns of a shard: what both stores hold, whatever their bytes look like.

Documents one after the other; their rows one after the other in flat arrays, cut by offsets.

Legend: D documents of a shard, T rows of one document, N rows of a shard, K top-k ranks, I ranks whose ids are kept.
"""

from dataclasses import dataclass, fields

import numpy as np

from storage_specs import half
from storage_specs.document import CachedDocument, Document


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """What every row of a cache has: k sorted values, the ids of the first k_ids ranks, ids below vocab_size."""

    k: int
    k_ids: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class ShardSize:
    """How much a shard holds: documents, rows, and bytes of text (UTF-8). Known before anything is decoded."""

    documents: int
    rows: int
    text_bytes: int


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A shard in memory.

    documents: D of them. doc_ids: as stored, hex. row_offsets: (D + 1,) int64; the rows of document d are
    row_offsets[d] to row_offsets[d + 1]. segment, byte_start, byte_end: (N,) uint32. is_end: (N,) bool.
    gold_logprob: (N,) float32. probs: (N, K) float16 (`half`). token_ids: (N, I) uint32, or None.
    """

    documents: tuple[Document, ...]
    doc_ids: tuple[str, ...]
    row_offsets: np.ndarray
    segment: np.ndarray
    byte_start: np.ndarray
    byte_end: np.ndarray
    is_end: np.ndarray
    gold_logprob: np.ndarray
    probs: np.ndarray
    token_ids: np.ndarray | None

    @property
    def text_bytes(self) -> np.ndarray:
        """(D,) int64: UTF-8 bytes of each document's text."""
        return np.array([len(document.text.encode()) for document in self.documents], dtype=np.int64)

    @property
    def size(self) -> ShardSize:
        return ShardSize(documents=len(self.documents), rows=len(self.segment), text_bytes=int(self.text_bytes.sum()))

    def document(self, number: int) -> CachedDocument:
        """One document with its rows, in the types that readers get: float32 and int64."""
        rows = slice(*self.row_offsets[number : number + 2])
        probs_TK, tail_T = half.decode(self.probs[rows])
        return CachedDocument(
            **{item.name: getattr(self.documents[number], item.name) for item in fields(Document)},
            segment=self.segment[rows].astype(np.int64),
            byte_start=self.byte_start[rows].astype(np.int64),
            byte_end=self.byte_end[rows].astype(np.int64),
            is_end=self.is_end[rows].copy(),
            gold_logprob=self.gold_logprob[rows].copy(),
            tail_mass=tail_T,
            probs=probs_TK,
            token_ids=None if self.token_ids is None else self.token_ids[rows].astype(np.int64),
        )
