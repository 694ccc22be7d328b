"""The sketch: exact masses, descending values, close to the distribution that it was made of."""

import numpy as np
import pytest

from storage_specs.errors import ConfigError
from storage_specs.sketch import bin_masses, expand_sorted, log_rank_edges


def distributions(rows: int, vocab_size: int, scale: float = 3.0) -> np.ndarray:
    logits = scale * np.random.default_rng(0).standard_normal((rows, vocab_size))
    probs = np.exp(logits - logits.max(1, keepdims=True))
    return -np.sort(-probs / probs.sum(1, keepdims=True), axis=1)


@pytest.mark.parametrize(
    ("k", "vocab_size", "bins"), [(16, 49_152, 16), (64, 1000, 8), (1, 300, 4), (64, 70, 16), (9, 10, 1)]
)
def test_masses_are_exact(k, vocab_size, bins):
    edges = log_rank_edges(k, vocab_size, bins)
    assert edges[0] == k
    assert edges[-1] == vocab_size
    assert (np.diff(edges) > 0).all()
    assert len(edges) <= bins + 1
    sorted_TV = distributions(5, vocab_size)
    masses_TJ = bin_masses(sorted_TV, edges)
    np.testing.assert_allclose(masses_TJ.sum(1), sorted_TV[:, k:].sum(1), rtol=1e-12)
    rebuilt_TV = expand_sorted(sorted_TV[:, :k], masses_TJ, edges)
    assert rebuilt_TV.shape == sorted_TV.shape
    np.testing.assert_allclose(rebuilt_TV.sum(1), 1, rtol=1e-9)
    assert (np.diff(rebuilt_TV, axis=1) <= 0).all()
    assert (rebuilt_TV >= 0).all()


def test_masses_of_every_bin_survive_where_nothing_had_to_be_sorted_anew():
    sorted_TV = distributions(8, 5000, scale=2.0)
    edges = log_rank_edges(16, 5000, 12)
    masses_TJ = bin_masses(sorted_TV, edges)
    rebuilt_TV = expand_sorted(sorted_TV[:, :16], masses_TJ, edges)
    np.testing.assert_allclose(bin_masses(rebuilt_TV, edges), masses_TJ, rtol=0.02)
    assert np.abs(rebuilt_TV - sorted_TV).sum(1).max() < 0.02


def test_a_power_law_is_rebuilt_and_empty_bins_stay_empty():
    rank = np.arange(1, 2001)
    law_1V = (rank**-1.3 / (rank**-1.3).sum())[None]
    edges = log_rank_edges(16, 2000, 12)
    rebuilt_1V = expand_sorted(law_1V[:, :16], bin_masses(law_1V, edges), edges)
    assert np.abs(rebuilt_1V - law_1V).sum() < 2e-3
    sure_1V = np.zeros((1, 2000))
    sure_1V[0, :3] = [0.5, 0.3, 0.2]
    np.testing.assert_array_equal(expand_sorted(sure_1V[:, :16], bin_masses(sure_1V, edges), edges), sure_1V)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="1 <= k"):
        log_rank_edges(100, 100, 4)
    with pytest.raises(ConfigError, match="do not fit"):
        expand_sorted(np.ones((1, 4)) / 4, np.zeros((1, 2)), np.array([4, 8]))
