"""The value coding `half`: sorted probabilities as float16. The tail mass is not stored: it follows exactly.

A float16 is a multiple of 2^-24, so the sum of a row, and 1 minus that sum, are exact in float64 and the tail mass is
exact in float32 too: decoded rows satisfy p >= 0, p sorted descending, tail >= 0 and sum + tail == 1.

Legend: N rows, K top-k ranks.
"""

from dataclasses import dataclass

import numpy as np

PROFILE = "half"
VALUES_AT_ONCE = 1 << 20  # bounds what encoding needs beside its input
_ONE = np.float16(1).view(np.uint16)


@dataclass(frozen=True, kw_only=True)
class EncodedValues:
    """stored: (N, K) float16. l1_error: (N,) float64, |value - decoded value| summed over the ranks and the tail."""

    stored: np.ndarray
    l1_error: np.ndarray


def encode(probs_NK: np.ndarray, tail_N: np.ndarray) -> EncodedValues:
    """Round rows of float32 that are sorted descending, not negative, and sum with the tail to about 1.

    To nearest; rows whose rounded values would sum to more than 1 are rounded toward zero instead. Rows that exceed 1
    already (float32 softmax does) are first scaled to sum to 1.
    """
    stored_NK = np.empty(probs_NK.shape, np.float16)
    l1_error_N = np.empty(len(probs_NK), np.float64)
    step = max(1, VALUES_AT_ONCE // probs_NK.shape[1])
    for start in range(0, len(probs_NK), step):
        rows = slice(start, start + step)
        exact_RK = probs_NK[rows].astype(np.float64)
        sum_R = exact_RK.sum(axis=1)
        scaled_RK = exact_RK / np.maximum(sum_R, 1)[:, None]
        rounded_RK = scaled_RK.astype(np.float16)
        too_much_R = rounded_RK.sum(axis=1, dtype=np.float64) > 1
        rounded_RK[too_much_R] = _toward_zero(scaled_RK[too_much_R])
        decoded_RK = rounded_RK.astype(np.float64)
        tail_error_R = np.abs((1 - decoded_RK.sum(axis=1)) - tail_N[rows].astype(np.float64))
        stored_NK[rows] = rounded_RK
        l1_error_N[rows] = np.abs(decoded_RK - exact_RK).sum(axis=1) + tail_error_R
    return EncodedValues(stored=stored_NK, l1_error=l1_error_N)


def decode(stored_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(probs_NK, tail_N), float32, of verified rows; both are exact."""
    probs_NK = stored_NK.astype(np.float32)
    return probs_NK, (1 - probs_NK.sum(axis=1, dtype=np.float64)).astype(np.float32)


def problem_of(stored_NK: np.ndarray) -> str | None:
    """What is wrong with stored rows, if anything; None for rows that `encode` can have made."""
    bits_NK = stored_NK.view(np.uint16)  # floats that are not negative sort like their bits
    if len(bits_NK) == 0:
        return None
    if bits_NK.max() > _ONE:
        return "a probability is negative, above 1, or not a number"
    if (bits_NK[:, 1:] > bits_NK[:, :-1]).any():
        return "probabilities of a row are not sorted descending"
    if (stored_NK.sum(axis=1, dtype=np.float64) > 1).any():
        return "probabilities of a row sum to more than 1"
    return None


def _toward_zero(values_RK: np.ndarray) -> np.ndarray:
    """float16 not above the values, which are not negative."""
    nearest_RK = values_RK.astype(np.float16)
    above_RK = nearest_RK.astype(np.float64) > values_RK
    return (nearest_RK.view(np.uint16) - above_RK).astype(np.uint16).view(np.float16)
