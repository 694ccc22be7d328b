"""Where rows stand, as small numbers: how many bytes and segments a row is beyond the one before, and how long it is.

    gap             byte_start minus the byte_end of the row before; for a document's first row, byte_start
    length          byte_end - byte_start
    segment_step    segment minus that of the row before; for a document's first row, segment

Legend: D documents, N rows of all of them.
"""

from collections.abc import Mapping

import numpy as np

from storage_specs.codecs.base import ArraySpec

ARRAYS = tuple(
    ArraySpec(name=name, dtype=np.dtype(np.uint32), width=None, rank_major=False)
    for name in ("gap", "length", "segment_step")
)


def encode(
    segment_N: np.ndarray, byte_start_N: np.ndarray, byte_end_N: np.ndarray, document_rows_D: np.ndarray
) -> dict[str, np.ndarray]:
    """The three arrays, (N,) uint32, of places that follow one another in every document."""
    first_N = _firsts(document_rows_D)
    return {
        "gap": (byte_start_N - _before(byte_end_N, first_N)).astype(np.uint32),
        "length": (byte_end_N - byte_start_N).astype(np.uint32),
        "segment_step": (segment_N - _before(segment_N, first_N)).astype(np.uint32),
    }


def decode(arrays: Mapping[str, np.ndarray], document_rows_D: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """segment, byte_start, byte_end: (N,) int64 each."""
    gap_N, length_N, step_N = (arrays[spec.name].astype(np.int64) for spec in ARRAYS)
    byte_end_N = _sums(gap_N + length_N, document_rows_D)
    return _sums(step_N, document_rows_D), byte_end_N - length_N, byte_end_N


def _firsts(document_rows_D: np.ndarray) -> np.ndarray:
    """The numbers of the rows that are their document's first."""
    return (np.cumsum(document_rows_D) - document_rows_D)[document_rows_D > 0]


def _before(values_N: np.ndarray, first_N: np.ndarray) -> np.ndarray:
    before_N = np.zeros_like(values_N)
    before_N[1:] = values_N[:-1]
    before_N[first_N] = 0
    return before_N


def _sums(steps_N: np.ndarray, document_rows_D: np.ndarray) -> np.ndarray:
    """Running sums that start anew with every document."""
    sums_N = np.cumsum(steps_N)
    first_N = _firsts(document_rows_D)
    base = sums_N[first_N] - steps_N[first_N]
    return sums_N - np.repeat(base, document_rows_D[document_rows_D > 0])
