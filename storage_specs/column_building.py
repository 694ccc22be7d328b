"""Scored documents become a shard's columns, if they keep the rules."""

from collections.abc import Sequence

import numpy as np

from storage_specs.column_rules import input_problem, message_problem, problem_of, size_problem
from storage_specs.columns import Columns, RowShape
from storage_specs.document import CachedDocument
from storage_specs.stored_shard import ShardSize


def columns_of(documents: Sequence[CachedDocument], shape: RowShape) -> Columns:
    """The columns of a shard. Raises ValueError, naming document and cause, for documents that break the rules."""
    for number, document in enumerate(documents):
        problem = input_problem(document, shape)
        if problem:
            raise ValueError(f"document {number}: {problem}")
    problem = message_problem(documents)  # before doc_ids, which cut the text there
    if problem:
        raise ValueError(problem)

    def joined(name: str, dtype: type, width: int | None = None) -> np.ndarray:
        empty = np.zeros((0,) if width is None else (0, width), dtype)
        return np.concatenate([empty, *(getattr(document, name) for document in documents)])

    columns = Columns(
        documents=tuple(documents),
        row_offsets=np.cumsum([0, *(len(document.segment) for document in documents)], dtype=np.int64),
        segment=joined("segment", np.int64),
        byte_start=joined("byte_start", np.int64),
        byte_end=joined("byte_end", np.int64),
        is_end=joined("is_end", np.bool_),
        gold_logprob=joined("gold_logprob", np.float32),
        tail_mass=joined("tail_mass", np.float32),
        probs=joined("probs", np.float32, shape.k),
        token_ids=joined("token_ids", np.int64, shape.k_ids) if shape.k_ids else None,
        tail_bins=None if shape.bins is None else joined("tail_bins", np.float32, shape.bins),
    )
    size = ShardSize(
        documents=len(documents),
        rows=len(columns.segment),
        text_bytes=sum(len(document.text.encode()) for document in documents),
    )
    problem = size_problem(size, shape) or problem_of(columns, shape.vocab_size)
    if problem:
        raise ValueError(problem)
    return columns
