"""The profile `exact`: the teacher's own bits, and what gives way where they are no distribution."""

import numpy as np
import pytest
from codec_rows import EXTREME, WEIGHTS, assert_problems, assert_promises, one_row, sorted_rows, teacher_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_specs.codecs import RowValues, codec_of, encode_measured


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, k=st.integers(1, 40))
def test_rows_come_back_bit_for_bit(weights: list[list[float]], k: int) -> None:
    values = sorted_rows(weights, min(k, len(weights[0])))
    codec = codec_of("exact", k=values.probs.shape[1])
    decoded = assert_promises(codec, values)
    assert decoded.probs.tobytes() == values.probs.tobytes()
    assert decoded.tail_mass.tobytes() == values.tail_mass.tobytes()
    assert (encode_measured(codec, values)[1] == 0).all()


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_rows_keep_every_promise(name: str) -> None:
    head, tail = EXTREME[name]
    values = one_row(head, tail)
    decoded = assert_promises(codec_of("exact", k=len(head)), values)
    if sum(head) <= 1:
        assert decoded.probs.tobytes() == values.probs.tobytes()


def test_what_is_off_in_sum_is_paid_by_the_tail_then_by_the_head() -> None:
    codec = codec_of("exact", k=2)
    below = codec.decode(codec.encode(one_row([0.5, 0.25], 0.2491)))
    assert (below.probs.tolist(), below.tail_mass.tolist()) == ([[0.5, 0.25]], [0.25])
    above = codec.decode(codec.encode(one_row([0.625, 0.3755], 0.0)))
    np.testing.assert_allclose(above.probs, [[0.625 / 1.0005, 0.3755 / 1.0005]], rtol=1e-7)
    assert above.tail_mass.tolist() == [0]


def test_a_softmax_over_a_whole_vocabulary_in_float32() -> None:
    logits_V = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    weights_V = np.sort(np.exp(logits_V))[::-1]
    probs_1V = (weights_V / weights_V.sum(dtype=np.float32))[None]
    assert_promises(codec_of("exact", k=200_000), RowValues(probs=probs_1V, tail_mass=np.zeros(1, np.float32)))


def test_no_rows() -> None:
    decoded = assert_promises(codec_of("exact", k=8), teacher_rows(3, 8).rows(slice(0, 0)))
    assert (decoded.probs.shape, decoded.tail_mass.shape) == ((0, 8), (0,))


def test_bad_stored_values_are_seen() -> None:
    def put(name: str, place: object, value: float):
        return lambda arrays: arrays[name].__setitem__(place, value)

    assert_problems(
        codec_of("exact", k=4),
        teacher_rows(5, 4),
        {
            "not a number": (put("prob_drops", (2, 3), 0x7FC00000), "not a number"),
            "infinite": (put("prob_drops", (2, 0), 0x7F800000), "above 1"),
            "negative": (put("prob_drops", (2, 3), 0x80000001), "above 1"),
            "a sum beyond 32 bits": (put("prob_drops", slice(None), 0xFFFFFFFF), "above 1"),
            "negative tail": (put("tail_mass", 2, -1e-9), "negative"),
            "nan tail": (put("tail_mass", 4, np.nan), "not a number"),
            "infinite tail": (put("tail_mass", 4, np.inf), "do not sum to 1"),
            "too much": (put("tail_mass", 0, 1.1), "do not sum to 1"),
            "too little": (put("prob_drops", (1, slice(None)), 0), "do not sum to 1"),
        },
    )


def test_golden_bytes() -> None:
    """0.75, 0.25 and no tail: bits 3f400000 and 3e800000."""
    arrays = codec_of("exact", k=2).encode(one_row([0.75, 0.25], 0.0))
    assert arrays["prob_drops"].tobytes().hex() == "0000c000" + "0000803e"
    assert arrays["tail_mass"].tobytes().hex() == "00000000"


def test_values_are_copies() -> None:
    codec, values = codec_of("exact", k=8), teacher_rows(3, 8)
    arrays = codec.encode(values)
    codec.decode(arrays).probs[...] = 0
    codec.decode(arrays).tail_mass[...] = 0
    assert codec.decode(arrays).probs.tobytes() == values.probs.tobytes()
    assert codec.decode(arrays).tail_mass.tobytes() == values.tail_mass.tobytes()
