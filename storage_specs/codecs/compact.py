"""The profile `compact`: probabilities as whole steps of 2^-b, b = 13, stored as the sorted row's conjugate.

A row is an apportionment of S = 2^b steps over its K values q_1 >= ... >= q_K and its tail t, by largest remainders: no
other whole numbers that sum to S are nearer in L1, order is kept, and the error is at most (K + 1) / 2 steps. Uniform
steps in probability are what L1 asks for; decoded values and tail are exact in float32 and sum to exactly 1.

Stored are the drops d_i = q_i - q_(i+1), with q_(K+1) = 0, but not d_1: it follows from t + sum_i i d_i = S, and the
tail is the cheaper number. So any whole numbers with t + sum_(i>1) i d_i <= S are one row, sorted by construction.
d_i <= S / i fits a byte from rank 2^(b-8) + 1 on: the first columns (t, d_2, d_3, ...) are two bytes, the others one.

    steps_low, steps_high  uint8 (N, min(K, 2^(b-8)))  the first columns, as low and high bytes
    steps_deep             uint8 (N, K - 2^(b-8))      the others, where there are any

Legend: N rows, K head values, B rows of one block, W two-byte columns.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from storage_specs.codecs.base import Arrays, ArraySpec, RowValues, refuse_bad, row_blocks
from storage_specs.codecs.steps import DECODED_AT_ONCE, apportion, drops, sum_onward
from storage_specs.errors import ConfigError

# Measured on 8,192 real Gemma-3 rows, k = 64 (scripts/rate_error.py): mean L1 error 1.9e-3, largest 2.9e-3, of 3.97e-3
# that are possible; 21.4 bytes a row in Zarr, 23.0 in Parquet (the columns' order-0 entropy: 20.2). Tried and left,
# with the bytes they save: rows of a chunk in the order of their first value, 0.9, but then no slice decodes alone;
# rounding by rate and distortion along a trellis, 0.5; two drops a byte, coarser steps for the first ranks, 0.
STEP_BITS = 13


@dataclass(frozen=True, kw_only=True)
class CompactCodec:
    """Whole steps of 2^-step_bits. Raises ConfigError unless step_bits is from 8 to 15."""

    k: int
    step_bits: int = STEP_BITS
    profile: ClassVar[str] = "compact"

    def __post_init__(self) -> None:
        if type(self.step_bits) is not int or not 8 <= self.step_bits <= 15:
            raise ConfigError(f"step_bits is {self.step_bits!r}, but must be from 8 to 15")

    @property
    def parameters(self) -> dict[str, object]:
        return {"step_bits": self.step_bits}

    @property
    def steps(self) -> int:
        """S, what a whole row sums to."""
        return 1 << self.step_bits

    @property
    def max_l1_error(self) -> float:
        """Half a step for each of K + 1 parts: see `apportion`."""
        return min(2.0, (self.k + 1) / 2 / self.steps)

    @property
    def wide(self) -> int:
        """W: columns that need two bytes."""
        return min(self.k, self.steps >> 8)

    def arrays(self) -> tuple[ArraySpec, ...]:
        byte = np.dtype(np.uint8)
        specs = (
            # Each rank has its own distribution: short blocks of few columns get entropy codes of their own.
            ArraySpec(
                name="steps_low", dtype=byte, width=self.wide, rank_major=True, shuffle="noshuffle", block_columns=4
            ),
            ArraySpec(name="steps_high", dtype=byte, width=self.wide, rank_major=True, shuffle="bitshuffle"),
            ArraySpec(name="steps_deep", dtype=byte, width=self.k - self.wide, rank_major=True, shuffle="bitshuffle"),
        )
        return specs if self.k > self.wide else specs[:2]

    def encode(self, values: RowValues) -> dict[str, np.ndarray]:
        refuse_bad(values, self.k)
        columns_NK = np.empty(values.probs.shape, np.uint16)
        for rows in row_blocks(*columns_NK.shape):
            parts = np.concatenate([values.probs[rows], values.tail_mass[rows, None]], axis=1, dtype=np.float64)
            steps_BK1 = apportion(parts / parts.sum(axis=1, keepdims=True), self.steps)
            columns_NK[rows] = drops(steps_BK1[:, :-1])
            columns_NK[rows, 0] = steps_BK1[:, -1]
        first_NW = columns_NK[:, : self.wide]
        arrays = {"steps_low": first_NW.astype(np.uint8), "steps_high": (first_NW >> 8).astype(np.uint8)}
        if self.k > self.wide:
            arrays["steps_deep"] = columns_NK[:, self.wide :].astype(np.uint8)
        return arrays

    def decode(self, arrays: Arrays) -> RowValues:
        rows, unit = len(arrays["steps_low"]), np.float32(1 / self.steps)
        probs_NK, tail_N = np.empty((rows, self.k), np.float32), np.empty(rows, np.float32)
        for block in row_blocks(rows, self.k, DECODED_AT_ONCE):
            steps_KB = self._columns(arrays, block)
            tail_B = steps_KB[0].copy()
            sum_onward(steps_KB)
            steps_KB[0] = self.steps - tail_B - steps_KB[1:].sum(axis=0, dtype=np.uint16)
            np.multiply(steps_KB.T, unit, out=probs_NK[block])
            np.multiply(tail_B, unit, out=tail_N[block])
        return RowValues(probs=probs_NK, tail_mass=tail_N)

    def problem_of(self, arrays: Arrays) -> str | None:
        weights_K = np.arange(1, self.k + 1, dtype=np.float32)  # the tail counts once, d_i counts i times
        for block in row_blocks(len(arrays["steps_low"]), self.k, DECODED_AT_ONCE):
            # float32 is exact to 2^24, and sums of what is not negative do not come back from beyond
            if (weights_K @ self._columns(arrays, block).astype(np.float32) > self.steps).any():
                return f"the steps of a row sum to more than {self.steps}"
        return None

    def _columns(self, arrays: Arrays, rows: slice) -> np.ndarray:
        """(K, B) uint16: tail, d_2, d_3, ..., d_K."""
        columns_KB = np.empty((self.k, rows.stop - rows.start), np.uint16)
        columns_KB[: self.wide] = arrays["steps_high"][rows].T
        columns_KB[: self.wide] <<= 8
        columns_KB[: self.wide] |= arrays["steps_low"][rows].T
        if self.k > self.wide:
            columns_KB[self.wide :] = arrays["steps_deep"][rows].T
        return columns_KB
