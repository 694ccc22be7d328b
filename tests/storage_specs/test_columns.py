"""The rules that every shard keeps."""

from dataclasses import replace

import numpy as np
import pytest
from small_caches import arrays_of, assert_stored, some_documents

from storage_specs import row_coding
from storage_specs.column_building import columns_of
from storage_specs.column_rules import problem_of, size_problem
from storage_specs.columns import RowShape
from storage_specs.document import CachedDocument, Message, chat_document, text_document
from storage_specs.stored_shard import ShardSize

SHAPE = RowShape(k=8, k_ids=4, vocab_size=300, profile="half")


def test_documents_survive_their_columns() -> None:
    documents = some_documents(6)
    columns = columns_of(documents, SHAPE)
    stored, l1_error_N = row_coding.encode(columns, SHAPE)
    text_bytes = sum(len(document.text.encode()) for document in documents)
    assert stored.size == ShardSize(documents=6, rows=len(l1_error_N), text_bytes=text_bytes)
    read = row_coding.decode(stored, SHAPE)
    for number, document in enumerate(documents):
        assert_stored(document, read.document(number))
    assert np.diff(columns.row_offsets)[1] == 0


def test_a_document_does_not_share_memory_with_its_columns() -> None:
    columns = columns_of(some_documents(2), SHAPE)
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
    "one row of values less": (lambda d: replace(d, probs=d.probs[1:], tail_mass=d.tail_mass[1:]), "probs must have"),
    "tail bins": (lambda d: replace(d, tail_bins=d.probs), "tail_bins are given"),
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
    columns = columns_of([good], SHAPE)
    assert_stored(good, columns.document(0))
    back = {"segment": np.array([0, 1, 0]), "byte_end": np.array([2, 2, 2]), "is_end": np.array([False, False, True])}
    with pytest.raises(ValueError, match="row 2: it lies before"):
        columns_of([replace(good, **back)], SHAPE)


def test_rows_of_another_document_may_start_again() -> None:
    documents = some_documents(6)
    columns = columns_of([documents[0], *documents[:3]], SHAPE)
    assert problem_of(columns, SHAPE.vocab_size) is None


def test_size_limits() -> None:
    assert size_problem(ShardSize(documents=1, rows=2**31 // 64, text_bytes=0), replace(SHAPE, k=64)) is not None
    assert size_problem(ShardSize(documents=1, rows=0, text_bytes=2**31), SHAPE) is not None
    assert (
        size_problem(ShardSize(documents=1, rows=2**31 // 64 - 1, text_bytes=2**31 - 1), replace(SHAPE, k=64)) is None
    )


def test_text_document_without_text() -> None:
    nothing = replace(some_documents(2)[1], text="", messages=text_document("").messages)
    columns = columns_of([nothing], SHAPE)
    assert_stored(nothing, columns.document(0))
