"""The profile `half`: sorted probabilities as float16. The tail mass is not stored: it follows exactly.

    prob_drops  uint16 (N, K)   the probabilities' float16 bits, each less those of the next rank (`float_bits`)

A float16 is a multiple of 2^-24, so the sum of a row, and 1 minus that sum, are exact in
float64 and the tail mass is exact in float32 too: decoded rows satisfy sum + tail == 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from storage_specs.codecs.base import Arrays, ArraySpec, RowValues, refuse_bad, row_blocks
from storage_specs.codecs.float_bits import bit_drops, exceeds, floats_of


@dataclass(frozen=True, kw_only=True)
class HalfCodec:
    """float16 values of k ranks."""

    k: int
    profile: ClassVar[str] = "half"
    parameters: ClassVar[dict[str, object]] = {}

    @property
    def max_l1_error(self) -> float:
        """Toward zero a value loses at most 2^-10 of itself, or 2^-24 below 2^-14; the tail gains what they lose."""
        return 2 * (2.0**-10 + self.k * 2.0**-24)

    def arrays(self) -> tuple[ArraySpec, ...]:
        return (ArraySpec(name="prob_drops", dtype=np.dtype(np.uint16), width=self.k, rank_major=True),)

    def encode(self, values: RowValues) -> dict[str, np.ndarray]:
        """To nearest; rows whose rounded values would sum to more than 1 are rounded toward zero instead.

        Rows that exceed 1 already (float32 softmax does) are first scaled to sum to 1.
        """
        refuse_bad(values, self.k)
        stored_NK = np.empty(values.probs.shape, np.float16)
        for rows in row_blocks(*stored_NK.shape):
            exact_BK = values.probs[rows].astype(np.float64)
            exact_BK /= np.maximum(exact_BK.sum(axis=1), 1)[:, None]
            rounded_BK = exact_BK.astype(np.float16)
            too_much_B = rounded_BK.sum(axis=1, dtype=np.float64) > 1
            rounded_BK[too_much_B] = _toward_zero(exact_BK[too_much_B])
            stored_NK[rows] = rounded_BK
        return {"prob_drops": bit_drops(stored_NK)}

    def decode(self, arrays: Arrays) -> RowValues:
        probs_NK = floats_of(arrays["prob_drops"]).astype(np.float32)
        return RowValues(probs=probs_NK, tail_mass=(1 - probs_NK.sum(axis=1, dtype=np.float64)).astype(np.float32))

    def problem_of(self, arrays: Arrays) -> str | None:
        if exceeds(arrays["prob_drops"], 1):
            return "a probability is above 1, or not a number"
        for rows in row_blocks(*arrays["prob_drops"].shape):
            if (floats_of(arrays["prob_drops"][rows]).sum(axis=1, dtype=np.float64) > 1).any():
                return "probabilities of a row sum to more than 1"
        return None


def _toward_zero(values_BK: np.ndarray) -> np.ndarray:
    """float16 not above the values, which are not negative."""
    nearest_BK = values_BK.astype(np.float16)
    above_BK = nearest_BK.astype(np.float64) > values_BK
    return (nearest_BK.view(np.uint16) - above_BK).astype(np.uint16).view(np.float16)
