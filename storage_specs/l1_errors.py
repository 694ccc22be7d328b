"""What storing the values of many rows cost, small enough for every shard's record: L1 errors as a histogram.

Bin b counts the errors above 2^((b - 1) / 8) and at most 2^(b / 8), so that a percentile is known within 9 %.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS_PER_OCTAVE = 8
MOST_BIN = 400  # an error is at most 2, and none below SMALLEST is told from it
SMALLEST = 2.0**-40  # smaller errors, and none at all, are counted as this one


@dataclass(frozen=True, kw_only=True)
class L1Errors:
    """max, sum: of all rows' errors. histogram: {bin: rows}."""

    max: float
    sum: float
    histogram: dict[int, int]

    @classmethod
    def of(cls, error_N: np.ndarray) -> "L1Errors":
        bins_N = np.ceil(np.log2(np.maximum(error_N, SMALLEST)) * BINS_PER_OCTAVE).astype(np.int64)
        bins, counts = np.unique(bins_N, return_counts=True)
        histogram = dict(zip(bins.tolist(), counts.tolist(), strict=True))
        return cls(max=float(error_N.max(initial=0)), sum=math.fsum(error_N), histogram=histogram)

    @classmethod
    def merged(cls, parts: Iterable["L1Errors"]) -> "L1Errors":
        parts = list(parts)
        histogram: Counter[int] = Counter()
        for part in parts:
            histogram.update(part.histogram)
        return cls(
            max=max((part.max for part in parts), default=0.0),
            sum=math.fsum(part.sum for part in parts),
            histogram=dict(sorted(histogram.items())),
        )

    @classmethod
    def from_json(cls, value: Any) -> "L1Errors":
        """Raises ValueError, TypeError or KeyError where `value` is not what `to_json` makes."""
        if set(value) != {"max", "sum", "histogram"} or not all(value[name] >= 0 for name in ("max", "sum")):
            raise ValueError(f"L1 errors are {value!r:.200}")
        pairs = [(bin_, count) for bin_, count in value["histogram"]]
        if not all(type(bin_) is type(count) is int and abs(bin_) <= MOST_BIN and count > 0 for bin_, count in pairs):
            raise ValueError(f"the histogram of L1 errors is {value['histogram']!r:.200}")
        return cls(max=value["max"], sum=value["sum"], histogram=dict(pairs))

    def to_json(self) -> dict[str, Any]:
        return {"max": self.max, "sum": self.sum, "histogram": [list(pair) for pair in sorted(self.histogram.items())]}

    @property
    def rows(self) -> int:
        return sum(self.histogram.values())

    @property
    def mean(self) -> float:
        return self.sum / max(1, self.rows)

    def percentile(self, share: float) -> float:
        """An error that at least this share of the rows does not exceed; 0 where there are no rows."""
        left = share * self.rows
        for bin_, count in sorted(self.histogram.items()):
            left -= count
            if left <= 0:
                return min(self.max, 2.0 ** (bin_ / BINS_PER_OCTAVE))
        return self.max
