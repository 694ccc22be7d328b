"""The sketch: a whole sorted vocabulary in K head values and J masses of the tail between log-spaced ranks.

Inside bin j (ranks `rank_edges[j]` + 1 to `rank_edges[j + 1]`, counted from 1) the sorted tail is taken for a power law
c_j r^(s_j): straight in log-log. The slope s_j is the mean of the slopes to the neighbouring bins' centres (for the
first bin, to the last head value), never positive; c_j makes the bin's mass exact. Rank r gets the law's integral over
(r - 1/2, r + 1/2), so that masses are exact however wide the bin.

Legend: T rows, K head values, J tail bins, V words of the teacher.
"""

import numpy as np

from storage_specs.errors import ConfigError

__all__ = ["bin_masses", "expand_sorted", "log_rank_edges", "power_laws"]

# A bin without mass still needs a logarithm.
SMALLEST_MASS = 1e-30
# A power law needs a slope other than 0 and -1 for its closed forms; this far away is close enough.
STEEPEST, FLATTEST, NEAR_ONE = -50.0, -1e-3, 1e-2


def log_rank_edges(k: int, vocab_size: int, bins: int) -> np.ndarray:
    """(J + 1,) int64 edges, ascending: the first k, the last vocab_size, J <= bins (fewer where ranks are few).

    Raises ConfigError unless 1 <= k < vocab_size and bins >= 1.
    """
    if not 1 <= k < vocab_size or bins < 1:
        raise ConfigError(f"sketch of {bins} bins over ranks {k}..{vocab_size}: needs 1 <= k < vocabulary, bins >= 1")
    return np.unique(np.round(np.geomspace(k, vocab_size, bins + 1)).astype(np.int64))


def bin_masses(sorted_TV: np.ndarray, rank_edges: np.ndarray) -> np.ndarray:
    """(T, J) float64 masses between the edges of whole distributions (T, V), sorted descending."""
    return np.add.reduceat(np.asarray(sorted_TV, dtype=np.float64), np.asarray(rank_edges)[:-1], axis=1)


def power_laws(probs_TK: np.ndarray, tail_bins_TJ: np.ndarray, rank_edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope of every bin, and log-density where it starts: two (T, J) float64 arrays."""
    edges = np.asarray(rank_edges, dtype=np.float64)
    masses = np.maximum(np.asarray(tail_bins_TJ, dtype=np.float64), SMALLEST_MASS)
    log_density = np.log(masses / np.diff(edges))
    log_centre = 0.5 * (np.log(edges[:-1] + 0.5) + np.log(edges[1:] + 0.5))
    head_end = np.log(np.maximum(np.asarray(probs_TK, dtype=np.float64)[:, -1:], SMALLEST_MASS))
    steps = np.diff(np.concatenate([head_end, log_density], 1), axis=1)
    steps = steps / np.diff(np.concatenate([[np.log(edges[0])], log_centre]))
    slopes = np.concatenate([(steps[:, :-1] + steps[:, 1:]) / 2, steps[:, -1:]], 1)
    slopes = np.clip(slopes, STEEPEST, FLATTEST)
    slopes = np.where(np.abs(slopes + 1) < NEAR_ONE, -1 - NEAR_ONE, slopes)
    start = edges[:-1] + 0.5
    unit_mass = start * _integral(np.ones_like(start), (edges[1:] + 0.5) / start, slopes)
    return slopes, np.log(masses) - np.log(unit_mass)


def expand_sorted(probs_TK: np.ndarray, tail_bins_TJ: np.ndarray, rank_edges: np.ndarray) -> np.ndarray:
    """(T, V) float64: the whole sorted distribution that head and tail bins stand for, V = the last edge.

    Every bin's mass is exact; its values follow the bin's power law. The reference for every faster path. Raises
    ConfigError when the three shapes do not belong together.
    """
    edges = np.asarray(rank_edges, dtype=np.int64)
    k, bins = probs_TK.shape[1], tail_bins_TJ.shape[1]
    if edges.shape != (bins + 1,) or edges[0] != k or (np.diff(edges) < 1).any():
        raise ConfigError(f"{k} head values and {bins} bins do not fit the rank edges {edges.tolist()}")
    slopes, log_starts = power_laws(probs_TK, tail_bins_TJ, edges)
    rank = np.arange(edges[0] + 1, edges[-1] + 1)
    owner = np.searchsorted(edges, rank, side="left") - 1
    start = edges[owner] + 0.5
    tail = np.exp(log_starts[:, owner]) * start
    tail *= _integral((rank - 0.5) / start, (rank + 0.5) / start, slopes[:, owner])
    tail *= (np.asarray(tail_bins_TJ) > 0)[:, owner]
    whole = np.concatenate([np.asarray(probs_TK, dtype=np.float64), tail], 1)
    return -np.sort(-whole, axis=1)


def _integral(start: np.ndarray, stop: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """The integral of x^slope from start to stop; slope is not -1."""
    power = slope + 1
    return (np.power(stop, power) - np.power(start, power)) / power
