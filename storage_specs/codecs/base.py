"""What a value codec is: rows of sorted probabilities become named arrays of numbers, and come back.

A codec decides WHICH numbers are kept, the stores how their bytes are packed. Every profile's decoded rows satisfy
p >= 0, p sorted descending, tail >= 0 and |sum + tail - 1| <= 1e-6, so that no reader has to repair what it reads.

Legend: N rows, K head values, J tail bins, B rows of one block.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

INPUT_TOLERANCE = 1e-3  # what a teacher's own softmax may be off by in sum
DECODED_TOLERANCE = 1e-6
VALUES_AT_ONCE = 1 << 20  # bounds what encoding and measuring need beside their input

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class RowValues:
    """probs: (N, K) float32, descending. tail_mass: (N,) float32, the mass of all other words.

    tail_bins: (N, J) float32, the sorted tail's mass between consecutive rank edges, or None. Their sum is tail_mass.
    """

    probs: np.ndarray
    tail_mass: np.ndarray
    tail_bins: np.ndarray | None = None

    def rows(self, rows: slice) -> "RowValues":
        """Some of the rows, without a copy."""
        bins = None if self.tail_bins is None else self.tail_bins[rows]
        return RowValues(probs=self.probs[rows], tail_mass=self.tail_mass[rows], tail_bins=bins)


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array that a codec keeps. width: numbers per row, shape (N, width); None is one number, shape (N,).

    The rest says how its bytes pack best. rank_major: all rows' first numbers side by side, then all second ones, for
    neighbours along the rows look alike; such an array decodes fastest in column-major (Fortran) order. shuffle: by
    blosc's names. block_columns: how many columns of a chunk one compressed block holds.

    In Parquet the rank-major layout is one fixed_size_binary[width * itemsize] per row under BYTE_STREAM_SPLIT, which
    puts all rows' first bytes side by side, then all second ones, with zstd level 15 and pages of 128 KiB. Measured,
    compact k = 64: 22.8 bytes a row, read by pyarrow in 140 ns; lists of numbers, rank-major per document, under
    DELTA_BINARY_PACKED: 35 bytes and 540 ns; lists under BYTE_STREAM_SPLIT 24.8 and 500 ns. Ids of 16 ranks: 77 ns
    instead of 220 ns as lists of numbers, in the same bytes.
    """

    name: str
    dtype: np.dtype
    width: int | None
    rank_major: bool
    shuffle: Literal["noshuffle", "shuffle", "bitshuffle"] = "shuffle"
    block_columns: int = 32

    def shape(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.width is None else (rows, self.width)


class Codec(Protocol):
    """A profile with its parameters. Rows are independent: any slice of rows decodes alone, to the same bits."""

    profile: str
    k: int

    @property
    def parameters(self) -> dict[str, object]:
        """What `codec_of` needs beside profile and k to make this codec again, as JSON values."""

    @property
    def max_l1_error(self) -> float:
        """Proven bound of the L1 error of a row that sums to 1; one that is off by d may cost d more (and 2^-23)."""

    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays that `encode` makes and `decode` takes, in storage order."""

    def encode(self, values: RowValues) -> dict[str, np.ndarray]:
        """The arrays of N rows. Raises ValueError, saying what is wrong, for rows that are no distributions."""

    def decode(self, arrays: Arrays) -> RowValues:
        """The rows of arrays without a problem."""

    def problem_of(self, arrays: Arrays) -> str | None:
        """What is wrong with arrays of the right names, types and shapes; None for what `decode` may be given."""


def l1_error(values: RowValues, decoded: RowValues) -> np.ndarray:
    """(N,) float64: sum |p - decoded p| + |tail - decoded tail|; where there are tail bins they replace the tail.

    The one place where the loss of storing is measured, for every profile: `max_l1_error` bounds it.
    """
    parts = [(values.probs, decoded.probs)]
    if values.tail_bins is None:
        parts.append((values.tail_mass[:, None], decoded.tail_mass[:, None]))
    else:
        parts.append((values.tail_bins, decoded.tail_bins))
    error_N = np.zeros(len(values.probs))
    for given, found in parts:
        for rows in row_blocks(*given.shape):
            error_N[rows] += np.abs(given[rows].astype(np.float64) - found[rows]).sum(axis=1)
    return error_N


def encode_measured(codec: Codec, values: RowValues) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays, and the L1 error (N,) float64 that they cost, by decoding what was encoded. Raises ValueError."""
    arrays = codec.encode(values)
    error_N = np.zeros(len(values.probs))
    for rows in row_blocks(*values.probs.shape):
        decoded = codec.decode({name: array[rows] for name, array in arrays.items()})
        error_N[rows] = l1_error(values.rows(rows), decoded)
    return arrays, error_N


def row_blocks(rows: int, width: int, values_at_once: int = VALUES_AT_ONCE) -> Iterator[slice]:
    """Slices that cover the rows, each of about as many values."""
    step = max(1, values_at_once // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def refuse_bad(values: RowValues, k: int, bins: int | None = None) -> None:
    """Raises ValueError unless the values are float32 rows of (almost) whole distributions, sorted, of these widths."""
    rows = len(values.probs)
    expected = {"probs": (rows, k), "tail_mass": (rows,), "tail_bins": (rows, bins)}
    for name, shape in expected.items():
        array = getattr(values, name)
        if name == "tail_bins" and bins is None:
            if array is not None:
                raise ValueError("tail_bins are given, but this profile keeps none")
            continue
        if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != np.float32:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise ValueError(f"{name} must be float32 {shape}, found {found}")
    for block in row_blocks(rows, k):
        problem = _value_problem(values.rows(block))
        if problem:
            raise ValueError(problem)


def _value_problem(values: RowValues) -> str | None:
    parts = [array for array in (values.probs, values.tail_mass, values.tail_bins) if array is not None]
    if not all(np.isfinite(array).all() for array in parts):
        return "probs, tail_mass or tail_bins hold a value that is not finite"
    if any((array < 0).any() for array in parts):
        return "probs, tail_mass or tail_bins hold a negative value"
    if (values.probs[:, 1:] > values.probs[:, :-1]).any():
        return "probs are not sorted descending"
    sums = {"tail_mass": values.tail_mass.astype(np.float64)}
    if values.tail_bins is not None:
        sums["tail_bins"] = values.tail_bins.sum(axis=1, dtype=np.float64)
    for name, tail_B in sums.items():
        total_B = values.probs.sum(axis=1, dtype=np.float64) + tail_B
        off_B = np.abs(total_B - 1)
        if (off_B > INPUT_TOLERANCE).any():
            worst = total_B[off_B.argmax()]
            return f"probs and {name} of a row sum to {worst:.6f}, not to 1 within {INPUT_TOLERANCE}"
    return None
