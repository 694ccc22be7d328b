"""Text to token ids and the bytes that each token stands for, from ONE encoding.

Most text needs no offsets at all: where the tokens' own bytes, joined, are the text, every span follows from their
lengths, also for tokens that end inside a character. Only where the tokenizer altered the text (normalised,
lower-cased, dropped something) are its character offsets used to find the way back (`span_alignment`).

Legend: T tokens of one text.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from storage_specs.errors import TokenizerError
from storage_specs.span_alignment import aligned_spans
from storage_specs.token_table import TokenTable, token_table

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True)
class Encoding:
    """One text's tokens. ids: (T,) int64. spans: (T, 2) int64, byte start and end in the text's UTF-8 bytes."""

    ids: np.ndarray
    spans: np.ndarray


def byte_spans(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = True) -> list[np.ndarray]:
    """The spans of `encode` alone: one (T, 2) int64 array per text."""
    return [encoding.spans for encoding in encode(tokenizer, texts, add_special_tokens)]


def encode(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = True) -> list[Encoding]:
    """Ids and byte spans of every text; `tokenizer` is a transformers fast tokenizer or a bare `tokenizers.Tokenizer`.

    Spans refer to the ORIGINAL text's UTF-8 bytes. They are ordered, do not overlap, and cover every byte that the
    tokenizer kept exactly once; a token may end inside a character. What the tokenizer dropped (WordPiece's spaces,
    bytes outside a vocabulary) is in no span. What it invented (a prefix space, special tokens that it added) has zero
    width. Where normalisation made several tokens of one character so that no byte of it belongs to any of them, the
    first of them has the whole character. Special tokens written out in a text are tokens of that text.
    Truncation and padding set on the tokenizer are not applied.

    Raises TokenizerError for a tokenizer without a fast backend, for text that is not Unicode (lone surrogates), and
    where no correct spans can be given.
    """
    texts = list(texts)
    table = token_table(tokenizer)
    data = [_utf8(text) for text in texts]
    with _whole_texts(table.backend) as backend:
        # Without offsets encoding is faster, and most tokenizers need none; the others are asked for them at once.
        first = backend.encode_batch_fast if table.keeps_text else backend.encode_batch
        encoded = first(texts, add_special_tokens=add_special_tokens)
        ids = [np.array(one.ids, dtype=np.int64) for one in encoded]
        added = [np.array(one.special_tokens_mask, dtype=bool) for one in encoded]
        spans = [_exact_spans(table, *one) for one in zip(ids, added, data, strict=True)]
        altered = [number for number, found in enumerate(spans) if found is None]
        dropped = {number: table.dropped_in_front(texts[number]) for number in altered}
        again = [number for number in altered if table.keeps_text or dropped[number]]
        clean = [_without(texts[number], dropped[number]) for number in again]
        for number, one in zip(again, backend.encode_batch(clean, add_special_tokens=add_special_tokens), strict=True):
            _check_same_ids(texts[number], ids[number], one.ids)
            encoded[number] = one
    for number in altered:
        offsets_T2 = _offsets(encoded[number], dropped[number], len(texts[number]))
        spans[number] = aligned_spans(table, texts[number], data[number], ids[number], added[number], offsets_T2)
    for text_bytes, spans_T2 in zip(data, spans, strict=True):
        _check(spans_T2, text_bytes)
    return [Encoding(ids_T, spans_T2) for ids_T, spans_T2 in zip(ids, spans, strict=True)]


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text with a lone surrogate at character {error.start} has no UTF-8 bytes: repair it or leave it out"
        ) from None


@contextmanager
def _whole_texts(backend: "tokenizers.Tokenizer") -> Iterator["tokenizers.Tokenizer"]:
    """The backend without truncation and padding, which are put back afterwards."""
    truncation, padding = backend.truncation, backend.padding
    try:
        if truncation is not None:
            backend.no_truncation()
        if padding is not None:
            backend.no_padding()
        yield backend
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _without(text: str, places: Sequence[int]) -> str:
    """`text` without the characters at `places`.

    Where a normalizer drops the first characters it sees (T5 and control characters), the tokenizers library takes all
    offsets behind them from a place that is too early; so these characters are left out beforehand.
    """
    if not places:
        return text
    left_out = set(places)
    return "".join(character for n, character in enumerate(text) if n not in left_out)


def _check_same_ids(text: str, ids_T: np.ndarray, again: list[int]) -> None:
    if again != ids_T.tolist():
        raise TokenizerError(
            f"text {text[:40]!r} is tokenised otherwise without the control characters that the tokenizer drops, "
            "so its tokens have no sure bytes: clean the text, or leave it out"
        )


def _offsets(encoded: "tokenizers.Encoding", left_out: Sequence[int], characters: int) -> np.ndarray:
    """(T, 2) int64 character offsets in the whole text, of an encoding made without the characters `left_out`."""
    offsets_T2 = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2)
    if not left_out:
        return offsets_T2
    places_C = np.append(np.setdiff1d(np.arange(characters), left_out), characters)
    first_T, last_T = offsets_T2.T
    ends_T = np.where(last_T > first_T, places_C[np.maximum(last_T - 1, 0)] + 1, places_C[first_T])
    return np.stack([places_C[first_T], ends_T], axis=1)


def _exact_spans(table: TokenTable, ids_T: np.ndarray, added_T: np.ndarray, text: bytes) -> np.ndarray | None:
    """Spans from the tokens' lengths, where the tokens' bytes joined are the text; else None.

    Two differences are allowed: a space invented in front, and bytes that have no token at all.
    """
    lengths_T = np.where(added_T, 0, table.lengths[ids_T])
    kept = [table.bytes[token_id] or b"" for token_id in ids_T[~added_T].tolist()]
    joined = b"".join(kept)
    ends_T = np.cumsum(lengths_T)
    starts_T = ends_T - lengths_T
    if joined == text:
        return np.stack([starts_T, ends_T], axis=1)
    if len(joined) == len(text) + 1 and joined[:1] == b" " and joined[1:] == text:
        return np.maximum(np.stack([starts_T, ends_T], axis=1) - 1, 0)
    if len(joined) < len(text) and table.missing_bytes.any():
        bytes_N = np.frombuffer(text, dtype=np.uint8)
        kept_N = np.flatnonzero(~table.missing_bytes[bytes_N])
        if len(kept_N) == len(joined) and bytes_N[kept_N].tobytes() == joined:
            last = kept_N[-1] + 1 if len(kept_N) else 0
            places_N = np.append(kept_N, last)
            ends_T = np.where(lengths_T > 0, places_N[ends_T - 1] + 1, places_N[starts_T])
            return np.stack([places_N[starts_T], ends_T], axis=1)
    return None


def _check(spans_T2: np.ndarray, text: bytes) -> None:
    """Refuse spans that are out of order, overlap or leave the text: wrong spans would be learned from silently."""
    edges = np.concatenate([[0], spans_T2.reshape(-1), [len(text)]])
    if (np.diff(edges) < 0).any():
        at = int(np.clip(edges[np.argmax(np.diff(edges) < 0)], 0, len(text)))
        raise TokenizerError(
            f"the tokenizer's offsets do not fit the text near byte {at} ({text[max(at - 20, 0) : at + 20]!r}): "
            "leave the document out, or use another tokenizer.json"
        )
