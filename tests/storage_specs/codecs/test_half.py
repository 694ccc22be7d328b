"""The profile `half` against its definition, one value at a time in fp64."""

import numpy as np
import pytest
from codec_rows import EXTREME, WEIGHTS, assert_problems, assert_promises, one_row, sorted_rows, teacher_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_specs.codecs import RowValues, codec_of, encode_measured

LARGE = 262_144


def naive(row_K: list[float]) -> tuple[list[float], float]:
    """(decoded values, decoded tail) of one row: SPEC.md's words, one value at a time, in fp64."""
    total = sum(float(value) for value in row_K)
    scaled = [float(value) / max(total, 1.0) for value in row_K]
    decoded = [float(np.float16(value)) for value in scaled]
    if sum(decoded) > 1:
        below = [np.nextafter(np.float16(value), np.float16(0)) for value in scaled]
        decoded = [
            near if near <= value else float(under) for near, value, under in zip(decoded, scaled, below, strict=True)
        ]
    return decoded, 1 - sum(decoded)


def assert_as_naive(values: RowValues) -> None:
    decoded = assert_promises(codec_of("half", k=values.probs.shape[1]), values)
    for row, probs_K in enumerate(values.probs):
        head, tail = naive(probs_K.tolist())
        assert decoded.probs[row].tolist() == head
        assert decoded.tail_mass[row] == tail
        assert decoded.probs[row].sum(dtype=np.float64) + decoded.tail_mass[row] == 1


@settings(max_examples=200, deadline=None)
@given(weights=WEIGHTS, k=st.integers(1, 40))
def test_random_rows_keep_every_promise(weights: list[list[float]], k: int) -> None:
    assert_as_naive(sorted_rows(weights, min(k, len(weights[0]))))


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_rows_keep_every_promise(name: str) -> None:
    assert_as_naive(one_row(*EXTREME[name]))


def test_rows_as_long_as_the_vocabulary() -> None:
    peaked_K = np.sort(np.random.default_rng(0).dirichlet(np.full(LARGE, 0.01)))[::-1]
    zipf_K = 1 / np.arange(1, LARGE + 1)
    rows_NK = np.stack([np.full(LARGE, 1 / LARGE), peaked_K, zipf_K / zipf_K.sum()]).astype(np.float32)
    values = RowValues(probs=rows_NK, tail_mass=np.zeros(3, np.float32))
    codec = codec_of("half", k=LARGE)
    assert_promises(codec, values)
    error_N = encode_measured(codec, values)[1]
    assert error_N[0] == 0  # 2^-18 is a float16
    assert (error_N < 2 * LARGE * 2**-25).all()  # a value below 2^-14 is off by 2^-25, and the tail by their sum


def test_no_rows() -> None:
    decoded = assert_promises(codec_of("half", k=8), teacher_rows(3, 8).rows(slice(0, 0)))
    assert (decoded.probs.shape, decoded.tail_mass.shape) == ((0, 8), (0,))


@pytest.mark.parametrize(
    ("drops", "problem"),
    [
        ([0x3C00, 1], "above 1"),
        ([0, 0x7E00], "not a number"),
        ([0x8000, 1], "above 1"),
        ([0xFFFF, 0xFFFF], "above 1"),
        ([1, 0x3800], "sum to more than 1"),
    ],
)
def test_bad_stored_values_are_seen(drops: list[int], problem: str) -> None:
    change = lambda arrays: arrays["prob_drops"].__setitem__(1, drops)  # noqa: E731
    assert_problems(codec_of("half", k=2), teacher_rows(2, 2), {"row": (change, problem)})


def test_golden_bytes() -> None:
    """0.625, 0.25, 0.125 are 3900, 3400, 3000; three times 1/3 is 3555."""
    values = sorted_rows([[5, 2, 1], [1, 1, 1]], 3)
    stored = codec_of("half", k=3).encode(values)["prob_drops"]
    assert stored.tobytes().hex() == "000500040030" + "000000005535"
