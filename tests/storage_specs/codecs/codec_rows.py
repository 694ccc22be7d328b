"""Rows for the codecs' tests, and the promises that every profile keeps for every row.

Legend: N rows, K head values, J tail bins, V words.
"""

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from storage_specs.codecs import Codec, RowValues, encode_measured
from storage_specs.codecs.base import DECODED_TOLERANCE
from storage_specs.sketch import bin_masses, log_rank_edges

# weights of 1 to 4 rows over up to 40 words, and k
WEIGHTS = st.integers(1, 40).flatmap(
    lambda size: st.lists(st.lists(st.floats(1e-30, 1e6), min_size=size, max_size=size), min_size=1, max_size=4)
)

# name -> head and tail
EXTREME = {
    "one-hot": ([1.0, 0.0, 0.0], 0.0),
    "K = 1, certain": ([1.0], 0.0),
    "K = 1, unsure": ([0.3], 0.7),
    "tiny values": ([1e-10] * 64, 1.0),
    "denormal values": ([1.0, 1e-40, 1e-42, 1e-45], 0.0),
    "one, and tiny ones": ([1.0] + [1e-10] * 63, 0.0),
    "nearly one": ([0.99991, 0.00009], 0.0),
    "rounds up past one": ([0.4999, 0.49985, 0.00025], 0.0),
    "float32 sum above one": ([0.5, 0.5, 1e-6], 0.0),
    "much above one": ([0.5005, 0.5], 0.0),
    "much below one": ([0.5, 0.25], 0.2491),
    "all zero": ([0.0, 0.0], 1.0),
    "equal values": ([0.125] * 8, 0.0),
    "equal values, all just below half a step": ([0.4999 / 2**13] * 64, 1 - 64 * 0.4999 / 2**13),
    "equal values, all just above half a step": ([0.5001 / 2**13] * 64, 1 - 64 * 0.5001 / 2**13),
    "below the smallest float16": ([2.0**-26] * 8, 1 - 2.0**-23),
}


def sorted_rows(weights: list[list[float]], k: int) -> RowValues:
    """Distributions over the weights: their first k values sorted descending, and the tail."""
    weights_NV = np.array(weights, dtype=np.float64)
    probs_NV = weights_NV / weights_NV.sum(axis=1, keepdims=True)
    probs_NK = -np.sort(-probs_NV, axis=1)[:, :k].astype(np.float32)
    tail_N = np.clip(1 - probs_NK.sum(axis=1, dtype=np.float64), 0, 1).astype(np.float32)
    return RowValues(probs=probs_NK, tail_mass=tail_N)


def one_row(head: list[float], tail: float) -> RowValues:
    return RowValues(probs=np.array([head], np.float32), tail_mass=np.array([tail], np.float32))


def teacher_rows(rows: int, k: int, vocab_size: int = 4000, seed: int = 0) -> RowValues:
    """Rows of a softmax over normal logits of varying temperature: from certain to nearly uniform."""
    return sorted_rows(distributions(rows, vocab_size, seed).tolist(), k)


