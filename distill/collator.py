"""Documents to one batch: the student's windows, its labels, and the teacher's rows at the compared positions.

Every document is rendered by the STUDENT's tokenizer and template, cut into windows (nothing is truncated), aligned
with its teacher rows, and flattened over the batch.

Legend: B windows, L tokens of the longest, R labels, N compared rows, K ranks of the cached head, I ranks with ids,
J bins of the tail, G chunks, M tokens of groups or chunks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from distill.alignment import Groups, align, align_groups
from distill.config import DistillationConfig
from distill.merged import SMALLEST_FACTOR
from distill.numerals import numeral_rows
from distill.word_map import WordMap, map_words, same_words
from storage_specs.document import CachedDocument, Document
from storage_specs.errors import ConfigError, TokenizerError
from storage_specs.reader import Cache
from storage_specs.rendering import render
from storage_specs.token_alphabet import backend_of
from storage_specs.windows import Window, cut_windows

Batch = dict[str, Any]


class DistillationCollator:
    """Collates `CachedDocument`s. A batch has

    input_ids, attention_mask: (B, L) int64, padded on the right.
    label_index_R: (R,) int64 ascending, positions b * L + i whose logits predict a scored token.
    label_ids_R: (R,) int64, that token. label_sample_R: (R,) int64, its document's number in the batch.
    With a loss of the teacher's also: student_index_N: (N,) int64, the compared ones of label_index_R; sample_N: (N,)
    int64; teacher_probs_NK: (N, K) and teacher_tail_N: (N,) float32; of a cache with a sketch teacher_bins_NJ: (N, J)
    float32; with a loss that needs ids words_NI: (N, I) int64, the student's words of the teacher's ids.
    With align `merge` those N are the last rows of groups, the teacher's values scaled by its gold probabilities before
    them; earlier_index_M: (M,) int64, the student's positions before its last in a group, some of label_index_R;
    earlier_group_M: (M,) int64, their groups.
    With `likelihood` chunk_index_M: (M,) int64, the student's positions of all tokens of chunks, some of label_index_R;
    chunk_M: (M,) int64, their chunks; chunk_gold_G: (G,) float32, the teacher's nats; chunk_sample_G: (G,) int64.
    teacher_rows: int, rows of its documents, compared or not. doc_ids: list[str].

    Raises TokenizerError (no fast backend, or another than the teacher's where a loss needs that one) and ConfigError
    (a loss that needs ids with a cache without, `merge` with a sketch).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DistillationConfig, cache: Cache) -> None:
        backend_of(tokenizer)
        self.tokenizer = tokenizer
        self.config = config
        self.k, self.k_ids = cache.manifest.k, cache.manifest.k_ids
        self.mixture = config.mixture
        self.word_map = word_map_of(cache, tokenizer, config) if self.mixture.needs_ids else None
        self.rank_edges = cache.manifest.rank_edges if self.mixture["uld"] else None
        if self.rank_edges is not None and config.align == "merge":
            raise ConfigError(
                f"align is 'merge', and the cache {cache.path} holds its tail as a sketch, which belongs to single "
                "rows and not to products over groups: use --align boundary"
            )
        self.pad_id = next(
            (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
        )  # masked, so any id will do

    def windows(self, document: Document) -> list[Window]:
        """The student's windows of a document."""
        sequence = render(self.tokenizer, document, self.config.chat_template, self.config.chat_template_kwargs)
        return cut_windows(sequence, self.config.max_length, self.config.window_overlap)

    def __call__(self, documents: Sequence[CachedDocument]) -> Batch:
        windows = [(number, window) for number, document in enumerate(documents) for window in self.windows(document)]
        length = max((len(window.ids) for _, window in windows), default=1)
        # A batch without a single label still takes its step (on other ranks there may be some): one padding token.
        input_ids_BL = np.full((max(1, len(windows)), length), self.pad_id, dtype=np.int64)
        attention_mask_BL = np.zeros_like(input_ids_BL)
        if not windows:
            attention_mask_BL[:] = 1
        for b, (_, window) in enumerate(windows):
            input_ids_BL[b, : len(window.ids)] = window.ids
            attention_mask_BL[b, : len(window.ids)] = 1
        columns = {
            "input_ids": input_ids_BL,
            "attention_mask": attention_mask_BL,
            "label_index_R": _joined([b * length + window.logits_index for b, (_, window) in enumerate(windows)]),
            "label_ids_R": _joined([window.target_ids for _, window in windows]),
            "label_sample_R": _joined([np.full(len(window.target_ids), number) for number, window in windows]),
        }
        if self.mixture.of_teacher:
            columns |= self._compared(documents, windows, length)
        return {
            **{name: torch.from_numpy(column) for name, column in columns.items()},
            "teacher_rows": sum(len(document.segment) for document in documents),
            "doc_ids": [document.doc_id for document in documents],
        }

    def _compared(
        self, documents: Sequence[CachedDocument], windows: list[tuple[int, Window]], length: int
    ) -> dict[str, np.ndarray]:
        """The pairs of every window, and their teacher rows gathered once."""
        student, samples, probs, tails, words, bins = [], [], [], [], [], []
        earlier, earlier_groups, groups_before = [], [], 0
        for b, (number, window) in enumerate(windows):
            document = documents[number]
            if self.config.align == "merge":
                groups = align_groups(document, window)
                if self.config.skip_numerals:
                    groups = _without_numerals(groups, document)
                row_N, scale_N1 = groups.teacher_last, teacher_scales(document, groups)[:, None]
                index_N = window.logits_index[groups.student_last]
                index_M, group_M = _runs(groups.student_first, groups.student_last)
                earlier.append(b * length + window.logits_index[index_M])
                earlier_groups.append(groups_before + group_M)
                groups_before += len(row_N)
            else:
                index_N, row_N = align(document, window, self.config.align)
                if self.config.skip_numerals:
                    kept_N = ~numeral_rows(document)[row_N]
                    index_N, row_N = index_N[kept_N], row_N[kept_N]
                scale_N1 = np.float32(1)
            student.append(b * length + index_N)
            samples.append(np.full(len(row_N), number))
            probs.append(document.probs[row_N] * scale_N1)
            tails.append(document.tail_mass[row_N] * np.reshape(scale_N1, -1))
            if self.rank_edges is not None:
                bins.append(document.tail_bins[row_N])
            if self.word_map is not None:
                words.append(self.word_map.words_U[document.token_ids[row_N]])
        k, ranks = self.k, self.k_ids
        columns = {
            "student_index_N": _joined(student),
            "sample_N": _joined(samples),
            "teacher_probs_NK": np.concatenate([np.zeros((0, k), np.float32), *probs]),
            "teacher_tail_N": np.concatenate([np.zeros(0, np.float32), *tails]),
        }
        if self.config.align == "merge":
            columns |= {"earlier_index_M": _joined(earlier), "earlier_group_M": _joined(earlier_groups)}
        if self.rank_edges is not None:
            columns["teacher_bins_NJ"] = np.concatenate([np.zeros((0, len(self.rank_edges) - 1), np.float32), *bins])
        if self.word_map is not None:
            columns["words_NI"] = np.concatenate([np.zeros((0, ranks), np.int64), *words])
        if self.mixture["likelihood"]:
            columns |= self._chunks(documents, windows, length)
        return columns

    def _chunks(
        self, documents: Sequence[CachedDocument], windows: list[tuple[int, Window]], length: int
    ) -> dict[str, np.ndarray]:
        """All tokens of both sides between shared boundaries, and the teacher's log-probability of each chunk."""
        positions, chunks, golds, samples, before = [], [], [], [], 0
        for b, (number, window) in enumerate(windows):
            document = documents[number]
            groups = align_groups(document, window)
            if self.config.skip_numerals:
                groups = _without_numerals(groups, document)
            own_M, chunk_M = _runs(groups.student_first, groups.student_last + 1)
            row_M, of_row_M = _runs(groups.teacher_first, groups.teacher_last + 1)
            positions.append(b * length + window.logits_index[own_M])
            chunks.append(before + chunk_M)
            golds.append(np.bincount(of_row_M, weights=document.gold_logprob[row_M], minlength=len(groups)))
            samples.append(np.full(len(groups), number))
            before += len(groups)
        return {
            "chunk_index_M": _joined(positions),
            "chunk_M": _joined(chunks),
            "chunk_gold_G": np.concatenate([np.zeros(0), *golds]).astype(np.float32),
            "chunk_sample_G": _joined(samples),
        }


def word_map_of(cache: Cache, tokenizer: PreTrainedTokenizerBase, config: DistillationConfig) -> WordMap:
    """The student word of every id in a cache. Raises ConfigError for a cache without ids, TokenizerError for a student
    whose tokenizer is not the teacher's where a loss needs that."""
    losses = ", ".join(config.mixture.not_merged)
    if not cache.with_ids:
        raise ConfigError(
            f"--loss {losses} needs the teacher's ids, and the cache {cache.path} has none: build it with --k-ids 16, "
            "or leave that loss out"
        )
    vocabulary = cache.vocabulary
    if not config.mixture.needs_same_tokenizer:
        return map_words(vocabulary.token_bytes, vocabulary.special_roles, tokenizer, config.mapping)
    words = same_words(cache.manifest.tokenizer.get("digest"), vocabulary.token_bytes, tokenizer)
    if words is None:
        raise TokenizerError(
            f"--loss {losses}: the student's tokenizer is not the one of the cache {cache.path} (neither its digest "
            "nor its vocabulary): use --loss mapped, which compares words across tokenizers"
        )
    return words


def teacher_scales(document: CachedDocument, groups: Groups) -> np.ndarray:
    """(N,) float32: the product of the teacher's gold probabilities before the last row of each group."""
    row_M, group_M = _runs(groups.teacher_first, groups.teacher_last)
    logprob_M = np.maximum(document.gold_logprob[row_M].astype(np.float64), np.log(SMALLEST_FACTOR))
    return np.exp(np.bincount(group_M, weights=logprob_M, minlength=len(groups))).astype(np.float32)


def _runs(first_N: np.ndarray, last_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(M,) int64 the numbers first..last - 1 of every run, and (M,) int64 the run's number."""
    sizes_N = last_N - first_N
    run_M = np.repeat(np.arange(len(sizes_N)), sizes_N)
    before_N = np.cumsum(sizes_N) - sizes_N
    return first_N[run_M] + np.arange(len(run_M)) - before_N[run_M], run_M


def _without_numerals(groups: Groups, document: CachedDocument) -> Groups:
    """The groups in which no teacher row is a numeral."""
    before = np.concatenate([[0], np.cumsum(numeral_rows(document))])
    kept_N = before[groups.teacher_last + 1] == before[groups.teacher_first]
    return Groups(**{name: column[kept_N] for name, column in vars(groups).items()})


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])
