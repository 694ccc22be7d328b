"""The tail's power laws in torch are those of `storage_specs.sketch`."""

import numpy as np
import pytest
import torch

from distill.teacher_tail import area_above, tail_laws
from storage_specs.sketch import bin_masses, expand_sorted, log_rank_edges, power_laws


@pytest.mark.parametrize(("k", "u", "bins"), [(16, 5000, 16), (64, 262_144, 16), (4, 900, 8)])
def test_laws_and_areas_agree_with_the_specification(k, u, bins):
    logits = 3 * np.random.default_rng(1).standard_normal((3, u))
    sorted_NU = -np.sort(-np.exp(logits) / np.exp(logits).sum(1, keepdims=True), axis=1)
    edges = log_rank_edges(k, u, bins)
    bins_NJ = bin_masses(sorted_NU, edges).astype(np.float32)
    head_NK = sorted_NU[:, :k].astype(np.float32)
    laws = tail_laws(torch.from_numpy(head_NK), torch.from_numpy(bins_NJ), torch.from_numpy(edges))
    slopes, log_starts = power_laws(head_NK, bins_NJ, edges)
    np.testing.assert_allclose(laws.slopes_NJ, slopes, rtol=1e-6)
    np.testing.assert_allclose(laws.log_starts_NJ, log_starts, rtol=1e-6)
    np.testing.assert_allclose(laws.edges_J1, edges + 0.5)
    # The area between a level and the values above it, of the laws and of the values that they stand for.
    tail_NU = expand_sorted(head_NK, bins_NJ, edges)[:, k:]
    log_levels = np.log(head_NK[:, -1:]) - np.linspace(0.5, 8, 9)
    areas = area_above(torch.from_numpy(log_levels).float(), torch.from_numpy(np.exp(log_levels)).float(), laws)
    expected = np.stack([np.maximum(tail_NU - level[:, None], 0).sum(1) for level in np.exp(log_levels).T], 1)
    np.testing.assert_allclose(areas, expected, rtol=1e-3, atol=3e-3)
