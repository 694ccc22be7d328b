"""The rules of a shard. The writer refuses documents that break them; the reader refuses shards that do.

Legend: D documents of a shard, T rows of one document, N rows of a shard, K top-k ranks, M messages of a shard.
"""

from collections.abc import Sequence

import numpy as np

from storage_specs.codecs.base import RowValues, refuse_bad
from storage_specs.columns import Columns, RowShape
from storage_specs.document import CachedDocument, Document
from storage_specs.stored_shard import ShardSize

GOLD_LIMIT = 1e-3  # nats; float32 softmax may put a log-probability a little above 0
MOST_PER_SHARD = 2**31 - 1  # values (rows * k), and bytes of text: what Parquet's lists and strings can hold


def size_problem(size: ShardSize, shape: RowShape) -> str | None:
    """Whether a shard is too large to be written or read."""
    if size.rows * shape.k > MOST_PER_SHARD or size.text_bytes > MOST_PER_SHARD:
        return f"{size} with k {shape.k}: more than {MOST_PER_SHARD} values or bytes of text; use smaller shards"
    return None


def problem_of(columns: Columns, vocab_size: int, *, text: bool = True) -> str | None:
    """What makes documents and rows no valid shard, if anything: the rules that hold for every shard ever written.

    The values' own rules are the codec's (`Codec.problem_of`). text: whether the documents have theirs.
    """
    problem = message_problem(columns.documents, text=text)
    return problem or _place_problem(columns) or _scalar_problem(columns, vocab_size)


def input_problem(document: CachedDocument, shape: RowShape) -> str | None:
    """What in a document's arrays cannot be stored, if anything. `problem_of` checks the rest, on columns."""
    rows = len(document.segment)
    expected = {
        "segment": ((rows,), np.int64),
        "byte_start": ((rows,), np.int64),
        "byte_end": ((rows,), np.int64),
        "is_end": ((rows,), np.bool_),
        "gold_logprob": ((rows,), np.float32),
    }
    if shape.k_ids:
        expected["token_ids"] = ((rows, shape.k_ids), np.int64)
    elif document.token_ids is not None:
        return "token_ids must be None where k_ids is 0"
    for name, (array_shape, dtype) in expected.items():
        array = getattr(document, name)
        if not isinstance(array, np.ndarray) or array.shape != array_shape or array.dtype != dtype:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            return f"{name} must be {np.dtype(dtype)} {array_shape}, found {found}"
    for name in ("segment", "byte_start", "byte_end", "token_ids"):
        array = getattr(document, name)
        if array is not None and array.size and not 0 <= array.min() <= array.max() < 2**32:
            return f"{name} holds {array.min()} to {array.max()}, outside 0 to 2^32 - 1"
    try:
        values = RowValues(probs=document.probs, tail_mass=document.tail_mass, tail_bins=document.tail_bins)
        refuse_bad(values, shape.k, shape.bins)
    except ValueError as error:
        return str(error)
    return None if len(document.probs) == rows else f"probs must have {rows} rows, found {len(document.probs)}"


def message_problem(documents: Sequence[Document], *, text: bool = True) -> str | None:
    """Messages must tile the text at character boundaries: then (segment, byte) names one place.

    Where the documents are without `text`, messages must still follow one another.
    """
    for number, document in enumerate(documents):
        data, position = document.text.encode(), 0
        for message in document.messages:
            if message.byte_start != position or message.byte_end < position:
                return f"document {number}: messages do not follow one another without gaps"
            position = message.byte_end
            if position < len(data) and data[position] & 0xC0 == 0x80:
                return f"document {number}: a message ends inside a character, at byte {position}"
        if not text and (data or document.metadata):
            return f"document {number}: it has text or metadata, in a cache without"
        if text and position != len(data):
            return f"document {number}: messages cover {position} bytes of a text of {len(data)}"
    return None


def _place_problem(columns: Columns) -> str | None:
    """Rows must lie in scored messages, in text order, without overlap."""
    if len(columns.segment) == 0:
        return None
    rows_D = np.diff(columns.row_offsets)
    messages = [message for document in columns.documents for message in document.messages]
    count_D = np.array([len(document.messages) for document in columns.documents], dtype=np.int64)
    stray_N = columns.segment >= np.repeat(count_D, rows_D)
    if stray_N.any():
        return _at(columns, stray_N, "its segment is none of the document's messages")
    message_N = columns.segment + np.repeat(np.cumsum(count_D) - count_D, rows_D)
    start_M, end_M, scored_M = (
        np.array([getattr(message, name) for message in messages]) for name in ("byte_start", "byte_end", "scored")
    )
    start_N, end_N = columns.byte_start, columns.byte_end
    back_N = np.zeros(len(start_N), dtype=bool)
    back_N[1:] = (start_N[1:] < end_N[:-1]) | (message_N[1:] < message_N[:-1])
    back_N[columns.row_offsets[:-1][rows_D > 0]] = False  # a document's first row follows none
    rules = {
        "it lies in a message that is not scored": ~scored_M[message_N],
        "its bytes lie outside its message": (
            (start_N > end_N) | (start_N < start_M[message_N]) | (end_N > end_M[message_N])
        ),
        "it is an end row and covers bytes": columns.is_end & (start_N != end_N),
        "it lies before the end of the row before it": back_N,
    }
    return next((_at(columns, bad_N, rule) for rule, bad_N in rules.items() if bad_N.any()), None)


def _at(columns: Columns, bad_N: np.ndarray, problem: str) -> str:
    """The problem of the first bad row, with its place."""
    row = int(bad_N.argmax())
    number = int(np.searchsorted(columns.row_offsets, row, side="right")) - 1
    return f"document {number}, row {row - columns.row_offsets[number]}: {problem}"


def _scalar_problem(columns: Columns, vocab_size: int) -> str | None:
    gold_N, ids_NI = columns.gold_logprob, columns.token_ids
    bad_N = ~np.isfinite(gold_N) | (gold_N > GOLD_LIMIT)
    if bad_N.any():
        return _at(columns, bad_N, f"its gold_logprob is {gold_N[bad_N.argmax()]}, not finite or above 0")
    if ids_NI is not None and ids_NI.size and ids_NI.max() >= vocab_size:
        bad_N = (ids_NI >= vocab_size).any(axis=1)
        return _at(columns, bad_N, f"token id {ids_NI.max()} in a vocabulary of {vocab_size}")
    return None
