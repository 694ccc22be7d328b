"""The profile `exact`: the teacher's float32 values, bit for bit.

    prob_drops  uint32 (N, K)   the probabilities' float32 bits, each less those of the next rank (`float_bits`)
    tail_mass   float32 (N,)

A row whose values and tail sum to 1 within 5e-7 (float64) is kept as it is. A teacher's own softmax may be off by
more; then the tail gives way, and where the head alone exceeds 1 the head is scaled to sum to 1. So "exact" means: the
probabilities are the teacher's bits, unless they sum to more than 1 + 5e-7; what gave way is part of the measured
error.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from storage_specs.codecs.base import DECODED_TOLERANCE, Arrays, ArraySpec, RowValues, refuse_bad, row_blocks
from storage_specs.codecs.float_bits import bit_drops, exceeds, floats_of

KEPT_TOLERANCE = DECODED_TOLERANCE / 2  # the other half is for sums taken in another order


@dataclass(frozen=True, kw_only=True)
class ExactCodec:
    """float32 values of k ranks and their tail; L1 error 0 for rows that sum to 1 within 5e-7."""

    k: int
    profile: ClassVar[str] = "exact"
    parameters: ClassVar[dict[str, object]] = {}
    max_l1_error: ClassVar[float] = 0.0

    def arrays(self) -> tuple[ArraySpec, ...]:
        return (
            ArraySpec(name="prob_drops", dtype=np.dtype(np.uint32), width=self.k, rank_major=True),
            ArraySpec(name="tail_mass", dtype=np.dtype(np.float32), width=None, rank_major=False),
        )

    def encode(self, values: RowValues) -> dict[str, np.ndarray]:
        refuse_bad(values, self.k)
        probs_NK, tail_N = values.probs.copy(), values.tail_mass.copy()
        for rows in row_blocks(*probs_NK.shape):
            sum_B = probs_NK[rows].sum(axis=1, dtype=np.float64)
            off_B = np.abs(sum_B + tail_N[rows] - 1) > KEPT_TOLERANCE
            above_B = sum_B > 1 + KEPT_TOLERANCE
            probs_NK[rows][above_B] = probs_NK[rows][above_B] / sum_B[above_B, None]
            tail_N[rows][off_B] = np.clip(1 - sum_B[off_B], 0, 1)
        return {"prob_drops": bit_drops(probs_NK), "tail_mass": tail_N}

    def decode(self, arrays: Arrays) -> RowValues:
        return RowValues(probs=floats_of(arrays["prob_drops"]), tail_mass=np.array(arrays["tail_mass"]))

    def problem_of(self, arrays: Arrays) -> str | None:
        if exceeds(arrays["prob_drops"], 1 + DECODED_TOLERANCE):
            return "a probability is above 1, or not a number"
        if not (arrays["tail_mass"] >= 0).all():  # False for what is not a number
            return "a tail mass is negative, or not a number"
        for rows in row_blocks(*arrays["prob_drops"].shape):
            sum_B = floats_of(arrays["prob_drops"][rows]).sum(axis=1, dtype=np.float64)
            if not (np.abs(sum_B + arrays["tail_mass"][rows] - 1) <= DECODED_TOLERANCE).all():
                return f"probabilities and tail mass of a row do not sum to 1 within {DECODED_TOLERANCE}"
        return None
