"""Values as float16, and the rules that every shard keeps.

Legend: T rows, K top-k ranks.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_caches import arrays_of, assert_stored, some_documents

from storage_specs import half
from storage_specs.column_building import columns_of
from storage_specs.column_rules import problem_of, size_problem
from storage_specs.columns import RowShape, ShardSize
from storage_specs.document import CachedDocument, Message, chat_document, text_document

SHAPE = RowShape(k=8, k_ids=4, vocab_size=300)
LARGE = 262_144


def naive_half(row_K: list[float], tail: float) -> tuple[list[float], float, float]:
    """(decoded values, decoded tail, L1 error) of one row: SPEC.md's words, one value at a time, in fp64."""
    total = sum(float(value) for value in row_K)
    scaled = [float(value) / max(total, 1.0) for value in row_K]
    decoded = [float(np.float16(value)) for value in scaled]
    if sum(decoded) > 1:
        below = [np.nextafter(np.float16(value), np.float16(0)) for value in scaled]
        decoded = [
            near if near <= value else float(under) for near, value, under in zip(decoded, scaled, below, strict=True)
        ]
    rest = 1 - sum(decoded)
    error = sum(abs(float(value) - found) for value, found in zip(row_K, decoded, strict=True)) + abs(rest - tail)
    return decoded, rest, error


