"""The ULD over whole vocabularies at real shared boundaries: what stored rows make of it, value and gradient.

Legend: M compared rows, K head values, U teacher words, V student words (fewer), B rows of one block.
"""

from collections.abc import Callable, Iterator

import numpy as np

from storage_specs.codecs import RowValues
from storage_specs.sketch import expand_sorted

ROWS_AT_ONCE = 32


class FullULD:
    """sum |p - q| over the teacher's vocabulary, the student's padded with zeros, and its gradient by the logits.

    sorted_MU, sorted_MV: whole distributions of teacher and student, sorted descending. full_M: the ULD.
    """

    def __init__(self, sorted_MU: np.ndarray, sorted_MV: np.ndarray) -> None:
        self.sorted_MU, self.sorted_MV = sorted_MU, sorted_MV
        self.full_M = np.zeros(len(sorted_MU))
        self._gradient_MV = np.zeros(sorted_MV.shape, np.float32)
        for block in self._blocks():
            self.full_M[block], signs_BV = self._of_whole(sorted_MU[block].astype(np.float64), block)
            self._gradient_MV[block] = self._gradient(signs_BV, block)

    def of_head(self, rows: RowValues) -> tuple[np.ndarray, np.ndarray]:
        """Absolute error and cosine of the gradient, (M,) each, of head + |tail - tail|."""
        k = rows.probs.shape[1]

        def loss(block: slice) -> tuple[np.ndarray, np.ndarray]:
            q_BV = self.sorted_MV[block].astype(np.float64)
            rest_B = 1 - q_BV[:, :k].sum(axis=1) - rows.tail_mass[block]
            signs_BV = np.broadcast_to(np.sign(rest_B)[:, None], q_BV.shape).copy()
            signs_BV[:, :k] = np.sign(q_BV[:, :k] - rows.probs[block])
            return np.abs(q_BV[:, :k] - rows.probs[block]).sum(axis=1) + np.abs(rest_B), signs_BV

        return self._compared(loss)

    def of_sketch(self, rows: RowValues, rank_edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same of the whole distributions that head and bins stand for."""

        def loss(block: slice) -> tuple[np.ndarray, np.ndarray]:
            return self._of_whole(expand_sorted(rows.probs[block], rows.tail_bins[block], rank_edges), block)

        return self._compared(loss)

    def _of_whole(self, whole_BU: np.ndarray, block: slice) -> tuple[np.ndarray, np.ndarray]:
        words = self.sorted_MV.shape[1]
        difference_BV = self.sorted_MV[block] - whole_BU[:, :words]
        return np.abs(difference_BV).sum(axis=1) + whole_BU[:, words:].sum(axis=1), np.sign(difference_BV)

    def _compared(self, loss: Callable[[slice], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        error_M, cosine_M = np.empty(len(self.full_M)), np.empty(len(self.full_M))
        for block in self._blocks():
            found_B, signs_BV = loss(block)
            error_M[block] = np.abs(found_B - self.full_M[block])
            one_BV, other_BV = self._gradient(signs_BV, block), self._gradient_MV[block]
            norms_B = np.linalg.norm(one_BV, axis=1) * np.linalg.norm(other_BV, axis=1)
            cosine_M[block] = (one_BV * other_BV).sum(axis=1) / np.maximum(norms_B, 1e-30)
        return error_M, cosine_M

    def _gradient(self, signs_BV: np.ndarray, block: slice) -> np.ndarray:
        """By the logits, in the order of the sorted probabilities: d q_i / d z_j = q_i (1[i = j] - q_j)."""
        q_BV = self.sorted_MV[block].astype(np.float64)
        return q_BV * (signs_BV - (q_BV * signs_BV).sum(axis=1, keepdims=True))

    def _blocks(self) -> Iterator[slice]:
        return (slice(start, start + ROWS_AT_ONCE) for start in range(0, len(self.full_M), ROWS_AT_ONCE))
