"""The columns of a shard: what both stores hold, whatever their bytes look like.

Documents one after the other; their rows one after the other in flat arrays, cut by offsets.

Legend: D documents of a shard, T rows of one document, N rows of a shard, K top-k ranks, I ranks whose ids are kept,
M messages of a shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from storage_specs import half
from storage_specs.column_rules import input_problem, message_problem, problem_of, size_problem
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


def columns_of(documents: Sequence[CachedDocument], shape: RowShape) -> tuple[Columns, np.ndarray]:
    """The columns of a shard, and the L1 error (N,) float64 that storing each row's values cost.

    Raises ValueError, naming document and cause, for documents that break the format's rules.
    """
    for number, document in enumerate(documents):
        problem = input_problem(document, shape)
        if problem:
            raise ValueError(f"document {number}: {problem}")
    problem = message_problem(documents)  # before doc_ids, which cut the text there
    if problem:
        raise ValueError(problem)
    values = half.encode(
        _joined([document.probs for document in documents], (0, shape.k), np.float32),
        _joined([document.tail_mass for document in documents], (0,), np.float32),
    )
    ids = [document.token_ids for document in documents if document.token_ids is not None]
    columns = Columns(
        documents=tuple(documents),
        doc_ids=tuple(document.doc_id for document in documents),
        row_offsets=np.cumsum([0, *(len(document.segment) for document in documents)], dtype=np.int64),
        segment=_joined([document.segment for document in documents], (0,), np.uint32),
        byte_start=_joined([document.byte_start for document in documents], (0,), np.uint32),
        byte_end=_joined([document.byte_end for document in documents], (0,), np.uint32),
        is_end=_joined([document.is_end for document in documents], (0,), np.bool_),
        gold_logprob=_joined([document.gold_logprob for document in documents], (0,), np.float32),
        probs=values.stored,
        token_ids=_joined(ids, (0, shape.k_ids), np.uint32) if shape.k_ids else None,
    )
    problem = size_problem(columns.size, shape) or problem_of(columns, shape)
    if problem:
        raise ValueError(problem)
    return columns, values.l1_error


def _joined(parts: list[np.ndarray], empty: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(empty, dtype)
