"""The profile `compact` against its definition in Python's whole numbers and fractions."""

from fractions import Fraction

import numpy as np
import pytest
from codec_rows import EXTREME, WEIGHTS, assert_problems, assert_promises, one_row, sorted_rows, teacher_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_specs.codecs import Codec, RowValues, codec_of, encode_measured
from storage_specs.codecs.steps import apportion
from storage_specs.errors import ConfigError


def compact(k: int, step_bits: int = 13) -> Codec:
    return codec_of("compact", k=k, parameters={"step_bits": step_bits})


def naive_decode(arrays: dict[str, np.ndarray], row: int, k: int, steps: int) -> tuple[list[Fraction], Fraction]:
    """SPEC.md's words, one number at a time."""
    pairs = zip(arrays["steps_low"][row].tolist(), arrays["steps_high"][row].tolist(), strict=True)
    columns = [low + 256 * high for low, high in pairs]
    columns += arrays["steps_deep"][row].tolist() if "steps_deep" in arrays else []
    tail, drops = columns[0], {rank: columns[rank - 1] for rank in range(2, k + 1)}
    drops[1] = steps - tail - sum(rank * drop for rank, drop in drops.items())
    assert drops[1] >= 0
    head = [sum(drop for rank, drop in drops.items() if rank >= at) for at in range(1, k + 1)]
    return [Fraction(value, steps) for value in head], Fraction(tail, steps)


def naive_apportion(parts: list[Fraction], steps: int) -> list[int]:
    exact = [part / sum(parts) * steps for part in parts]
    whole = [int(value) for value in exact]
    order = sorted(range(len(parts)), key=lambda n: (whole[n] - exact[n], n))
    for n in order[: steps - sum(whole)]:
        whole[n] += 1
    return whole


def assert_as_naive(values: RowValues, step_bits: int) -> None:
    k, steps = values.probs.shape[1], 1 << step_bits
    codec = compact(k, step_bits)
    decoded = assert_promises(codec, values)
    arrays = codec.encode(values)
    for row, (probs_K, tail) in enumerate(zip(decoded.probs, decoded.tail_mass, strict=True)):
        head, rest = naive_decode(arrays, row, k, steps)
        assert [Fraction(float(value)) for value in probs_K] == head
        assert Fraction(float(tail)) == rest
        assert sum(head) + rest == 1
        parts = [Fraction(float(value)) for value in (*values.probs[row], values.tail_mass[row])]
        found = [int(value * steps) for value in (*head, rest)]
        # the naive one breaks ties exactly, the codec after float64 division: the same total distance is what counts
        distance = [
            sum(abs(part / sum(parts) * steps - n) for part, n in zip(parts, numbers, strict=True))
            for numbers in (found, naive_apportion(parts, steps))
        ]
        assert distance[0] - distance[1] < Fraction(1, 10**6)
        assert distance[0] <= Fraction(k + 1, 2)


@settings(max_examples=150, deadline=None)
@given(weights=WEIGHTS, k=st.integers(1, 40), step_bits=st.integers(8, 15))
def test_random_rows_keep_every_promise(weights: list[list[float]], k: int, step_bits: int) -> None:
    assert_as_naive(sorted_rows(weights, min(k, len(weights[0]))), step_bits)


@pytest.mark.parametrize("step_bits", [8, 13, 15])
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_rows_keep_every_promise(name: str, step_bits: int) -> None:
    assert_as_naive(one_row(*EXTREME[name]), step_bits)


@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 64, 300])
def test_rows_of_every_width(k: int) -> None:
    assert_promises(compact(k), teacher_rows(40, k))


def test_the_bound_is_reached_and_not_passed() -> None:
    """All remainders one half: as far from whole numbers as a row of this length can be."""
    values = one_row([*[32.5 / 2**13] * 63, (2**13 - 63 * 32.5) / 2**13][::-1], 0.0)
    codec = compact(64)
    error = encode_measured(codec, values)[1][0]
    assert error == pytest.approx(codec.max_l1_error, rel=0.05)
    assert error <= codec.max_l1_error == 32.5 / 2**13


