"""Places and ids as a shard's arrays, and the L1 errors of its record, against one-row-at-a-time references."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_specs import ids, places
from storage_specs.l1_errors import L1Errors


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**31), st.integers(0, 2**20)), max_size=6), max_size=5
    )
)
def test_places_are_what_they_were(documents: list[list[tuple[int, int, int]]]) -> None:
    """Documents of rows (segments further on, bytes left out, bytes covered)."""
    rows = []
    for document in documents:
        segment = end = 0
        for step, gap, length in document:
            segment, start = segment + step, end + gap
            end = start + length
            if end >= 2**32:
                break
            rows.append((segment, start, end))
    document_rows = np.array([len(document) for document in documents], np.int64)
    if document_rows.sum() != len(rows):
        return
    segment_N, start_N, end_N = np.array(rows, np.int64).reshape(-1, 3).T
    arrays = places.encode(segment_N, start_N, end_N, document_rows)
    flat = [row for document in documents for row in document]
    assert arrays["segment_step"].tolist() == [row[0] for row in flat]
    assert arrays["gap"].tolist() == [row[1] for row in flat]
    assert arrays["length"].tolist() == [row[2] for row in flat]
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.uint32)}
    for found, expected in zip(places.decode(arrays, document_rows), (segment_N, start_N, end_N), strict=True):
        assert np.array_equal(found, expected)


def naive_words(token_ids: np.ndarray, probs: np.ndarray) -> list[int]:
    """The words of a shard as SPEC.md orders them."""
    counts: dict[int, int] = {}
    for row, (row_ids, row_probs) in enumerate(zip(token_ids.tolist(), probs.tolist(), strict=True)):
        for rank, (token, prob) in enumerate(zip(row_ids, row_probs, strict=True)):
            if prob > 0 or rank == 0:
                counts[token] = counts.get(token, 0) + 1
        assert row >= 0
    return sorted(counts, key=lambda token: (-(counts[token].bit_length() - 1), token))


@pytest.mark.parametrize("rows", [0, 1, 40, 3000])
@pytest.mark.parametrize("vocab_size", [3, 300, 2**32])
def test_ids_are_what_they_were(rows: int, vocab_size: int) -> None:
    random = np.random.default_rng(rows)
    token_ids = (random.pareto(0.3, (rows, 5)) * 3).astype(np.float64).clip(0, vocab_size - 1).astype(np.int64)
    probs = -np.sort(-random.random((rows, 5)), axis=1)
    probs[random.random((rows, 5)) < 0.2] = 0
    arrays, steps = ids.encode(token_ids, probs.copy())
    assert {name: array.dtype for name, array in arrays.items()} == {"id_low": np.uint8, "id_high": np.uint16}
    assert np.cumsum(steps, dtype=np.uint32).tolist() == naive_words(token_ids, probs)
    expected = np.where(probs > 0, token_ids, token_ids[:, :1])
    assert np.array_equal(ids.decode(arrays, steps, vocab_size), expected)


def test_ids_that_cannot_be_are_refused() -> None:
    arrays, steps = ids.encode(np.array([[5, 7], [7, 9]]), np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="token id 9 in a vocabulary of 9"):
        ids.decode(arrays, steps, 9)
    with pytest.raises(ValueError, match="has the code 3 of 2 words"):
        ids.decode(arrays, steps[:2], 300)
    with pytest.raises(ValueError, match="no first id"):
        ids.decode(arrays | {"id_low": np.array([[1, 2], [0, 2]], np.uint8)}, steps, 300)


def test_l1_errors_are_merged_and_their_percentiles_are_near() -> None:
    random = np.random.default_rng(0)
    parts = [random.exponential(1e-3, size) for size in (1, 1000, 30_000)]
    merged = L1Errors.merged(L1Errors.from_json(L1Errors.of(part).to_json()) for part in parts)
    together = np.concatenate(parts)
    assert merged.rows == len(together)
    assert merged.max == together.max()
    assert merged.mean == pytest.approx(together.mean(), rel=1e-12)
    for share in (0.01, 0.5, 0.99, 1.0):
        exact = np.quantile(together, share, method="inverted_cdf")
        assert exact <= merged.percentile(share) <= exact * 2 ** (1 / 8)


def test_l1_errors_of_nothing() -> None:
    nothing = L1Errors.of(np.zeros(0))
    assert (nothing.rows, nothing.max, nothing.mean, nothing.percentile(0.99)) == (0, 0, 0, 0)
    assert L1Errors.merged([]) == nothing
    exact = L1Errors.of(np.zeros(7))
    assert (exact.rows, exact.max, exact.percentile(0.5)) == (7, 0, 0)
    with pytest.raises(ValueError, match="L1 errors are"):
        L1Errors.from_json({"max": -1, "sum": 0, "histogram": []})
