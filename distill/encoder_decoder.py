"""Documents for encoder-decoder students: what stands before a scored message is read, the message is written.

kind `completion`: the encoder reads the prompt, the decoder writes the completion. `chat`: a pair for every scored
turn, whose encoder reads the template's rendering up to it. `text`: nothing stands before it, so the encoder reads the
empty text (what the tokenizer frames it with, T5's `</s>`) and the decoder is a language model of the whole text.

An encoder reads at most `max_length` tokens, the last ones. A decoder's text starts with its start token and ends with
EOS, whose row is the end row. Both sides' coordinates are bytes of the document, as everywhere.

Legend: E tokens of the encoder, T tokens of the decoder after its start.
"""

from typing import Any

import numpy as np

from storage_specs.conversation import render_conversation
from storage_specs.document import Document
from storage_specs.encoding import encode
from storage_specs.errors import ConfigError
from storage_specs.rendering import TokenSequence

__all__ = ["decoder_start_of", "encoder_decoder_pairs"]


def decoder_start_of(config: Any) -> int | None:
    """The id that a model's decoder starts with, None for a causal model. Raises ConfigError where there is none."""
    if not getattr(config, "is_encoder_decoder", False):
        return None
    text_config = config.get_text_config(decoder=True)
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for where in (config, text_config):
            if (found := getattr(where, name, None)) is not None:
                return int(found)
    raise ConfigError("the student is an encoder-decoder whose config names no decoder_start_token_id: set it there")


def encoder_decoder_pairs(
    tokenizer: Any,
    document: Document,
    decoder_start: int,
    max_length: int,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[tuple[np.ndarray, TokenSequence]]:
    """((E,) int64 encoder ids, the decoder's tokens) for every scored message with bytes, in order.

    Raises what `storage_specs.render` raises.
    """
    pairs = []
    for segment, text in _texts_before(tokenizer, document, chat_template, chat_template_kwargs).items():
        encoder_E = encode(tokenizer, [text])[0].ids[-max_length:]
        if not len(encoder_E):
            ids = (tokenizer.eos_token_id, tokenizer.pad_token_id, decoder_start)
            encoder_E = np.array([next(i for i in ids if i is not None)], dtype=np.int64)
        pairs.append((encoder_E, _decoder_tokens(tokenizer, document, segment, decoder_start)))
    return pairs


def _texts_before(
    tokenizer: Any, document: Document, template: str | None, kwargs: dict[str, Any] | None
) -> dict[int, str]:
    """{segment: what is read before it} of every scored message with bytes."""
    messages = document.messages
    if document.kind == "chat":
        rendering = render_conversation(tokenizer, document, template, kwargs)
        data, places = rendering.text.encode(), [(place.segment, place.start) for place in rendering.places]
    else:
        data, places = document.text.encode(), [(n, message.byte_start) for n, message in enumerate(messages)]
    scored = [(n, at) for n, at in places if messages[n].scored and messages[n].byte_end > messages[n].byte_start]
    return {segment: data[:start].decode() for segment, start in scored}


def _decoder_tokens(tokenizer: Any, document: Document, segment: int, decoder_start: int) -> TokenSequence:
    message = document.messages[segment]
    encoding = encode(tokenizer, [document.content(segment)], add_special_tokens=False)[0]
    ids_T, (starts_T, ends_T) = encoding.ids, encoding.spans.T
    previous_T = np.concatenate([[0], np.maximum.accumulate(ends_T)[:-1]])[: len(ids_T)]
    columns = {"byte_start": previous_T, "token_start": starts_T, "byte_end": ends_T}
    columns = {name: column.astype(np.int64) + message.byte_start for name, column in columns.items()}
    if (eos := tokenizer.eos_token_id) is not None:
        ids_T = np.append(ids_T, np.int64(eos))
        columns = {name: np.append(column, message.byte_end) for name, column in columns.items()}
    is_end_T = np.zeros(len(ids_T), dtype=bool)
    is_end_T[len(encoding.ids) :] = True
    return TokenSequence(
        prefix_ids=np.array([decoder_start], dtype=np.int64),
        ids=ids_T,
        segment=np.full(len(ids_T), segment, dtype=np.int64),
        **columns,
        is_end=is_end_T,
        scored=np.ones(len(ids_T), dtype=bool),
    )
