"""The profile `sketch`: a whole vocabulary as K head values and J masses of the sorted tail, in steps of 2^-b, b = 11.

`storage_specs.sketch.expand_sorted` makes the whole sorted distribution of them. A row apportions S = 2^b steps over
its K values and J bins, by largest remainders: neighbouring errors have opposite signs, so that a sum over ranks such
as ULD sees far less of them than their L1 norm. An empty bin decodes as 2^-21 / J, not as 0: the power laws of its
neighbours need a direction (measured: 8 % less error). Values are exact in float32; a row sums to 1 within 2^-21.

    sketch  uint16 (N, J + K - 1)   columns 1 to J: the bins' second differences; columns J + 1 on: the drops d_2 to d_K

d_i = q_i - q_(i+1), with q_(K+1) = 0; d_1 is not stored, it follows from sum_j b_j + sum_i i d_i = S. Bin masses are
smooth along log-rank: stored is r_j = b_j - 2 b_(j+1) + b_(j+2), bins beyond the last being 0, as z = 2 r where r >= 0,
else -2 r - 1. All modulo 2^16, so any whole numbers with sum_j b_j + sum_(i>1) i d_i <= S are one valid row.

Legend: N rows, K head values, J tail bins, B rows of one block, C columns.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from storage_specs.codecs.base import Arrays, ArraySpec, RowValues, refuse_bad, row_blocks
from storage_specs.codecs.steps import DECODED_AT_ONCE, apportion, drops, sum_onward
from storage_specs.errors import ConfigError

# Measured on real Gemma-3 rows and the pair Gemma-3 to SmolLM2 (scripts/rate_error.py): 13.6 bytes a row in Zarr, mean
# absolute error of the full ULD 7.4e-4 (0.39 on average). 16 bins: 13.1 bytes, 8.1e-4; 12 bits: 16.5 bytes, 5.6e-4.
HEAD, BINS, STEP_BITS = 16, 20, 11
MOST_BINS = 256
ALL_EMPTY = 2.0**-21


@dataclass(frozen=True, kw_only=True)
class SketchCodec:
    """k head values and the masses between `rank_edges`: ascending, the first k, the last the vocabulary's size.

    Raises ConfigError for edges or step_bits (8 to 15) that cannot be.
    """

    k: int
    rank_edges: tuple[int, ...]
    step_bits: int = STEP_BITS
    profile: ClassVar[str] = "sketch"

    def __post_init__(self) -> None:
        edges = self.rank_edges
        if type(self.step_bits) is not int or not 8 <= self.step_bits <= 15:
            raise ConfigError(f"step_bits is {self.step_bits!r}, but must be from 8 to 15")
        if not isinstance(edges, (list, tuple)) or not all(type(edge) is int for edge in edges):
            raise ConfigError(f"rank_edges are {edges!r:.200}, but must be whole numbers")
        if not 2 <= len(edges) <= MOST_BINS + 1 or edges[0] != self.k or (np.diff(edges) < 1).any():
            raise ConfigError(
                f"rank_edges are {edges!r:.200}, but must ascend from k, which is {self.k}, with 1 to {MOST_BINS} bins"
            )
        object.__setattr__(self, "rank_edges", tuple(edges))

    @property
    def parameters(self) -> dict[str, object]:
        return {"rank_edges": list(self.rank_edges), "step_bits": self.step_bits}

    @property
    def bins(self) -> int:
        """J."""
        return len(self.rank_edges) - 1

    @property
    def steps(self) -> int:
        """S, what a whole row sums to."""
        return 1 << self.step_bits

    @property
    def max_l1_error(self) -> float:
        """Half a step for each of K + J parts (see `apportion`), and what empty bins decode as."""
        return min(2.0, (self.k + self.bins) / 2 / self.steps + ALL_EMPTY)

    def arrays(self) -> tuple[ArraySpec, ...]:
        width = self.bins + self.k - 1
        return (ArraySpec(name="sketch", dtype=np.dtype(np.uint16), width=width, rank_major=True, block_columns=2),)

    def encode(self, values: RowValues) -> dict[str, np.ndarray]:
        refuse_bad(values, self.k, self.bins)
        columns_NC = np.empty((len(values.probs), self.bins + self.k - 1), np.uint16)
        for rows in row_blocks(len(columns_NC), self.k + self.bins):
            parts = np.concatenate([values.probs[rows], values.tail_bins[rows]], axis=1, dtype=np.float64)
            steps = apportion(parts / parts.sum(axis=1, keepdims=True), self.steps)
            bends_BJ = drops(drops(steps[:, self.k :])).astype(np.int16)
            columns_NC[rows, : self.bins] = (bends_BJ << 1) ^ (bends_BJ >> 15)
            columns_NC[rows, self.bins :] = drops(steps[:, : self.k])[:, 1:]
        return {"sketch": columns_NC}

    def decode(self, arrays: Arrays) -> RowValues:
        sketch_NC, unit = arrays["sketch"], np.float32(1 / self.steps)
        empty = np.float32(ALL_EMPTY / self.bins)
        probs_NK = np.empty((len(sketch_NC), self.k), np.float32)
        bins_NJ, tail_N = np.empty((len(sketch_NC), self.bins), np.float32), np.empty(len(sketch_NC), np.float32)
        for rows in row_blocks(*sketch_NC.shape, DECODED_AT_ONCE):
            bins_JB = self._bins(sketch_NC[rows])
            mass_B = bins_JB.sum(axis=0, dtype=np.uint16)
            empties_B = (bins_JB == 0).sum(axis=0, dtype=np.uint16)
            bins_NJ[rows] = np.maximum(bins_JB.T * unit, empty)
            tail_N[rows] = mass_B / self.steps + empties_B * (ALL_EMPTY / self.bins)
            head_KB = np.empty((self.k, len(mass_B)), np.uint16)
            head_KB[1:] = sketch_NC[rows, self.bins :].T
            sum_onward(head_KB[1:])
            head_KB[0] = self.steps - mass_B - head_KB[1:].sum(axis=0, dtype=np.uint16)
            np.multiply(head_KB.T, unit, out=probs_NK[rows])
        return RowValues(probs=probs_NK, tail_mass=tail_N, tail_bins=bins_NJ)

    def problem_of(self, arrays: Arrays) -> str | None:
        ranks = np.arange(2, self.k + 1, dtype=np.float32)
        for rows in row_blocks(*arrays["sketch"].shape, DECODED_AT_ONCE):
            block_BC = arrays["sketch"][rows]
            # float32 is exact to 2^24, and sums of what is not negative do not come back from beyond
            total_B = self._bins(block_BC).sum(axis=0, dtype=np.float32)
            if (total_B + block_BC[:, self.bins :].astype(np.float32) @ ranks > self.steps).any():
                return f"the steps of a row sum to more than {self.steps}"
        return None

    def _bins(self, sketch_BC: np.ndarray) -> np.ndarray:
        """(J, B) uint16: the bins' steps, modulo 2^16."""
        bins_JB = np.empty((self.bins, len(sketch_BC)), np.uint16)
        bins_JB[...] = sketch_BC[:, : self.bins].T
        bins_JB[...] = (bins_JB >> 1) ^ -(bins_JB & 1)
        sum_onward(bins_JB)
        sum_onward(bins_JB)
        return bins_JB
