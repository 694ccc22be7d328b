"""A shard's rows as the named arrays that stores keep, and back: places, gold log-probabilities, values, ids.

Legend: D documents of a shard, N rows of a shard, I ranks whose ids are kept, W distinct ids of a shard.
"""

import numpy as np

from storage_specs import ids, places
from storage_specs.codecs import encode_measured
from storage_specs.codecs.base import ArraySpec, RowValues
from storage_specs.columns import Columns, RowShape
from storage_specs.stored_shard import ShardArrays, StoredShard

IS_END = ArraySpec(name="is_end", dtype=np.dtype(np.bool_), width=None, rank_major=False)
GOLD_LOGPROB = ArraySpec(name="gold_logprob", dtype=np.dtype(np.float32), width=None, rank_major=False)
# Steps of 2^-10 nats, off by at most 4.9e-4 nats: far below what an engine's own arithmetic costs (design.md: 0.02).
GOLD_STEPS = ArraySpec(name="gold_steps", dtype=np.dtype(np.uint32), width=None, rank_major=False)
STEPS_PER_NAT = 1024


def arrays_of(shape: RowShape, rows: int, *, with_ids: bool = True) -> ShardArrays:
    """The arrays of a shard of so many rows, in storage order, those of the ids last."""
    gold = GOLD_LOGPROB if shape.profile == "exact" else GOLD_STEPS
    plain = (*places.ARRAYS, IS_END, gold, *shape.codec.arrays())
    if not with_ids or not shape.k_ids:
        return ShardArrays(arrays=plain, tables={})
    most = min(rows * shape.k_ids, shape.vocab_size)
    return ShardArrays(arrays=(*plain, *ids.arrays(shape.k_ids)), tables={ids.TABLE: most})


def id_columns(shape: RowShape) -> frozenset[str]:
    """The columns that only a reader of ids opens."""
    return arrays_of(shape, 0).names - arrays_of(shape, 0, with_ids=False).names


def encode(columns: Columns, shape: RowShape) -> tuple[StoredShard, np.ndarray]:
    """The stored shard, and the L1 error (N,) float64 that storing each row's values cost. Raises ValueError."""
    document_rows_D = np.diff(columns.row_offsets)
    values = RowValues(probs=columns.probs, tail_mass=columns.tail_mass, tail_bins=columns.tail_bins)
    value_arrays, l1_error_N = encode_measured(shape.codec, values)
    arrays = places.encode(columns.segment, columns.byte_start, columns.byte_end, document_rows_D)
    arrays["is_end"] = columns.is_end
    gold_N = np.minimum(columns.gold_logprob, 0)
    if shape.profile == "exact":
        arrays["gold_logprob"] = gold_N
    else:
        steps_N = np.rint(-gold_N.astype(np.float64) * STEPS_PER_NAT)
        if (steps_N >= 2**32).any():
            raise ValueError(f"gold_logprob is {gold_N.min()}, too far below 0 to be stored")
        arrays["gold_steps"] = steps_N.astype(np.uint32)
    arrays |= value_arrays
    tables = {}
    if columns.token_ids is not None:
        stored_NI = shape.codec.decode(value_arrays).probs[:, : shape.k_ids]
        id_arrays, tables[ids.TABLE] = ids.encode(columns.token_ids, stored_NI)
        arrays |= id_arrays
    shard = StoredShard(documents=columns.documents, document_rows=document_rows_D, arrays=arrays, tables=tables)
    return shard, l1_error_N


def decode(shard: StoredShard, shape: RowShape) -> Columns:
    """The columns of a stored shard, or of some documents of one. Raises ValueError for arrays that cannot be."""
    arrays, id_steps_W = shard.arrays, shard.tables.get(ids.TABLE)
    problem = shape.codec.problem_of(arrays)
    if problem:
        raise ValueError(problem)
    segment_N, byte_start_N, byte_end_N = places.decode(arrays, shard.document_rows)
    values = shape.codec.decode(arrays)
    exact = shape.profile == "exact"
    return Columns(
        documents=shard.documents,
        row_offsets=np.concatenate([[0], np.cumsum(shard.document_rows)]).astype(np.int64),
        segment=segment_N,
        byte_start=byte_start_N,
        byte_end=byte_end_N,
        is_end=arrays["is_end"],
        gold_logprob=arrays["gold_logprob"] if exact else (arrays["gold_steps"] / -STEPS_PER_NAT).astype(np.float32),
        tail_mass=values.tail_mass,
        probs=values.probs,
        token_ids=None if id_steps_W is None else ids.decode(arrays, id_steps_W, shape.vocab_size),
        tail_bins=values.tail_bins,
    )
