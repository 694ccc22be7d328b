"""The profile `sketch` against its definition in whole numbers and fractions, and against whole distributions."""

from fractions import Fraction

import numpy as np
import pytest
from codec_rows import WEIGHTS, assert_problems, assert_promises, distributions, sketch_rows, sketched
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from storage_specs.codecs import Codec, RowValues, codec_of
from storage_specs.errors import ConfigError
from storage_specs.sketch import expand_sorted, log_rank_edges


def sketch(edges: np.ndarray, step_bits: int = 11) -> Codec:
    return codec_of("sketch", k=int(edges[0]), parameters={"rank_edges": edges.tolist(), "step_bits": step_bits})


def naive_decode(columns: list[int], k: int, bins: int, steps: int) -> tuple[list[Fraction], list[Fraction]]:
    """SPEC.md's words, one number at a time: head and bins."""
    bends = [z // 2 if z % 2 == 0 else -(z + 1) // 2 for z in columns[:bins]]
    masses = [0] * (bins + 2)
    for j in reversed(range(bins)):
        masses[j] = (bends[j] + 2 * masses[j + 1] - masses[j + 2]) % 2**16
    masses = masses[:bins]
    assert min(masses) >= 0
    fall = {rank: columns[bins + rank - 2] for rank in range(2, k + 1)}
    fall[1] = steps - sum(masses) - sum(rank * drop for rank, drop in fall.items())
    assert fall[1] >= 0
    head = [Fraction(sum(drop for rank, drop in fall.items() if rank >= at), steps) for at in range(1, k + 1)]
    return head, [Fraction(mass, steps) if mass else Fraction(1, 2**21 * bins) for mass in masses]


def assert_as_naive(values: RowValues, codec: Codec) -> None:
    decoded = assert_promises(codec, values)
    arrays = codec.encode(values)
    for row, columns in enumerate(arrays["sketch"].tolist()):
        head, bins = naive_decode(columns, codec.k, codec.bins, codec.steps)
        assert [Fraction(float(value)) for value in decoded.probs[row]] == head
        np.testing.assert_allclose(decoded.tail_bins[row], [float(mass) for mass in bins], rtol=1e-7)
        assert decoded.tail_mass[row] == pytest.approx(float(sum(bins)), rel=1e-6)
        assert abs(sum(head) + sum(bins) - 1) <= Fraction(1, 2**21)


@settings(max_examples=150, deadline=None)
@given(weights=WEIGHTS, k=st.integers(1, 40), bins=st.integers(1, 24), step_bits=st.integers(8, 15))
def test_random_rows_keep_every_promise(weights: list[list[float]], k: int, bins: int, step_bits: int) -> None:
    vocab_size = len(weights[0])
    assume(k < vocab_size)
    weights_NV = np.array(weights)
    sorted_NV = -np.sort(-weights_NV / weights_NV.sum(axis=1, keepdims=True), axis=1)
    edges = log_rank_edges(k, vocab_size, bins)
    assert_as_naive(sketched(sorted_NV, edges), sketch(edges, step_bits))


EXTREME = {
    "one-hot": [1.0] + [0.0] * 299,
    "uniform": [1 / 300] * 300,
    "all mass in the last bin's reach": [0.5] + [0.5 / 299] * 299,
    "half and half": [0.5, 0.5] + [0.0] * 298,
    "denormal tail": [1.0] + [1e-40] * 299,
    "a cliff": [1 / 40] * 40 + [0.0] * 260,
}


@pytest.mark.parametrize("k", [1, 2, 16, 299])
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_rows_keep_every_promise(name: str, k: int) -> None:
    edges = log_rank_edges(k, 300, 20)
    values = sketched(np.array([EXTREME[name]]), edges)
    assert_as_naive(values, sketch(edges))
    decoded = sketch(edges).decode(sketch(edges).encode(values))
    whole_1V = expand_sorted(decoded.probs, decoded.tail_bins, edges)
    assert (np.diff(whole_1V, axis=1) <= 0).all()
    assert (whole_1V >= 0).all()
    np.testing.assert_allclose(whole_1V.sum(axis=1), 1, rtol=0, atol=2e-6)


def test_rows_that_are_off_in_sum() -> None:
    edges = np.array([2, 10, 300])
    for total in (0.9991, 1.0009):
        values = RowValues(
            probs=np.array([[0.5, 0.2]], np.float32) * np.float32(total),
            tail_mass=np.array([0.3], np.float32) * np.float32(total),
            tail_bins=np.array([[0.25, 0.05]], np.float32) * np.float32(total),
        )
        assert_as_naive(values, sketch(edges))


def test_a_whole_distribution_survives_as_a_sum_over_ranks_sees_it() -> None:
    """|p - q| summed over the vocabulary, for q of another temperature: the sketch moves it by less than 2e-3."""
    sorted_NV = distributions(200, 4000)
    other_NV = sorted_NV**1.15
    other_NV /= other_NV.sum(axis=1, keepdims=True)
    edges = log_rank_edges(16, 4000, 20)
    codec = sketch(edges)
    decoded = codec.decode(codec.encode(sketched(sorted_NV, edges)))
    whole_NV = expand_sorted(decoded.probs, decoded.tail_bins, edges)
    exact_N = np.abs(sorted_NV - other_NV).sum(axis=1)
    error_N = np.abs(np.abs(whole_NV - other_NV).sum(axis=1) - exact_N)
    assert exact_N.mean() > 0.05
    assert error_N.mean() < 2e-3


def test_no_rows() -> None:
    edges = log_rank_edges(16, 4000, 20)
    decoded = assert_promises(sketch(edges), sketch_rows(3, 16).rows(slice(0, 0)))
    assert (decoded.probs.shape, decoded.tail_mass.shape, decoded.tail_bins.shape) == ((0, 16), (0,), (0, 20))


def test_bad_stored_values_are_seen() -> None:
    def put(column: int, value: int):
        return lambda arrays: arrays["sketch"].__setitem__((3, column), value)

    words = "sum to more than 2048"
    changes = {
        "a drop": (put(-1, 129), words),  # 16 of them are 2064
        "a large drop": (put(-1, 65535), words),
        "a bend": (put(19, 2000), words),
        "a negative bin": (put(19, 1), words),  # -1 is 65535
        "everything": (lambda arrays: arrays["sketch"].fill(65535), words),
    }
    edges = log_rank_edges(16, 4000, 20)
    assert_problems(sketch(edges), sketch_rows(5, 16), changes)


@settings(max_examples=100, deadline=None)
@given(columns=st.lists(st.integers(0, 300) | st.integers(0, 65535), min_size=7, max_size=7))
def test_whatever_has_no_problem_decodes_to_a_distribution(columns: list[int]) -> None:
    codec = sketch(np.array([4, 10, 30, 70, 300]))
    arrays = {"sketch": np.array([columns], np.uint16)}
    bends = [z // 2 if z % 2 == 0 else -(z + 1) // 2 for z in columns[:4]]
    masses = [0] * 6
    for j in reversed(range(4)):
        masses[j] = (bends[j] + 2 * masses[j + 1] - masses[j + 2]) % 2**16
    total = sum(mass % 2**16 for mass in masses) + sum(i * d for i, d in enumerate(columns[4:], 2))
    assert (codec.problem_of(arrays) is None) == (total <= 2048)
    if total <= 2048:
        decoded = codec.decode(arrays)
        assert (decoded.probs >= 0).all()
        assert (np.diff(decoded.probs, axis=1) <= 0).all()
        assert decoded.probs.sum(dtype=np.float64) + decoded.tail_mass[0] == pytest.approx(1, abs=1e-6)


BAD = {
    "too few": ((8,), "must ascend from k"),
    "another k": ((9, 20, 300), "must ascend from k"),
    "not ascending": ((8, 20, 20, 300), "must ascend from k"),
    "too many": (tuple(range(8, 8 + 258)), "1 to 256 bins"),
    "fractions": ((8, 20.0, 300), "whole numbers"),
    "no list": ("8", "whole numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_edges_that_cannot_be(name: str) -> None:
    edges, words = BAD[name]
    with pytest.raises(ConfigError, match=words):
        codec_of("sketch", k=8, parameters={"rank_edges": edges})


@pytest.mark.parametrize("step_bits", [7, 16, 11.0, "11", True])
def test_steps_that_cannot_be(step_bits: object) -> None:
    with pytest.raises(ConfigError, match="must be from 8 to 15"):
        codec_of("sketch", k=8, parameters={"rank_edges": [8, 300], "step_bits": step_bits})


def test_golden_bytes() -> None:
    """0.5, 0.25 and bins of 0.125, 0.125, 0: steps 1024, 512, 256, 256, 0; bends -256, 256, 0; d_2 512."""
    values = RowValues(
        probs=np.array([[0.5, 0.25]], np.float32),
        tail_mass=np.array([0.25], np.float32),
        tail_bins=np.array([[0.125, 0.125, 0.0]], np.float32),
    )
    codec = sketch(np.array([2, 5, 20, 100]))
    assert codec.encode(values)["sketch"].tolist() == [[511, 512, 0, 512]]
    assert codec.encode(values)["sketch"].tobytes().hex() == "ff01" + "0002" + "0000" + "0002"
    empty = 2**-21 / 3
    np.testing.assert_allclose(codec.decode(codec.encode(values)).tail_bins, [[0.125, 0.125, empty]], rtol=1e-7)
