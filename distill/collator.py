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
from distill.student_inputs import StudentInputs, StudentWindow
from distill.word_map import WordMap, map_words, same_words
from storage_specs.document import CachedDocument
from storage_specs.errors import ConfigError, TokenizerError
from storage_specs.reader import Cache

Batch = dict[str, Any]


class DistillationCollator:
    """Collates `CachedDocument`s. A batch has

    input_ids, attention_mask: (B, L) int64, padded on the right; what packing and encoder-decoders (`decoder_start`)
    have instead says `StudentInputs.batch`.
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
    teacher_rows: int, rows of its documents, compared or not. tokens: int, without padding. doc_ids: list[str].
    word_map: `word_map_of` the same cache, tokenizer and mapping, where several runs share it (seconds to make).

    Raises TokenizerError (no fast backend, or another than the teacher's where a loss needs that one) and ConfigError
    (a loss that needs ids with a cache without, `merge` with a sketch).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: DistillationConfig,
        cache: Cache,
        decoder_start: int | None = None,
        word_map: WordMap | None = None,
    ) -> None:
        self.inputs = StudentInputs(
            tokenizer,
            max_length=config.max_length,
            window_overlap=config.window_overlap,
            chat_template=config.chat_template,
            chat_template_kwargs=config.chat_template_kwargs,
            decoder_start=decoder_start,
            packing=config.packing,
        )
        self.config = config
        self.k, self.k_ids = cache.manifest.k, cache.manifest.k_ids
        self.mixture = config.mixture
        self.word_map = None
        if self.mixture.needs_ids:
            self.word_map = word_map or word_map_of(cache, tokenizer, config)
        self.rank_edges = cache.manifest.rank_edges if self.mixture["uld"] else None
        if self.rank_edges is not None and config.align == "merge":
            raise ConfigError(
                f"align is 'merge', and the cache {cache.path} holds its tail as a sketch, which belongs to single "
                "rows and not to products over groups: use --align boundary"
            )

    def __call__(self, documents: Sequence[CachedDocument]) -> Batch:
        of_documents = self.inputs.windows(documents)
        windows = [(number, window) for number, of_one in enumerate(of_documents) for window in of_one]
        inputs, starts_W = self.inputs.batch([window for _, window in windows])
        # Labels are in the order of their positions, wherever packing put their windows.
        placed = [(int(starts_W[w]), *windows[w]) for w in np.argsort(starts_W, kind="stable").tolist()]
        columns = {
            **inputs,
            "label_index_R": _joined([start + window.logits_index for start, _, window in placed]),
            "label_ids_R": _joined([window.target_ids for _, _, window in placed]),
            "label_sample_R": _joined([np.full(len(window.target_ids), number) for _, number, window in placed]),
        }
        if self.mixture.of_teacher:
            columns |= self._compared(documents, placed)
        return {
            **{name: torch.from_numpy(column) for name, column in columns.items()},
            "teacher_rows": sum(len(document.segment) for document in documents),
            "tokens": sum(len(window.ids) for _, window in windows),
            "doc_ids": [document.doc_id for document in documents],
        }

    def _compared(
        self, documents: Sequence[CachedDocument], placed: list[tuple[int, int, StudentWindow]]
    ) -> dict[str, np.ndarray]:
        """The pairs of every (start, document, window), and their teacher rows gathered once."""
        student, samples, probs, tails, words, bins = [], [], [], [], [], []
        earlier, earlier_groups, groups_before = [], [], 0
        for start, number, window in placed:
            document = documents[number]
            if self.config.align == "merge":
                groups = align_groups(document, window)
                if self.config.skip_numerals:
                    groups = _without_numerals(groups, document)
                row_N, scale_N1 = groups.teacher_last, teacher_scales(document, groups)[:, None]
                index_N = window.logits_index[groups.student_last]
                index_M, group_M = _runs(groups.student_first, groups.student_last)
                earlier.append(start + window.logits_index[index_M])
                earlier_groups.append(groups_before + group_M)
                groups_before += len(row_N)
            else:
                index_N, row_N = align(document, window, self.config.align)
                if self.config.skip_numerals:
                    kept_N = ~numeral_rows(document)[row_N]
                    index_N, row_N = index_N[kept_N], row_N[kept_N]
                scale_N1 = np.float32(1)
            student.append(start + index_N)
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
            columns |= self._chunks(documents, placed)
        return columns

    def _chunks(
        self, documents: Sequence[CachedDocument], placed: list[tuple[int, int, StudentWindow]]
    ) -> dict[str, np.ndarray]:
        """All tokens of both sides between shared boundaries, and the teacher's log-probability of each chunk."""
        positions, chunks, golds, samples, before = [], [], [], [], 0
        for start, number, window in placed:
            document = documents[number]
            groups = align_groups(document, window)
            if self.config.skip_numerals:
                groups = _without_numerals(groups, document)
            own_M, chunk_M = _runs(groups.student_first, groups.student_last + 1)
            row_M, of_row_M = _runs(groups.teacher_first, groups.teacher_last + 1)
            positions.append(start + window.logits_index[own_M])
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
    if not cache.manifest.k_ids:
        raise ConfigError(
            f"--loss {losses} needs the teacher's ids, and the cache {cache.path} has none: use losses that read none, "
            "like the paper's (--loss ce:1,uld:1.5), or build it with --k-ids 16"
        )
    if not cache.with_ids:
        raise ConfigError(
            f"--loss {losses} needs the teacher's ids, and the cache {cache.path} was opened without them: open it "
            "with ids=True (CachedDocuments, open_cache)"
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
