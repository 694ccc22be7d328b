"""ULD over groups of tokens: the chain rule puts two tokenisations of the same bytes beside each other.

A group (`distill.alignment`, mode `merge`) is a run of tokens of each side over the same bytes. As TRL's `bayesian`,
each side stands for it with its LAST distribution, times the probability of the tokens that lead there:

    p' = p_last * prod of the teacher's gold probabilities before it in the group         (constants, from the cache)
    q' = q_last * prod of the student's                                                      (all differentiable)
    merged ULD = sum_{i<=K} |p'_(i) - q'_(i)| + |T' - S'|,   each factor at least 1e-8, nothing renormalised

What that does to the tail: p' sums to P = the product, not to 1. The missing 1 - P belongs to other texts that begin
like the group; no rank of the row knows it, so it is NOT tail: T' = P (1 - sum p), S' = Q (1 - sum q) as scaled.
The certificate keeps its form, lower = the loss, upper = head + T' + S', and gets tighter with P and Q; but what it
bounds is the distance of the scaled rows, which is at most P + Q and can be small where P and Q are merely both small.
Where a group is one token on each side, all of this is plain ULD. Wherever both sides have one token, P = Q = 1.

Legend: N groups, M tokens that are not the last of their group, V student vocabulary, K ranks.
"""

import math

import torch

from distill.fused_torch import top_logits
from distill.losses import Certificate, Reduction, reduce_rows

__all__ = ["SMALLEST_FACTOR", "log_scale_of", "merged_uld_loss"]

SMALLEST_FACTOR = 1e-8  # TRL's


def log_scale_of(gold_logprob_M: torch.Tensor, group_M: torch.Tensor, groups: int) -> torch.Tensor:
    """(N,) log of the product of each group's earlier gold probabilities; 0 for groups of one token. Differentiable."""
    scale_N = gold_logprob_M.new_zeros(groups)
    return scale_N.index_add(0, group_M, gold_logprob_M.clamp(min=math.log(SMALLEST_FACTOR)))


def merged_uld_loss(
    student_logits_NV: torch.Tensor,
    student_log_scale_N: torch.Tensor,
    teacher_probs_NK: torch.Tensor,
    teacher_tail_N: torch.Tensor,
    weight_N: torch.Tensor | None = None,
    reduction: Reduction = "mean",
    *,
    normalizer: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, Certificate]:
    """The equation above, and its certificate (constants, per row, not weighted).

    student_logits_NV: (N, V), at the last token of each group; any float dtype, computed in float32 (float64 stays).
    student_log_scale_N: (N,) from `log_scale_of`. teacher_probs_NK: (N, K) and teacher_tail_N: (N,), already scaled by
    the teacher's product. weight_N, reduction, normalizer as of `uld_loss`. Differentiable in logits and scale.
    """
    dtype = torch.float64 if student_logits_NV.dtype == torch.float64 else torch.float32
    size = teacher_probs_NK.shape[1]
    kept = min(size, student_logits_NV.shape[1])
    probs_NK, tail_N = teacher_probs_NK.to(dtype), teacher_tail_N.to(dtype)
    with torch.no_grad():
        _, word_NK = top_logits(student_logits_NV, kept)
    lse_N = torch.logsumexp(student_logits_NV.to(dtype), 1)
    q_NK = torch.exp(student_logits_NV.gather(1, word_NK).to(dtype) - lse_N[:, None])
    outside_N = (1 - q_NK.sum(1)).clamp(min=0) if kept < student_logits_NV.shape[1] else torch.zeros_like(lse_N)
    scale_N = student_log_scale_N.to(dtype).exp()
    head_N = (probs_NK[:, :kept] - scale_N[:, None] * q_NK).abs().sum(1) + probs_NK[:, kept:].sum(1)
    outside_N = scale_N * outside_N
    loss_N = head_N + (tail_N - outside_N).abs()
    certificate = Certificate(loss_N.detach(), (head_N + tail_N + outside_N).detach())
    return reduce_rows(loss_N, weight_N, reduction, normalizer), certificate
