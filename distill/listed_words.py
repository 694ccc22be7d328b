"""Log-probabilities of a few listed words per row, without a float32 copy of the logits or a softmax in memory.

The log-sum-exp of a row is its cross entropy plus the label's logit, and cross entropy is what the fused pass computes
anyway (`distill.fused`). What is left is a gather: forward (N, X), backward one zero-filled (N, V) in the logits' own
dtype, which autograd adds to the fused pass's gradient.

Legend: N rows, V student words, X listed words, I mapped ranks.
"""

import torch

from distill.fused import Implementation, row_losses
from distill.fused_torch import SMALLEST_COMPLEMENT

__all__ = ["complement_of", "listed_logprobs", "xlogx_over"]


def listed_logprobs(
    logits_NV: torch.Tensor,
    words_NX: torch.Tensor,
    labels_N: torch.Tensor | None = None,
    nats_N: torch.Tensor | None = None,
    impl: Implementation | None = None,
) -> torch.Tensor:
    """(N, X) log q of every listed word, float32 (float64 of float64 logits), differentiable.

    words_NX: (N, X) int64. labels_N and nats_N: (N,), any word of finite logit per row and its cross entropy, where a
    pass over the logits has it already; without them that pass is made here, for the likeliest words.
    """
    if nats_N is None:
        labels_N = logits_NV.detach().argmax(1) if len(logits_NV) else words_NX.new_zeros(0)
        nats_N = row_losses(logits_NV, labels_N=labels_N, impl=impl).ce_N
    listed_NX = logits_NV.gather(1, torch.cat([words_NX, labels_N[:, None]], 1)).to(nats_N.dtype)
    return listed_NX[:, :-1] - listed_NX[:, -1:] - nats_N[:, None]


def complement_of(q_NX: torch.Tensor) -> torch.Tensor:
    """(N,) what is left to all other words, at least 1e-6 as in `mapped`: below that it is rounding error."""
    return (1 - q_NX.sum(1)).clamp(min=SMALLEST_COMPLEMENT)


def xlogx_over(p: torch.Tensor, log_p: torch.Tensor, log_m: torch.Tensor) -> torch.Tensor:
    """p ln(p / m) from logarithms, 0 (with gradient 0) where p is 0 and log_p minus infinity."""
    exists = p > 0
    return torch.where(exists, p * (torch.where(exists, log_p, 0.0) - torch.where(exists, log_m, 0.0)), 0.0)