def distributions(rows: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """(rows, vocab_size) float64, sorted descending, of all temperatures."""
    random = np.random.default_rng(seed)
    logits_NV = random.normal(size=(rows, vocab_size)) * random.uniform(0.5, 6, size=(rows, 1))
    weights_NV = np.exp(logits_NV - logits_NV.max(axis=1, keepdims=True))
    return -np.sort(-weights_NV / weights_NV.sum(axis=1, keepdims=True), axis=1)


def sketch_rows(rows: int, k: int, vocab_size: int = 4000, bins: int = 20) -> RowValues:
    return sketched(distributions(rows, vocab_size), log_rank_edges(k, vocab_size, bins))


def sketched(sorted_NV: np.ndarray, rank_edges: np.ndarray) -> RowValues:
    """Head and bins of whole sorted distributions."""
    probs_NK = sorted_NV[:, : rank_edges[0]].astype(np.float32)
    tail_N = np.clip(1 - probs_NK.sum(axis=1, dtype=np.float64), 0, 1).astype(np.float32)
    bins_NJ = bin_masses(sorted_NV, rank_edges).astype(np.float32)
    return RowValues(probs=probs_NK, tail_mass=tail_N, tail_bins=bins_NJ)


def assert_promises(codec: Codec, values: RowValues) -> RowValues:
    """Encode, decode, and hold the result against every promise of the format."""
    arrays, error_N = encode_measured(codec, values)
    specs = codec.arrays()
    assert list(arrays) == [spec.name for spec in specs]
    for spec in specs:
        assert arrays[spec.name].dtype == spec.dtype
        assert arrays[spec.name].shape == (len(values.probs), *([] if spec.width is None else [spec.width]))
    assert codec.problem_of(arrays) is None
    decoded = codec.decode(arrays)
    assert_valid(decoded)
    assert decoded.probs.shape == values.probs.shape
    off_N = np.abs(values.probs.sum(axis=1, dtype=np.float64) + values.tail_mass - 1)
    assert (error_N <= codec.max_l1_error + off_N + 2.0**-23).all()
    rest, found = [
        (row.tail_mass if row.tail_bins is None else row.tail_bins).astype(np.float64) for row in (values, decoded)
    ]
    naive_N = np.abs(decoded.probs.astype(np.float64) - values.probs).sum(axis=1)
    naive_N += np.abs(rest - found).sum(axis=tuple(range(1, rest.ndim)))
    np.testing.assert_allclose(error_N, naive_N, rtol=0, atol=1e-12)
    assert_repeatable(codec, values, arrays, decoded)
    return decoded


def assert_valid(decoded: RowValues) -> None:
    parts = [array for array in (decoded.probs, decoded.tail_mass, decoded.tail_bins) if array is not None]
    for array in parts:
        assert array.dtype == np.float32
        assert (array >= 0).all()
    assert (np.diff(decoded.probs, axis=1) <= 0).all()
    total_N = decoded.probs.sum(axis=1, dtype=np.float64) + decoded.tail_mass
    np.testing.assert_allclose(total_N, 1, rtol=0, atol=DECODED_TOLERANCE)
    if decoded.tail_bins is not None:
        bins_N = decoded.tail_bins.sum(axis=1, dtype=np.float64)
        np.testing.assert_allclose(bins_N, decoded.tail_mass, rtol=0, atol=DECODED_TOLERANCE)


def assert_repeatable(codec: Codec, values: RowValues, arrays: dict, decoded: RowValues) -> None:
    """Bit for bit: encoding again, slices, and arrays that a store hands back in column-major order."""
    for name, array in codec.encode(values).items():
        assert array.tobytes() == arrays[name].tobytes()
    rows = slice(len(values.probs) // 3, len(values.probs))
    for name, array in codec.encode(values.rows(rows)).items():
        assert np.array_equal(array, arrays[name][rows])
    columns = {name: np.asfortranarray(array) for name, array in arrays.items()}
    assert codec.problem_of(columns) is None
    for found, expected in (
        (codec.decode(columns), decoded),
        (codec.decode({name: array[rows] for name, array in arrays.items()}), decoded.rows(rows)),
        (codec.decode({name: array[rows] for name, array in columns.items()}), decoded.rows(rows)),
    ):
        for name in ("probs", "tail_mass", "tail_bins"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (one is None) == (other is None)
            assert one is None or one.tobytes() == other.tobytes()


def assert_problems(
    codec: Codec, values: RowValues, changes: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]]
) -> None:
    """Every change of good arrays is seen, and told in the words given."""
    for name, (change, words) in changes.items():
        arrays = codec.encode(values)
        assert codec.problem_of(arrays) is None
        change(arrays)
        problem = codec.problem_of(arrays)
        assert problem is not None, name
        assert words in problem, name
