"""Scored documents become a shard's columns, if they keep the rules.

Legend: N rows of a shard.
"""

from collections.abc import Sequence

import numpy as np

from storage_specs import half
from storage_specs.column_rules import input_problem, message_problem, problem_of, size_problem
from storage_specs.columns import Columns, RowShape
from storage_specs.document import CachedDocument


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
