"""Whole numbers that stand for a distribution: apportionment, drops of sorted values, and their sums.

Legend: B rows of one block, M parts of a distribution, K ranks.
"""

import numpy as np

DECODED_AT_ONCE = 1 << 16  # values; what decoding works on stays in the second-level cache


def apportion(parts_BM: np.ndarray, steps: int) -> np.ndarray:
    """(B, M) int64: whole numbers near steps * parts that sum to `steps`, by largest remainders (Hamilton's method).

    parts: (B, M) float64, rows that sum to 1. No other whole numbers with this sum are nearer in L1; of equal
    remainders the first ones win, so that sorted parts stay sorted. All remainders sum to n, the number of those that
    are rounded up, so the L1 error is at most 2 n (M - n) / M <= M / 2 steps.
    """
    exact_BM = parts_BM * steps
    whole_BM = np.floor(exact_BM)
    left_B = (steps - whole_BM.sum(axis=1)).astype(np.int64)
    order_BM = np.argsort(whole_BM - exact_BM, axis=1, kind="stable")
    given_BM = np.empty(order_BM.shape, np.int64)
    np.put_along_axis(given_BM, order_BM, (np.arange(parts_BM.shape[1]) < left_B[:, None]).astype(np.int64), axis=1)
    return whole_BM.astype(np.int64) + given_BM


def drops(values_BM: np.ndarray) -> np.ndarray:
    """(B, M) like its argument: each number minus the next one, the last one as it is. `sum_onward` undoes it."""
    drops_BM = values_BM.copy()
    drops_BM[:, :-1] -= values_BM[:, 1:]
    return drops_BM


def sum_onward(drops_KB: np.ndarray) -> None:
    """In place: each rank becomes the sum from there to the last one, in log2 K passes of ever longer reach."""
    reach = 1
    while reach < len(drops_KB):
        drops_KB[:-reach] += drops_KB[reach:]
        reach *= 2