def test_rows_as_long_as_the_vocabulary() -> None:
    large = 262_144
    zipf_K = 1 / np.arange(1, large + 1)
    peaked_K = np.sort(np.random.default_rng(0).dirichlet(np.full(large, 0.01)))[::-1]
    rows_NK = np.stack([np.full(large, 1 / large), zipf_K / zipf_K.sum(), peaked_K]).astype(np.float32)
    assert_promises(compact(large), RowValues(probs=rows_NK, tail_mass=np.zeros(3, np.float32)))


def test_all_blocks_decode_alike() -> None:
    values = teacher_rows(500, 300)
    codec = compact(300)
    arrays = codec.encode(values)
    whole = codec.decode(arrays)
    for row in (0, 217, 218, 219, 437, 499):  # 218 rows are one block
        alone = codec.decode({name: array[row : row + 1] for name, array in arrays.items()})
        assert alone.probs.tobytes() == whole.probs[row].tobytes()


def test_no_rows() -> None:
    decoded = assert_promises(compact(64), teacher_rows(3, 64).rows(slice(0, 0)))
    assert (decoded.probs.shape, decoded.tail_mass.shape) == ((0, 64), (0,))


def test_apportion_keeps_order_among_equals() -> None:
    assert apportion(np.full((1, 4), 0.25), 10).tolist() == [[3, 3, 2, 2]]
    assert apportion(np.array([[0.55, 0.45], [1.0, 0.0]]), 10).tolist() == [[6, 4], [10, 0]]


def test_bad_stored_values_are_seen() -> None:
    def put(name: str, column: int, value: int):
        return lambda arrays: arrays[name].__setitem__((3, column), value)

    words = "sum to more than 8192"
    changes = {
        "tail": (put("steps_high", 0, 33), words),
        "drop": (put("steps_high", 31, 2), words),
        "deep drop": (put("steps_deep", 31, 255), words),
        "everything": (lambda arrays: [array.fill(255) for array in arrays.values()], words),
    }
    assert_problems(compact(64), teacher_rows(5, 64), changes)
    wide = compact(262_144)
    arrays = {spec.name: np.full((1, spec.width), 255, np.uint8) for spec in wide.arrays()}
    assert words in wide.problem_of(arrays)


def test_one_step_too_many_is_seen_and_the_last_one_is_not() -> None:
    codec = compact(40)
    arrays = {spec.name: np.zeros((2, spec.width), np.uint8) for spec in codec.arrays()}
    arrays["steps_deep"][0, 7] = 204  # rank 40: 8160 steps, and 32 to go
    arrays["steps_low"][0, 0] = 32
    assert codec.problem_of(arrays) is None
    assert codec.decode(arrays).probs[0].tolist() == [204 / 8192] * 40
    assert codec.decode(arrays).probs[1].tolist() == [1.0] + [0.0] * 39
    arrays["steps_low"][0, 0] = 33
    assert codec.problem_of(arrays) is not None


@pytest.mark.parametrize("step_bits", [7, 16, 13.0, "13", True])
def test_steps_that_cannot_be(step_bits: object) -> None:
    with pytest.raises(ConfigError, match="must be from 8 to 15"):
        codec_of("compact", k=8, parameters={"step_bits": step_bits})


def test_golden_bytes() -> None:
    """0.5, 0.25, 0.125 and a tail of 0.125: t = 1024, d_2 = 1024, d_3 = 1024."""
    arrays = compact(3).encode(one_row([0.5, 0.25, 0.125], 0.125))
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "steps_low": [[0, 0, 0]],
        "steps_high": [[4, 4, 4]],
    }
    arrays = compact(34).encode(one_row([0.5, *[1 / 256] * 33], 0.5 - 33 / 256))
    assert arrays["steps_low"].tobytes().hex() == "e0" + "00" * 31
    assert arrays["steps_high"].tobytes().hex() == "0b" + "00" * 31
    assert arrays["steps_deep"].tobytes().hex() == "0020"
