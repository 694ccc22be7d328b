"""What a model says about documents: nats per token with their bytes, summed over the bytes that several models score.

Those are, per segment, the bytes from the first place that is a token boundary for all, at or after the latest start (a
model without BOS cannot score its first token), to the last such place. All of them thus get the same denominator.

Legend: R rows (scored tokens) of one document, W windows of one batch, L tokens of the longest of them.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.encoder_decoder import decoder_start_of
from distill.head import picked_logits
from distill.student_inputs import StudentInputs, StudentWindow
from storage_specs.document import CachedDocument, Document
from storage_specs.errors import AlignmentError, ConfigError, NonFiniteLossError

__all__ = [
    "Scores",
    "SharedSums",
    "score",
    "shared_boundaries",
    "shared_regions",
    "shared_sums",
    "summed",
    "teacher_scores",
]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one model said about one document. nats: (R,) float64, -log p of each scored token; else as in a cache."""

    segment: np.ndarray
    byte_start: np.ndarray
    byte_end: np.ndarray
    is_end: np.ndarray
    nats: np.ndarray


@dataclass(frozen=True, kw_only=True)
class SharedSums:
    """Per model the nats of its tokens over the bytes that all models score; how many bytes, of how many documents."""

    nats: dict[str, float]
    bytes: int
    documents: int


def summed(scores: Mapping[str, Sequence[Scores]]) -> SharedSums:
    """Sums over documents of what all models score; `scores`: per model, one per document."""
    each = shared_sums(scores)
    return SharedSums(
        nats={name: sum(one.nats[name] for one in each) for name in scores},
        bytes=sum(one.bytes for one in each),
        documents=sum(one.documents for one in each),
    )


def shared_sums(scores: Mapping[str, Sequence[Scores]]) -> list[SharedSums]:
    """The same for every document; `documents` is 1, or 0 where there is no byte that all models score."""
    each = []
    for of_document in zip(*scores.values(), strict=True):
        regions = shared_regions(of_document)
        nats = {
            name: sum((_nats_inside(of_model, *region) for region in regions), 0.0)
            for name, of_model in zip(scores, of_document, strict=True)
        }
        size = sum(end - start for _, start, end in regions)
        each.append(SharedSums(nats=nats, bytes=size, documents=int(size > 0)))
    return each


def shared_regions(of_document: Sequence[Scores]) -> list[tuple[int, int, int]]:
    """(segment, byte_start, byte_end) of what all models score in one document, cut at boundaries of all."""
    return [(segment, int(bytes_B[0]), int(bytes_B[-1])) for segment, bytes_B in shared_boundaries(of_document)]


def shared_boundaries(of_document: Sequence[Scores]) -> list[tuple[int, np.ndarray]]:
    """Of every segment with a shared region: (segment, (B,) int64 ascending, the places where all begin or end a token
    from the latest start on)."""
    found = []
    for segment in reduce(np.intersect1d, [scores.segment for scores in of_document]).tolist():
        starts, boundaries = [], []
        for scores in of_document:
            rows = (scores.segment == segment) & ~scores.is_end
            starts.append(int(scores.byte_start[rows].min(initial=2**62)))
            boundaries.append(np.union1d(scores.byte_start[rows], scores.byte_end[rows]))
        shared = reduce(np.intersect1d, boundaries)
        shared = shared[shared >= max(starts)]
        if len(shared) > 1:
            found.append((segment, shared))
    return found


def _nats_inside(scores: Scores, segment: int, start: int, end: int) -> float:
    """Nats of the tokens of a region. Tokens without bytes belong to what stands before them, or to the first token."""
    rows = (scores.segment == segment) & ~scores.is_end
    first = scores.byte_start[rows].min()
    inside = rows & (scores.byte_start >= start) & (scores.byte_end <= end)
    if start > first:
        inside &= (scores.byte_start > start) | (scores.byte_end > start)
    if int((scores.byte_end - scores.byte_start)[inside].sum()) != end - start:
        raise AlignmentError(f"the rows of segment {segment} do not cover its bytes {start}..{end} once each")
    return float(scores.nats[inside].sum())


def teacher_scores(document: CachedDocument) -> Scores:
    """The teacher's, from the cache."""
    return Scores(
        segment=document.segment,
        byte_start=document.byte_start,
        byte_end=document.byte_end,
        is_end=document.is_end,
        nats=-document.gold_logprob.astype(np.float64),
    )


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    max_length: int = 1024,
    batch_size: int = 8,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    label: str = "score",
    bar: tqdm | None = None,
) -> list[Scores]:
    """What `model` says about every document; bar: moved on by tokens, instead of a bar of its own.

    Raises ConfigError where max_length is more than the model reads, NonFiniteLossError where it says NaN.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise ConfigError(f"max_length is {max_length}, but {label} reads at most {limit} tokens")
    inputs = StudentInputs(
        tokenizer,
        max_length=max_length,
        window_overlap=max(1, max_length // 8),
        chat_template=chat_template,
        chat_template_kwargs=chat_template_kwargs,
        decoder_start=decoder_start_of(model.config),
    )
    windows = inputs.windows(documents)
    flat = sorted((window for of_one in windows for window in of_one), key=lambda window: -len(window.ids))
    nats: dict[int, np.ndarray] = {}
    own = {"total": sum(len(window.ids) for window in flat), "unit": "tok", "unit_scale": True, "desc": label}
    with tqdm(**own, disable=None) if bar is None else nullcontext(bar) as bar:
        for first in range(0, len(flat), batch_size):
            batch = flat[first : first + batch_size]
            found = _nats(model, inputs, batch)
            if not all(np.isfinite(nats_R).all() for nats_R in found):
                raise NonFiniteLossError(
                    f"what the model {model.name_or_path} says about a token is no finite number: its weights are NaN, "
                    f"or overflow in {str(model.dtype).removeprefix('torch.')}: take an earlier checkpoint, or --dtype"
                )
            for window, nats_R in zip(batch, found, strict=True):
                nats[id(window)] = nats_R
                bar.update(len(window.ids))
    return [_joined(of_one, nats) for of_one in windows]


@torch.no_grad()  # not inference mode: parameters gathered by FSDP are trained on afterwards
def _nats(model: PreTrainedModel, inputs: StudentInputs, windows: Sequence[StudentWindow]) -> list[np.ndarray]:
    """(R,) float64 per window: -log p of its rows' tokens."""
    arrays, starts_W = inputs.batch(windows)
    fed = {name: torch.from_numpy(array).to(model.device) for name, array in arrays.items()}
    index_R = np.concatenate([start + window.logits_index for start, window in zip(starts_W, windows, strict=True)])
    targets_R = np.concatenate([window.target_ids for window in windows])
    logits_RV = picked_logits(model, fed, torch.from_numpy(index_R).to(model.device))
    nats_R = cross_entropy(logits_RV.float(), torch.from_numpy(targets_R).to(model.device), reduction="none")
    return np.split(nats_R.double().cpu().numpy(), np.cumsum([len(window.target_ids) for window in windows])[:-1])


def _joined(windows: Sequence[StudentWindow], nats: Mapping[int, np.ndarray]) -> Scores:
    def column(name: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(getattr(window, name) for window in windows)])

    return Scores(
        segment=column("segment", np.int64),
        byte_start=column("byte_start", np.int64),
        byte_end=column("byte_end", np.int64),
        is_end=column("is_end", bool),
        nats=np.concatenate([np.zeros(0), *(nats[id(window)] for window in windows)]),
    )
