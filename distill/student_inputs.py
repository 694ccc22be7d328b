"""What a student reads of a document: windows of tokens with coordinates, and batches of them as model inputs.

A causal student reads the whole rendering. An encoder-decoder reads what stands before a scored message in its encoder
and writes the message with its decoder (`distill.encoder_decoder`); positions are then those of the decoder.

Legend: W windows of a batch, B rows, L tokens of the longest row, E tokens of the longest encoder input.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.encoder_decoder import encoder_decoder_pairs
from distill.packing import first_fit
from storage_specs.document import Document
from storage_specs.errors import ConfigError
from storage_specs.rendering import render_all
from storage_specs.token_alphabet import backend_of
from storage_specs.windows import Window, cut_windows

__all__ = ["StudentInputs", "StudentWindow"]


@dataclass(frozen=True, kw_only=True)
class StudentWindow(Window):
    """A window, and what the encoder of an encoder-decoder reads beside it: (E,) int64, or None."""

    encoder_ids: np.ndarray | None = None


class StudentInputs:
    """Renders documents for one student. decoder_start: the id that starts a decoder's text; None = a causal student.

    packing: several windows in one row of at most `max_length` tokens, told apart by positions that start anew.
    Raises TokenizerError for a tokenizer without a fast backend, ConfigError for a packed encoder-decoder.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        window_overlap: int,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        decoder_start: int | None = None,
        packing: bool = False,
    ) -> None:
        if packing and decoder_start is not None:
            raise ConfigError("--packing is for causal students: an encoder-decoder's rows cannot be told apart")
        self.tokenizer = _of_its_own(tokenizer)
        self.max_length, self.window_overlap = max_length, window_overlap
        self.template = (chat_template, chat_template_kwargs)
        self.decoder_start = decoder_start
        self.packing = packing
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        self.pad_id = next((i for i in ids if i is not None), 0)  # masked, so any id will do

    def windows(self, documents: Sequence[Document]) -> list[list[StudentWindow]]:
        """The student's windows of every document. Nothing of what it is scored on is cut off."""
        if self.decoder_start is None:
            pairs = [[(None, sequence)] for sequence in render_all(self.tokenizer, documents, *self.template)]
        else:
            pairs = [
                encoder_decoder_pairs(self.tokenizer, document, self.decoder_start, self.max_length, *self.template)
                for document in documents
            ]
        return [
            [
                StudentWindow(**vars(window), encoder_ids=encoder_ids)
                for encoder_ids, sequence in of_document
                for window in cut_windows(sequence, self.max_length, self.window_overlap)
            ]
            for of_document in pairs
        ]

    def batch(self, windows: Sequence[StudentWindow]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """A model's inputs for these windows, and (W,) int64, the flattened position of each window's first token.

        Causal: input_ids (B, L), and attention_mask (B, L), or position_ids (B, L) where packed. Encoder-decoder:
        input_ids and attention_mask (B, E), decoder_input_ids and decoder_attention_mask (B, L). All int64, padded on
        the right. Without a window it is one padding token, so that a rank without work still takes its step.
        """
        if self.packing:
            return self._packed(windows)
        ids_BL, mask_BL = self._padded([window.ids for window in windows])
        starts_W = np.arange(len(windows)) * ids_BL.shape[1]
        if self.decoder_start is None:
            return {"input_ids": ids_BL, "attention_mask": mask_BL}, starts_W
        encoder_BE, encoder_mask_BE = self._padded([window.encoder_ids for window in windows])
        inputs = {"input_ids": encoder_BE, "attention_mask": encoder_mask_BE}
        return inputs | {"decoder_input_ids": ids_BL, "decoder_attention_mask": mask_BL}, starts_W

    def _padded(self, rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        length = max((len(row) for row in rows), default=1)
        ids_BL = np.full((max(1, len(rows)), length), self.pad_id, dtype=np.int64)
        mask_BL = np.zeros_like(ids_BL)
        if not rows:
            mask_BL[:] = 1
        for b, row in enumerate(rows):
            ids_BL[b, : len(row)] = row
            mask_BL[b, : len(row)] = 1
        return ids_BL, mask_BL

    def _packed(self, windows: Sequence[StudentWindow]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        row_W, column_W = first_fit([len(window.ids) for window in windows], self.max_length)
        ends_W = column_W + np.array([len(window.ids) for window in windows], dtype=np.int64)
        shape = (int(row_W.max(initial=0)) + 1, int(ends_W.max(initial=1)))
        ids_BL = np.full(shape, self.pad_id, dtype=np.int64)
        positions_BL = np.zeros_like(ids_BL)  # each padding token is a text of its own
        for window, row, column, end in zip(windows, row_W, column_W, ends_W, strict=True):
            ids_BL[row, column:end] = window.ids
            positions_BL[row, column:end] = np.arange(end - column)
        return {"input_ids": ids_BL, "position_ids": positions_BL}, row_W * shape[1] + column_W


def _of_its_own(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or where it truncates or pads a copy that does not: batches are prepared in a thread, and two
    threads must not switch the same tokenizer's truncation off and on again."""
    backend = backend_of(tokenizer)
    if backend.truncation is None and backend.padding is None:
        return tokenizer
    tokenizer = deepcopy(tokenizer)
    backend_of(tokenizer).no_truncation()
    backend_of(tokenizer).no_padding()
    return tokenizer
