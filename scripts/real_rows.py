"""Whole sorted distributions of the real pair, cut down to what the codecs' measurements need.

Legend: N rows, M rows at shared boundaries, K head values, J tail bins, U teacher words, V student words.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from real_pair import RealPair, passages

from storage_specs.codecs import RowValues
from storage_specs.document import text_document
from storage_specs.rendering import render
from storage_specs.windows import cut_windows

WIDEST = 256  # head values kept of every row
WINDOW = 512


@dataclass(frozen=True, kw_only=True)
class RealRows:
    """Rows of a teacher. top: (N, 256) float32. masses: {rank: (N,) float64 mass of the ranks beyond it}.

    document_rows: rows of each document.
    """

    top: np.ndarray
    masses: dict[int, np.ndarray]
    document_rows: list[int]

    def values(self, k: int, rank_edges: np.ndarray | None = None) -> RowValues:
        """The rows as an engine hands them over."""
        probs_NK = self.top[:, :k]
        tail_N = np.clip(1 - probs_NK.sum(axis=1, dtype=np.float64), 0, 1).astype(np.float32)
        if rank_edges is None:
            return RowValues(probs=probs_NK.copy(), tail_mass=tail_N)
        beyond_NJ1 = np.stack([self.masses[int(edge)] for edge in rank_edges], axis=1)
        bins_NJ = np.maximum(-np.diff(beyond_NJ1, axis=1), 0)
        bins_NJ *= tail_N[:, None] / np.maximum(bins_NJ.sum(axis=1, keepdims=True), 1e-30)  # float32 softmax: sums to 1
        return RowValues(probs=probs_NK.copy(), tail_mass=tail_N, tail_bins=bins_NJ.astype(np.float32))


def real_rows(pair: RealPair, count: int, edges: set[int]) -> RealRows:
    """The first `count` rows of Gemma-3-270M on Wikipedia; `edges`: ranks whose masses are wanted."""
    tops, masses, lengths = [], {edge: [] for edge in edges}, []
    for sorted_NU in _teacher(pair):
        sorted_NU = sorted_NU[: count - sum(lengths)]
        tops.append(sorted_NU[:, :WIDEST].copy())
        lengths.append(len(sorted_NU))
        for edge, parts in masses.items():
            parts.append(sorted_NU[:, edge:].sum(axis=1, dtype=np.float64))
        print(f"{sum(lengths)} rows", flush=True)
        if sum(lengths) == count:
            break
    return RealRows(
        top=np.concatenate(tops),
        masses={edge: np.concatenate(parts) for edge, parts in masses.items()},
        document_rows=lengths,
    )


def _teacher(pair: RealPair) -> Iterator[np.ndarray]:
    for text in passages(10_000):
        window = cut_windows(render(pair.tokenizers["teacher"], text_document(text)), WINDOW, 1)[0]
        with torch.inference_mode():
            logits_LU = pair.models["teacher"](torch.from_numpy(window.ids)[None]).logits[0]
            yield logits_LU[window.logits_index].softmax(1).sort(dim=1, descending=True).values.numpy()


def whole_rows(pair: RealPair, passage_count: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(M, U) and (M, V) float32: both sides' whole sorted distributions at shared boundaries."""
    sides = [[], []]
    for logits in pair.compared(passages(passage_count), tokens):
        for found, logits_N in zip(sides, logits, strict=True):
            found.append(logits_N.softmax(1).sort(dim=1, descending=True).values.numpy())
    return tuple(np.concatenate(found) for found in sides)
