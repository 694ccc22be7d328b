"""A document as the tokens one model reads, with the shared coordinates of each.

Every side renders its own conversation; only contents have coordinates: bytes of `document.text`, within a segment.

Legend: P prefix tokens, T tokens after the prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage_specs.conversation import Place, Rendering, chat_template_digest, render_conversation
from storage_specs.document import Document
from storage_specs.encoding import Encoding, encode
from storage_specs.errors import TokenizerError
from storage_specs.token_alphabet import backend_of
from storage_specs.token_table import token_table

__all__ = ["TokenSequence", "chat_template_digest", "render", "render_all"]


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """One document as tokens.

    prefix_ids: (P,) int64, repeated in front of every window. ids: (T,) int64, all tokens after the prefix.
    segment: (T,) int64, the message of content and end tokens, -1 for tokens of the template.
    byte_start: (T,) int64, the row's coordinate: where the previous token's bytes ended in the same segment.
    token_start: (T,) int64 >= byte_start, where the token's own bytes begin; the gap is what the tokenizer dropped.
    byte_end: (T,) int64, where its bytes end, at most the message's end. All three are -1 for tokens of the template.
    is_end: (T,) bool, the EOS or end-of-turn token behind a message, at the message's end in all three coordinates.
    scored: (T,) bool, tokens that start in a scored message, and the end token of a scored message that has bytes.
    """

    prefix_ids: np.ndarray
    ids: np.ndarray
    segment: np.ndarray
    byte_start: np.ndarray
    token_start: np.ndarray
    byte_end: np.ndarray
    is_end: np.ndarray
    scored: np.ndarray


def render(
    tokenizer: Any,
    document: Document,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    bos_token: str | None = None,
) -> TokenSequence:
    """Tokenise a document for one model.

    text and completion: the prefix is what the tokenizer itself puts in front of a text (or `bos_token`); then the
    whole text encoded as one string, then EOS as the end token if the tokenizer names one (`eos_token_id`).
    chat: the template's rendering encoded as one string, as serving engines do; leading prefix tokens in it become the
    prefix, so that there are never two. Special tokens written out in a content are what the tokenizer makes of them:
    content with bytes, never an end token. The end token of a message is the special token right behind its content.

    Raises ChatTemplateError (chat without a template, or with one that alters contents) and TokenizerError.
    """
    return render_all(tokenizer, [document], chat_template, chat_template_kwargs, bos_token)[0]


def render_all(
    tokenizer: Any,
    documents: Sequence[Document],
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    bos_token: str | None = None,
) -> list[TokenSequence]:
    """`render` of every document; their texts are encoded together, on all cores that the tokenizer may use."""
    if not documents:
        return []
    prefix_P = prefix_ids(tokenizer, bos_token)
    renderings = []
    for document in documents:
        if document.kind == "chat":
            renderings.append(render_conversation(tokenizer, document, chat_template, chat_template_kwargs))
        else:
            places = [
                Place(segment=n, start=message.byte_start, end=message.byte_end, text_start=message.byte_start)
                for n, message in enumerate(document.messages)
            ]
            renderings.append(Rendering(text=document.text, places=tuple(places)))
    encodings = encode(tokenizer, [rendering.text for rendering in renderings], add_special_tokens=False)
    return [
        _framed(tokenizer, document, rendering, encoding, prefix_P, bos_token)
        for document, rendering, encoding in zip(documents, renderings, encodings, strict=True)
    ]


def _framed(
    tokenizer: Any,
    document: Document,
    rendering: Rendering,
    encoding: Encoding,
    prefix_P: np.ndarray,
    bos_token: str | None,
) -> TokenSequence:
    """A rendering's tokens with the prefix in front of them and the end tokens behind messages."""
    ids_T, spans_T2 = encoding.ids, encoding.spans
    if document.kind == "chat":
        repeated = len(prefix_P) and len(ids_T) >= len(prefix_P) and (ids_T[: len(prefix_P)] == prefix_P).all()
        if repeated and (not rendering.places or spans_T2[len(prefix_P) - 1, 1] <= rendering.places[0].start):
            ids_T, spans_T2 = ids_T[len(prefix_P) :], spans_T2[len(prefix_P) :]
        elif bos_token is None:
            prefix_P = prefix_P[:0]
    elif (eos := getattr(tokenizer, "eos_token_id", None)) is not None:
        end = len(rendering.text.encode())
        ids_T = np.append(ids_T, np.int64(eos))
        spans_T2 = np.concatenate([spans_T2, [[end, end]]]).astype(np.int64)
        return _sequence(document, rendering, prefix_P, ids_T, spans_T2, {len(ids_T) - 1: len(document.messages) - 1})
    return _sequence(document, rendering, prefix_P, ids_T, spans_T2, _end_tokens(tokenizer, rendering, ids_T, spans_T2))


