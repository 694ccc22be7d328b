"""What every engine is told and what rows it gives, in the one order in which all engines' rows are stored.

Legend: R rows of one window, K top-k ranks, J tail bins, L tokens of one window.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from storage_specs.errors import ConfigError, EngineError
from storage_specs.windows import Window

MASS_TOLERANCE = 1e-3  # a top-k that sums to more than 1 by this much, or a log-probability above it, is no rounding


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What every engine needs to know.

    model: a local Hugging Face folder. dtype: float32 | bfloat16 | float16. max_model_len: tokens; a window has at most
    `capacity` = max_model_len - 1, because vLLM needs room for one more. vocab_size: width of the logits. rank_edges:
    (J + 1,) ascending ranks from k to vocab_size between which the tail's mass is wanted, or None for no tail bins.
    arguments: further arguments of the engine's own, by its names (vLLM's EngineArgs).
    """

    model: str
    dtype: str
    max_model_len: int
    k: int
    vocab_size: int
    rank_edges: tuple[int, ...] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.vocab_size:
            raise ConfigError(f"k is {self.k}, but must be from 1 to the teacher's vocabulary size, {self.vocab_size}")
        if self.max_model_len < 2:
            raise ConfigError(f"max_model_len is {self.max_model_len}, but must be at least 2")
        edges = self.rank_edges
        if edges is not None and (
            len(edges) < 2 or (edges[0], edges[-1]) != (self.k, self.vocab_size) or sorted(set(edges)) != list(edges)
        ):
            raise ConfigError(f"rank_edges are {edges}, but must ascend from k, {self.k}, to {self.vocab_size}")

    @property
    def capacity(self) -> int:
        return self.max_model_len - 1

    @property
    def bins(self) -> int:
        """J, 0 where no tail bins are wanted."""
        return 0 if self.rank_edges is None else len(self.rank_edges) - 1


@dataclass(frozen=True, kw_only=True)
class WindowScores:
    """The teacher's rows of one window.

    gold_logprob (R,) float32, nats, of the token that followed. probs (R, K) float32, descending, equal ones by
    ascending id. token_ids (R, K) int64. tail_mass (R,) float32 = 1 - sum of probs, in float64, not below 0. tail_bins
    (R, J) float32: masses of the sorted tail between consecutive `rank_edges`, together the tail mass, or None.
    """

    gold_logprob: np.ndarray
    probs: np.ndarray
    token_ids: np.ndarray
    tail_mass: np.ndarray
    tail_bins: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in vars(self).values() if array is not None)


def window_scores(
    gold_R: np.ndarray, logprobs_RK: np.ndarray, token_ids_RK: np.ndarray, tail_bins_RJ: np.ndarray | None = None
) -> WindowScores:
    """Rows in storage order: by descending log-probability, then ascending id. EngineError for impossible rows."""
    order_RK = np.lexsort((token_ids_RK, -logprobs_RK), axis=-1)
    return ordered_scores(
        gold_R,
        np.take_along_axis(logprobs_RK, order_RK, axis=-1),
        np.take_along_axis(token_ids_RK, order_RK, axis=-1),
        tail_bins_RJ,
    )


def ordered_scores(
    gold_R: np.ndarray, logprobs_RK: np.ndarray, token_ids_RK: np.ndarray, tail_bins_RJ: np.ndarray | None = None
) -> WindowScores:
    """Rows that are in storage order already. EngineError for impossible rows."""
    if not (np.isfinite(gold_R).all() and np.isfinite(logprobs_RK).all()):
        raise EngineError(
            "the teacher returned log-probabilities that are not finite; its weights may be damaged, or its dtype too "
            "narrow: try --dtype float32"
        )
    if (gold_R > MASS_TOLERANCE).any():
        raise EngineError(f"the teacher returned a log-probability of {gold_R.max():.6f}, above 0: not a distribution")
    probs_RK = np.exp(logprobs_RK.astype(np.float32, copy=False))
    mass_R = probs_RK.sum(axis=-1, dtype=np.float64)
    if (mass_R > 1 + MASS_TOLERANCE).any():
        raise EngineError(f"the teacher's top probabilities sum to {mass_R.max():.6f}, more than 1: not a distribution")
    tail_R = np.clip(1 - mass_R, 0, 1)
    return WindowScores(
        gold_logprob=np.minimum(gold_R, 0).astype(np.float32),
        probs=probs_RK,
        token_ids=token_ids_RK.astype(np.int64),
        tail_mass=tail_R.astype(np.float32),
        tail_bins=None if tail_bins_RJ is None else _scaled(tail_bins_RJ, tail_R),
    )


def _scaled(tail_bins_RJ: np.ndarray, tail_R: np.ndarray) -> np.ndarray:
    """Bins that add up to the tail: both were rounded, each in its own way. A tail without a bin goes to the first."""
    bins_RJ = np.maximum(tail_bins_RJ, 0, dtype=np.float64)
    bins_RJ[bins_RJ.sum(axis=1) == 0, 0] = 1
    return (bins_RJ * (tail_R / bins_RJ.sum(axis=1))[:, None]).astype(np.float32)


def check_window(window: Window, config: EngineConfig) -> None:
    """Raises EngineError for a window that no engine can score: too long, or ids outside the vocabulary."""
    if len(window.ids) > config.capacity:
        raise EngineError(f"a window of {len(window.ids)} tokens exceeds the engine's {config.capacity}")
    if window.ids.min() < 0 or window.ids.max() >= config.vocab_size:
        raise EngineError(
            f"token id {int(window.ids.max())} is outside the teacher's vocabulary of {config.vocab_size}: "
            "the tokenizer is not this teacher's"
        )