def sorted_rows(rows: list[list[float]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distributions over the weights, their first k values sorted descending, and the tail."""
    weights_TV = np.array(rows, dtype=np.float64)
    probs_TV = weights_TV / weights_TV.sum(axis=1, keepdims=True)
    probs_TK = -np.sort(-probs_TV, axis=1)[:, :k].astype(np.float32)
    return probs_TK, np.clip(1 - probs_TK.sum(axis=1, dtype=np.float64), 0, 1).astype(np.float32)


def assert_valid(probs_TK: np.ndarray, tail_T: np.ndarray, bound: float) -> None:
    """Encode, decode, and hold the result against every promise of the format and the naive reference."""
    encoded = half.encode(probs_TK, tail_T)
    assert encoded.stored.dtype == np.float16
    assert half.problem_of(encoded.stored) is None
    decoded_TK, rest_T = half.decode(encoded.stored)
    assert decoded_TK.dtype == rest_T.dtype == np.float32
    assert (decoded_TK >= 0).all()
    assert (decoded_TK[:, 1:] <= decoded_TK[:, :-1]).all()
    assert (rest_T >= 0).all()
    assert np.array_equal(decoded_TK.sum(axis=1, dtype=np.float64) + rest_T, np.ones(len(rest_T)))
    found_T = np.abs(decoded_TK.astype(np.float64) - probs_TK).sum(axis=1) + np.abs(rest_T.astype(np.float64) - tail_T)
    np.testing.assert_allclose(encoded.l1_error, found_T, rtol=0, atol=1e-12)
    assert (encoded.l1_error <= bound).all()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 40).flatmap(
        lambda size: st.lists(
            st.lists(st.floats(1e-30, 1e6), min_size=size, max_size=size), min_size=1, max_size=4
        )
    ),
    k=st.integers(1, 40),
)  # fmt: skip
def test_random_rows_keep_every_promise(rows: list[list[float]], k: int) -> None:
    probs_TK, tail_T = sorted_rows(rows, min(k, len(rows[0])))
    assert_valid(probs_TK, tail_T, bound=2e-3)
    encoded = half.encode(probs_TK, tail_T)
    for row, (probs_K, tail) in enumerate(zip(probs_TK, tail_T, strict=True)):
        decoded, _, error = naive_half(probs_K.tolist(), float(tail))
        assert encoded.stored[row].tolist() == decoded
        assert encoded.l1_error[row] == pytest.approx(error, abs=1e-12)


EXTREME = {
    "one-hot": ([1.0, 0.0, 0.0], 0.0),
    "K = 1, certain": ([1.0], 0.0),
    "K = 1, unsure": ([0.3], 0.7),
    "tiny values": ([1e-10] * 64, 1.0),
    "one, and tiny ones": ([1.0] + [1e-10] * 63, 0.0),
    "nearly one": ([0.99991, 0.00009], 0.0),
    "rounds up past one": ([0.4999, 0.49985, 0.00025], 0.0),
    "float32 sum above one": ([0.5, 0.5, 1e-6], 0.0),
    "much above one": ([0.5005, 0.5], 0.0),
    "all zero": ([0.0, 0.0], 1.0),
    "equal values": ([0.125] * 8, 0.0),
    "below the smallest float16": ([2.0**-26] * 8, 1 - 2.0**-23),
}


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_rows_keep_every_promise(name: str) -> None:
    row, tail = EXTREME[name]
    assert_valid(np.array([row], dtype=np.float32), np.array([tail], dtype=np.float32), bound=2e-3)


def test_rows_as_long_as_the_vocabulary() -> None:
    random = np.random.default_rng(0)
    uniform_K = np.full(LARGE, 1 / LARGE)
    peaked_K = np.sort(random.dirichlet(np.full(LARGE, 0.01)))[::-1]
    zipf_K = 1 / np.arange(1, LARGE + 1)
    rows = np.stack([uniform_K, peaked_K, zipf_K / zipf_K.sum()]).astype(np.float32)
    # Every value below 2^-14 may be off by 2^-25, and the tail by their sum.
    assert_valid(rows, np.zeros(3, dtype=np.float32), bound=2 * LARGE * 2**-25)
    assert half.encode(rows[:1], np.zeros(1, dtype=np.float32)).l1_error[0] == 0  # 2^-18 is a float16


def test_no_rows() -> None:
    stored = half.encode(np.zeros((0, 8), np.float32), np.zeros(0, np.float32)).stored
    assert stored.shape == (0, 8)
    assert half.problem_of(stored) is None
    probs_TK, tail_T = half.decode(stored)
    assert (probs_TK.shape, tail_T.shape) == ((0, 8), (0,))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([0.5, -0.25], "negative"),
        ([0.5, np.nan], "not a number"),
        ([np.inf, 0.0], "above 1"),
        ([1.001, 0.0], "above 1"),
        ([0.25, 0.5], "not sorted"),
        ([0.5625, 0.5], "more than 1"),
    ],
)
def test_bad_stored_values_are_seen(row: list[float], problem: str) -> None:
    stored = np.array([[0.5, 0.25], row], dtype=np.float16)
    assert problem in half.problem_of(stored)


def test_documents_survive_their_columns() -> None:
    documents = some_documents(6)
    columns, l1_error_N = columns_of(documents, SHAPE)
    assert columns.size == ShardSize(
        documents=6, rows=len(l1_error_N), text_bytes=sum(len(document.text.encode()) for document in documents)
    )
    assert columns.segment.dtype == columns.byte_start.dtype == columns.token_ids.dtype == np.uint32
    for number, document in enumerate(documents):
        assert_stored(document, columns.document(number))
    assert np.diff(columns.row_offsets)[1] == 0


def test_a_document_does_not_share_memory_with_its_columns() -> None:
    columns, _ = columns_of(some_documents(2), SHAPE)
    for name, array in arrays_of(columns.document(0)).items():
        before = columns.document(0)
        array[...] = 0
        assert np.array_equal(getattr(columns.document(0), name), getattr(before, name))


def a_document() -> CachedDocument:
    return some_documents(1)[0]  # a chat: the user, then the assistant twice


def changed(name: str, row: object, value: object) -> CachedDocument:
    """A good document with one place of one array set to something else."""
    document = a_document()
    array = getattr(document, name).copy()
    array[row] = value
    return replace(document, **{name: array})


def longer(messages: tuple[Message, ...], by: int) -> tuple[Message, ...]:
    return (*messages[:-1], replace(messages[-1], byte_end=messages[-1].byte_end + by))


BAD = {
    "float64 probs": (lambda d: replace(d, probs=d.probs.astype(np.float64)), "probs must be float32"),
    "int32 segment": (lambda d: replace(d, segment=d.segment.astype(np.int32)), "segment must be int64"),
    "a list": (lambda d: replace(d, is_end=d.is_end.tolist()), r"is_end must be bool \(\d+,\), found list"),
    "one row less": (lambda d: replace(d, gold_logprob=d.gold_logprob[1:]), "gold_logprob must be float32"),
    "another k": (lambda d: replace(d, probs=d.probs[:, :7]), r"probs must be float32 \(\d+, 8\), found"),
    "no ids": (lambda d: replace(d, token_ids=None), "token_ids must be int64"),
    "tail bins": (lambda d: replace(d, tail_bins=d.probs), "tail_bins"),
    "nan": (lambda d: changed("probs", (0, 7), np.nan), "not finite"),
    "infinite tail": (lambda d: changed("tail_mass", 0, np.inf), "not finite"),
    "negative value": (lambda d: changed("probs", (0, 7), -1e-6), "negative"),
    "negative tail": (lambda d: changed("tail_mass", 0, -1e-6), "negative"),
    "unsorted": (lambda d: replace(d, probs=d.probs[:, ::-1].copy()), "not sorted"),
    "sums to more": (lambda d: changed("tail_mass", 0, 1.5), "sum to"),
    "logits, not probabilities": (lambda d: replace(d, probs=d.probs * 30), "sum to"),
    "gold of a masked token": (lambda d: changed("gold_logprob", 2, -np.inf), "row 2: its gold_logprob is -inf"),
    "gold above 0": (lambda d: changed("gold_logprob", 2, 0.5), "row 2: its gold_logprob is 0.5"),
    "negative id": (lambda d: changed("token_ids", (1, 1), -1), "token_ids holds -1"),
    "id beyond 32 bits": (lambda d: changed("token_ids", (1, 1), 2**32), "token_ids holds"),
    "id beyond the vocabulary": (lambda d: changed("token_ids", (1, 1), 300), "row 1: token id 300 in a vocabulary of"),
    "negative byte": (lambda d: changed("byte_start", 0, -1), "byte_start holds -1"),
    "no such message": (lambda d: changed("segment", 3, 3), "row 3: its segment is none"),
    "unscored message": (lambda d: changed("segment", 0, 0), "row 0: it lies in a message that is not scored"),
    "beyond its message": (lambda d: changed("byte_end", -1, 10**6), "its bytes lie outside its message"),
    "ends before it starts": (lambda d: changed("byte_end", 1, 0), "row 1: its bytes lie outside its message"),
    "end row with bytes": (lambda d: changed("is_end", 1, True), "row 1: it is an end row and covers bytes"),
    "overlap": (lambda d: changed("byte_start", 2, d.byte_start[1]), "row 2: it lies before the end of the row before"),
    "messages with a gap": (lambda d: replace(d, messages=d.messages[1:]), "without gaps"),
    "messages too short": (lambda d: replace(d, messages=longer(d.messages, -1)), "messages cover|inside a character"),
    "messages too long": (lambda d: replace(d, messages=longer(d.messages, 1)), "messages cover"),
    "a lone surrogate": (lambda d: replace(d, text=d.text[:-1] + "\ud800"), "surrogates"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_documents_are_refused_with_their_place(name: str) -> None:
    change, message = BAD[name]
    good = a_document()
    columns_of([good], SHAPE)
    with pytest.raises(ValueError, match=message):
        columns_of([good, change(good)], SHAPE)


def test_ids_where_none_are_kept() -> None:
    with pytest.raises(ValueError, match="token_ids must be None"):
        columns_of([a_document()], replace(SHAPE, k_ids=0))


def test_messages_end_at_characters() -> None:
    document = some_documents(2)[1]
    split = (
        Message(role="a", byte_start=0, byte_end=1, scored=False),
        Message(role="b", byte_start=1, byte_end=2, scored=False),
    )
    with pytest.raises(ValueError, match="inside a character, at byte 1"):
        columns_of([replace(document, text="é", messages=split)], SHAPE)


def test_one_byte_belongs_to_two_messages() -> None:
    """Rows at the end of one turn and at the start of the next share a byte, not a place."""
    document = chat_document([{"role": "assistant", "content": "ab"}, {"role": "assistant", "content": "cd"}])
    one = some_documents(2)[1]
    rows = {
        "segment": np.array([0, 0, 1]),
        "byte_start": np.array([0, 2, 2]),
        "byte_end": np.array([2, 2, 4]),
        "is_end": np.array([False, True, False]),
        "gold_logprob": np.zeros(3, np.float32),
        "tail_mass": np.zeros(3, np.float32),
        "probs": np.tile(np.eye(8, dtype=np.float32)[0], (3, 1)),
        "token_ids": np.zeros((3, 4), np.int64),
    }
    good = replace(one, kind="chat", text=document.text, messages=document.messages, **rows)
    columns, _ = columns_of([good], SHAPE)
    assert_stored(good, columns.document(0))
    back = {"segment": np.array([0, 1, 0]), "byte_end": np.array([2, 2, 2]), "is_end": np.array([False, False, True])}
    with pytest.raises(ValueError, match="row 2: it lies before"):
        columns_of([replace(good, **back)], SHAPE)


def test_rows_of_another_document_may_start_again() -> None:
    documents = some_documents(6)
    columns, _ = columns_of([documents[0], *documents[:3]], SHAPE)
    assert problem_of(columns, SHAPE) is None


def test_size_limits() -> None:
    assert size_problem(ShardSize(documents=1, rows=2**31 // 64, text_bytes=0), replace(SHAPE, k=64)) is not None
    assert size_problem(ShardSize(documents=1, rows=0, text_bytes=2**31), SHAPE) is not None
    assert (
        size_problem(ShardSize(documents=1, rows=2**31 // 64 - 1, text_bytes=2**31 - 1), replace(SHAPE, k=64)) is None
    )


def test_text_document_without_text() -> None:
    nothing = replace(some_documents(2)[1], text="", messages=text_document("").messages)
    columns, _ = columns_of([nothing], SHAPE)
    assert_stored(nothing, columns.document(0))