def prefix_ids(tokenizer: Any, bos_token: str | None) -> np.ndarray:
    """(P,) int64: the special tokens in front of every text; `bos_token` replaces what the tokenizer itself adds."""
    backend = backend_of(tokenizer)
    if bos_token is not None:
        bos = backend.token_to_id(bos_token)
        if bos is None:
            raise TokenizerError(f"--bos-token {bos_token!r} is not a token of this tokenizer's vocabulary")
        return np.array([bos], dtype=np.int64)
    # Encoded with and without its special tokens, a letter comes later by what stands in front.
    framed, bare = encode(tokenizer, ["a"])[0], encode(tokenizer, ["a"], add_special_tokens=False)[0]
    return framed.ids[: np.argmax(framed.spans[:, 1] > 0) - np.argmax(bare.spans[:, 1] > 0)]


def _end_tokens(tokenizer: Any, rendering: Rendering, ids_T: np.ndarray, spans_T2: np.ndarray) -> dict[int, int]:
    """{token index: segment} of the special tokens right behind a chat's contents."""
    special = token_table(tokenizer).special_ids
    ends = {}
    for place in rendering.places:
        # A token that starts inside the content and ends outside is content; a zero-width one at its end as well.
        behind = int(np.searchsorted(spans_T2[:, 0], place.end))
        while behind < len(ids_T) and spans_T2[behind, 0] == spans_T2[behind, 1]:
            behind += 1
        if behind < len(ids_T) and int(ids_T[behind]) in special and not _inside(spans_T2[behind, 0], rendering):
            ends[behind] = place.segment
    return ends


def _inside(position: int, rendering: Rendering) -> bool:
    return any(place.start <= position < place.end for place in rendering.places)


def _sequence(
    document: Document,
    rendering: Rendering,
    prefix_P: np.ndarray,
    ids_T: np.ndarray,
    spans_T2: np.ndarray,
    ends: dict[int, int],
) -> TokenSequence:
    """Coordinates of every token, from its bytes in the rendering."""
    messages = document.messages
    starts_T, ends_T = spans_T2[:, 0], spans_T2[:, 1]
    segment_T = np.full(len(ids_T), -1, dtype=np.int64)
    byte_start_T, token_start_T, byte_end_T = segment_T.copy(), segment_T.copy(), segment_T.copy()
    is_end_T = np.zeros(len(ids_T), dtype=bool)
    scored_T = np.zeros(len(ids_T), dtype=bool)
    is_end_T[list(ends)] = True
    previous_T = np.concatenate([[0], np.maximum.accumulate(ends_T)[:-1]])[: len(ids_T)]
    for place in rendering.places:
        message = messages[place.segment]
        # Zero-width tokens at the end are the tail of a character inside; those at the start belong to what follows.
        tail_T = (starts_T == place.end) & (ends_T == place.end) & (previous_T == place.end)
        inside_T = (starts_T >= place.start) & ((starts_T < place.end) | tail_T) & (segment_T < 0) & ~is_end_T
        if place.start == place.end:
            inside_T[:] = False
        shift = place.text_start - place.start
        # Bytes that a token of the template swallowed are gone; bytes that the template trimmed are a dropped gap.
        from_T = np.where(previous_T > place.start, previous_T + shift, message.byte_start)
        segment_T[inside_T] = place.segment
        byte_start_T[inside_T] = from_T[inside_T]
        token_start_T[inside_T] = starts_T[inside_T] + shift
        byte_end_T[inside_T] = np.minimum(ends_T[inside_T], place.end) + shift
        scored_T[inside_T] = message.scored
    for token, segment in ends.items():
        segment_T[token] = segment
        byte_start_T[token] = token_start_T[token] = byte_end_T[token] = messages[segment].byte_end
        scored_T[token] = messages[segment].scored and messages[segment].byte_end > messages[segment].byte_start
    return TokenSequence(
        prefix_ids=prefix_P,
        ids=ids_T,
        segment=segment_T,
        byte_start=byte_start_T,
        token_start=token_start_T,
        byte_end=byte_end_T,
        is_end=is_end_T,
        scored=scored_T,
    )
