"""Sorted floats as whole numbers: what is not negative sorts like its bits, so a row becomes drops of bit patterns.

Bit patterns grow like logarithms: neighbouring ranks lie close together, and their distances are small numbers. Kept
are b_i - b_(i+1) along the ranks, with b_(K+1) = 0: any whole numbers are one row, sorted and not negative.

Legend: N rows, K ranks, B rows of one block.
"""

import numpy as np

from storage_specs.codecs.base import row_blocks
from storage_specs.codecs.steps import DECODED_AT_ONCE, drops, sum_onward


def bit_drops(floats_NK: np.ndarray) -> np.ndarray:
    """(N, K) unsigned of the floats' size. The floats: (N, K), sorted descending, not negative."""
    return drops((floats_NK + 0).view(f"u{floats_NK.itemsize}"))  # + 0 makes 0 of -0


def floats_of(drops_NK: np.ndarray) -> np.ndarray:
    """(N, K) float16 or float32 of `bit_drops`, bit for bit."""
    bits_NK = np.empty(drops_NK.shape, drops_NK.dtype)
    for rows in row_blocks(*drops_NK.shape, DECODED_AT_ONCE):
        bits_KB = np.array(drops_NK[rows].T, order="C")
        sum_onward(bits_KB)
        bits_NK[rows] = bits_KB.T
    return bits_NK.view(f"f{drops_NK.itemsize}")


def exceeds(drops_NK: np.ndarray, largest: float) -> bool:
    """Whether a row starts above `largest`, or is not a number. Sums of 2^20 drops of 32 bits are exact in float64."""
    limit = int(np.array(largest, dtype=f"f{drops_NK.itemsize}").view(f"u{drops_NK.itemsize}"))
    blocks = row_blocks(*drops_NK.shape, DECODED_AT_ONCE)
    return any((drops_NK[rows].sum(axis=1, dtype=np.float64) > limit).any() for rows in blocks)
