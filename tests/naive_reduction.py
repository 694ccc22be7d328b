"""The naive reference of the row reduction: one full sort of float64 log-probabilities per row.

Legend: B rows, V vocabulary, K top-k ranks, J tail bins, W = 1 + K + J.
"""

import numpy as np
import torch

from storage_specs.sketch import bin_masses

VALUE_TOLERANCE = 5e-6  # nats: a float32 log-sum-exp over the vocabulary


def assert_rows_equal_a_full_sort(
    values_BW: torch.Tensor,
    ids_BK: torch.Tensor,
    logits_BV: torch.Tensor,
    target_B: torch.Tensor,
    k: int,
    rank_edges: np.ndarray | None,
    bin_tolerance: float = 1e-4,
) -> None:
    """ids exactly (equal values by ascending id), log-probabilities within float32, bins within their tolerance."""
    values, ids = values_BW.cpu().numpy().astype(np.float64), ids_BK.cpu().numpy()
    logprobs_BV = logits_BV.double().log_softmax(-1).cpu().numpy()
    order_BV = np.lexsort((np.broadcast_to(np.arange(logprobs_BV.shape[1]), logprobs_BV.shape), -logprobs_BV), axis=-1)
    sorted_BV = np.take_along_axis(logprobs_BV, order_BV, axis=1)
    np.testing.assert_array_equal(ids, order_BV[:, :k])
    gold_B1 = np.take_along_axis(logprobs_BV, target_B.cpu().numpy()[:, None], axis=1)
    expected_BK = np.concatenate([gold_B1, sorted_BV[:, :k]], axis=1)
    np.testing.assert_allclose(values[:, : 1 + k], expected_BK, rtol=1e-6, atol=VALUE_TOLERANCE)
    if rank_edges is None:
        assert values.shape[1] == 1 + k
        return
    expected_BJ = bin_masses(np.exp(sorted_BV), rank_edges)
    np.testing.assert_allclose(values[:, 1 + k :], expected_BJ, rtol=0, atol=bin_tolerance)
    np.testing.assert_allclose(values[:, 1 + k :].sum(1), expected_BJ.sum(1), rtol=0, atol=1e-6)
