"""`distill review`: the documents about which student and teacher disagree most, found in one pass over a cache.

The pass keeps five numbers per document, in a file beside the sheet as well: a review that was interrupted goes on
where it was. What a reviewer is shown of the worst documents is worked out afterwards, for these alone.

Legend: N compared rows, V student vocabulary, I ranks with ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.alignment import align
from distill.encoder_decoder import decoder_start_of
from distill.exclusions import Exclusions
from distill.head import picked_logits
from distill.review.disagreement import Span, different_words, shared_groups, worst_spans
from distill.review.progress import Figures, ReviewProgress
from distill.scoring import Scores, score, teacher_scores
from distill.student_inputs import StudentInputs
from distill.word_map import map_words
from storage_specs.document import CachedDocument
from storage_specs.errors import AlignmentError
from storage_specs.reader import Cache
from storage_specs.vocabulary import token_bytes

__all__ = ["Place", "ReviewedDocument", "Reviewer", "Split"]

Split = Literal["train", "held_out", "all"]
CONTEXT = 60  # characters quoted on either side of a place
WORDS = 3  # likeliest words quoted of either side
STRETCH = 8  # batches whose documents are scored, and noted, together

Words = tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A worst place, quoted, with bits of both, and the likeliest words of both where it begins (teacher: of ids)."""

    before: str
    quoted: str
    after: str
    student_bits: float
    teacher_bits: float
    student_words: Words = ()
    teacher_words: Words = ()


@dataclass(frozen=True, kw_only=True)
class ReviewedDocument:
    """What a reviewer is shown. different_words: the mean over compared rows, None for a cache without ids."""

    figures: Figures
    doc_id: str
    held_out: bool
    kind: str
    messages: tuple[tuple[str, str], ...]
    places: tuple[Place, ...]
    different_words: float | None


