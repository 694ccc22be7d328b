"""Chunk likelihoods between shared boundaries: how probable each model finds the same bytes.

Approximate Likelihood Matching, Minixhofer et al., arXiv 2503.20083: a chunk is a smallest run of tokens that begins
and ends at boundaries of both tokenizers (`distill.alignment`, groups), its likelihood the product of the probabilities
of its tokens on either side. Whether this chunk follows or not is a coin, and the coins are compared:

    a = p_T(chunk)^(1 / tau),  b = p_S(chunk)^(1 / tau)        loss = a ln(a / b) + (1 - a) ln((1 - a) / (1 - b))

the paper's binarised divergence with f = KL, tau = 100 by default (its code minimises the cross entropy of the coins,
which has the same gradient). Of the paper's parts neither the debiasing of outcomes nor the hidden-state loss is here.
Both logarithms are lowered by 1e-6, as in its code, so that a certain student (b = 1) still feels an uncertain teacher.
It needs gold_logprob only: no ids, no top k. Cost beside CE: none, its tokens' cross entropies are its inputs.

Legend: G chunks, M tokens of chunks.
"""

import math

import torch

from distill.losses import Reduction, reduce_rows
from storage_specs.errors import ConfigError

__all__ = ["chunk_logprobs", "likelihood_loss"]

SMALLEST_NATS = 1e-6


def chunk_logprobs(logprob_M: torch.Tensor, chunk_M: torch.Tensor, chunks: int) -> torch.Tensor:
    """(G,) log-probability of every chunk: the sum over its tokens' (M,), chunk_M: (M,) int64. Differentiable."""
    return logprob_M.new_zeros(chunks).index_add(0, chunk_M, logprob_M)


def likelihood_loss(
    student_logprob_G: torch.Tensor,
    teacher_logprob_G: torch.Tensor,
    weight_G: torch.Tensor | None = None,
    reduction: Reduction = "mean",
    *,
    temperature: float = 100.0,
    normalizer: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """The equation above. student_logprob_G and teacher_logprob_G: (G,) nats, at most 0, of the same chunks (the
    teacher's a constant); computed in float32 (float64 stays). temperature: tau. weight_G, reduction, normalizer as of
    `uld_loss`. Differentiable in the student's. Raises ConfigError for settings that cannot be.
    """
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature is {temperature}: must be finite and above 0")
    dtype = torch.float64 if student_logprob_G.dtype == torch.float64 else torch.float32
    log_a_G = teacher_logprob_G.detach().to(dtype) / temperature - SMALLEST_NATS
    log_b_G = student_logprob_G.to(dtype) / temperature - SMALLEST_NATS
    not_a_G = -torch.expm1(log_a_G)
    loss_G = log_a_G.exp() * (log_a_G - log_b_G) + not_a_G * (_log_not(log_a_G) - _log_not(log_b_G))
    return reduce_rows(loss_G, weight_G, reduction, normalizer)


def _log_not(log_p: torch.Tensor) -> torch.Tensor:
    """log(1 - p) of log p < 0, accurate at both ends (Maechler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    near_one = log_p > -math.log(2)
    # Each branch sees only values that it can take: the other's gradient would be NaN, and NaN times 0 is NaN.
    high = torch.log(-torch.expm1(torch.where(near_one, log_p, -1.0)))
    low = torch.log1p(-torch.exp(torch.where(near_one, -1.0, log_p)))
    return torch.where(near_one, high, low)