class Reviewer:
    """Puts one student beside a cache's teacher. Raises ConfigError where max_length is more than the model reads."""

    def __init__(
        self,
        cache: Cache,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 1024,
        batch_size: int = 8,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.cache, self.model, self.tokenizer = cache, model.eval(), tokenizer
        self.batch_size = batch_size
        self.rendering = {
            "max_length": max_length,
            "chat_template": chat_template,
            "chat_template_kwargs": chat_template_kwargs,
        }
        self.inputs = StudentInputs(
            tokenizer,
            window_overlap=max(1, max_length // 8),
            decoder_start=decoder_start_of(model.config),
            **self.rendering,
        )
        self.spelled = token_bytes(tokenizer)
        self.vocabulary = cache.vocabulary if cache.with_ids else None
        self.words_U = None
        if self.vocabulary is not None:
            self.words_U = map_words(self.vocabulary.token_bytes, self.vocabulary.special_roles, tokenizer).words_U

    def worst(
        self,
        progress: Path,
        review: dict[str, Any],
        *,
        split: Split = "train",
        top: int = 50,
        max_documents: int | None = None,
        excluded: Exclusions | None = None,
    ) -> list[ReviewedDocument]:
        """The `top` documents of a split, most disputed first. progress: the file by which a later process goes on;
        review: what makes it this review. Raises AlignmentError where no document can be compared."""
        numbers = document_numbers(self.cache, split, excluded)[:max_documents]
        so_far = ReviewProgress(progress, review)
        worst = nlargest(top, so_far, key=lambda figures: figures.order)
        stretch = STRETCH * self.batch_size
        with tqdm(unit="tok", unit_scale=True, desc="review", disable=None) as bar:
            for first in range(so_far.done, len(numbers), stretch):
                chosen = numbers[first : first + stretch].tolist()
                documents = [self.cache.streamed(number) for number in chosen]
                scores = self._scores(documents, bar)
                found = [_figures(*each) for each in zip(chosen, documents, scores, strict=True)]
                found = [figures for figures in found if figures is not None]
                so_far.add(len(chosen), found)
                worst = nlargest(top, [*worst, *found], key=lambda figures: figures.order)
        if not worst:
            raise AlignmentError(
                f"cache {self.cache.path}: none of its {len(numbers)} documents ({split}) has a byte that student and "
                "teacher both score: choose another --split, or check that --model names the student you mean"
            )
        return [self._shown(figures) for figures in worst]

    def _scores(self, documents: Sequence[CachedDocument], bar: tqdm | None = None) -> list[Scores]:
        return score(self.model, self.tokenizer, documents, batch_size=self.batch_size, bar=bar, **self.rendering)

    def _shown(self, figures: Figures) -> ReviewedDocument:
        document = self.cache.streamed(figures.number)
        (scores,) = self._scores([document], tqdm(disable=True))
        spans = worst_spans(shared_groups(scores, teacher_scores(document)))
        words, apart = self._words(document, spans)
        return ReviewedDocument(
            figures=figures,
            doc_id=document.doc_id,
            held_out=bool(self.cache.held_out_D[figures.number]),
            kind=document.kind,
            messages=tuple((m.role, document.content(number)) for number, m in enumerate(document.messages)),
            places=tuple(_place(document, span, *words.get(number, ((), ()))) for number, span in enumerate(spans)),
            different_words=apart,
        )

    @torch.no_grad()
    def _words(
        self, document: CachedDocument, spans: Sequence[Span]
    ) -> tuple[dict[int, tuple[Words, Words]], float | None]:
        """{span: (student's, teacher's likeliest words where it begins)}, and the mean of `different_words`."""
        apart, found = [], {}
        for window in self.inputs.windows([document])[0]:
            index_N, row_N = align(document, window)
            if not len(row_N):
                continue
            arrays, (start,) = self.inputs.batch([window])
            fed = {name: torch.from_numpy(array).to(self.model.device) for name, array in arrays.items()}
            logits_NV = picked_logits(self.model, fed, torch.from_numpy(start + index_N).to(self.model.device))
            log_q_NV = logits_NV.float().log_softmax(1)
            if self.words_U is not None:
                words_NI = self.words_U[document.token_ids[row_N]]
                listed = torch.from_numpy(np.maximum(words_NI, 0)).to(log_q_NV.device)
                teacher_NI = document.probs[row_N, : words_NI.shape[1]]
                apart.append(different_words(words_NI, teacher_NI, log_q_NV.gather(1, listed).exp().cpu().numpy()))
            for number, span in enumerate(spans):
                here = (document.segment[row_N] == span.segment) & (document.byte_start[row_N] == span.byte_start)
                for n in np.flatnonzero(here & ~document.is_end[row_N])[:1].tolist():
                    found[number] = (self._students(log_q_NV[n]), self._teachers(document, int(row_N[n])))
        return found, float(np.concatenate(apart).mean()) if apart else None

    def _students(self, log_q_V: torch.Tensor) -> Words:
        top = log_q_V.topk(min(WORDS, len(log_q_V)))
        pairs = zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
        return tuple((_spelled(self.spelled, word), probability) for word, probability in pairs)

    def _teachers(self, document: CachedDocument, row: int) -> Words:
        if self.vocabulary is None:
            return ()
        ids = document.token_ids[row, :WORDS].tolist()
        pairs = zip(ids, document.probs[row].tolist(), strict=False)
        return tuple((_spelled(self.vocabulary.token_bytes, word), probability) for word, probability in pairs)


def document_numbers(cache: Cache, split: Split, excluded: Exclusions | None = None) -> np.ndarray:
    """(D,) int64: the documents of a split that have rows, in the order of the cache."""
    wanted_D = cache.rows_D > 0
    if split != "all":
        wanted_D &= cache.held_out_D == (split == "held_out")
    if excluded is not None:
        wanted_D &= ~excluded.mask_D
    return np.flatnonzero(wanted_D)


def _figures(number: int, document: CachedDocument, scores: Scores) -> Figures | None:
    groups = shared_groups(scores, teacher_scores(document))
    if not groups.bytes:
        return None
    student, teacher, disagreement = groups.bits_per_byte
    return Figures(number=number, bytes=groups.bytes, student=student, teacher=teacher, disagreement=disagreement)


def _place(document: CachedDocument, span: Span, student_words: Words, teacher_words: Words) -> Place:
    """A span in its message, widened to whole characters: a token may end inside one."""
    data, message = document.text.encode(), document.messages[span.segment]
    start, end = span.byte_start, span.byte_end
    while start > message.byte_start and data[start] & 0xC0 == 0x80:
        start -= 1
    while end < message.byte_end and data[end] & 0xC0 == 0x80:
        end += 1
    return Place(
        before=data[message.byte_start : start].decode()[-CONTEXT:],
        quoted=data[start:end].decode(),
        after=data[end : message.byte_end].decode()[:CONTEXT],
        student_bits=span.student,
        teacher_bits=span.teacher,
        student_words=student_words,
        teacher_words=teacher_words,
    )


def _spelled(vocabulary: Sequence[bytes | None], token_id: int) -> str:
    known = vocabulary[token_id] if token_id < len(vocabulary) else None
    return f"<{token_id}>" if known is None else known.decode(errors="replace")
