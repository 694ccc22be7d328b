"""Losses for a student with the teacher's own tokenizer: KL and the generalised Jensen-Shannon divergence.

The teacher's I likeliest words are compared one by one, everything else as one more word, the bucket. With p_w, q_w
for w in the ids W, U = 1 - sum p_w, S = 1 - sum q_w (at least 1e-6):

    KL(p || q)        = sum_w p_w ln(p_w / q_w) + U ln(U / S)                        `mapped`, with ids for words
    JSD_beta(p || q)  = beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q,   bucket included

Both are at most the divergence over the whole vocabulary (data-processing inequality) and equal to it where I is the
vocabulary. JSD is Agarwal et al., arXiv 2306.13649, eq. 1, TRL's `generalized_jsd_loss`; divided by beta it becomes the
forward KL for beta -> 0, divided by 1 - beta the reverse one for beta -> 1. Cost beside CE: KL none (the fused pass),
JSD one gather (`distill.listed_words`).

Legend: N rows, V student words, K ranks of the cached head, I ranks whose ids are cached.
"""

import torch

from distill.fused import Implementation
from distill.listed_words import complement_of, listed_logprobs, xlogx_over
from distill.losses import Reduction, mapped_loss, reduce_rows
from storage_specs.errors import ConfigError

__all__ = ["jsd_loss", "jsd_rows", "kl_loss"]


def kl_loss(
    student_logits_NV: torch.Tensor,
    teacher_probs_NK: torch.Tensor,
    ids_NI: torch.Tensor,
    weight_N: torch.Tensor | None = None,
    reduction: Reduction = "mean",
    *,
    normalizer: float | torch.Tensor | None = None,
    impl: Implementation | None = None,
) -> torch.Tensor:
    """Forward KL on the teacher's ids with a bucket for the rest; ids_NI: (N, I) int64, all other arguments, dtypes and
    errors as of `mapped_loss`, which it is."""
    return mapped_loss(
        student_logits_NV, teacher_probs_NK, ids_NI, weight_N, reduction, normalizer=normalizer, impl=impl
    )


def jsd_loss(
    student_logits_NV: torch.Tensor,
    teacher_probs_NK: torch.Tensor,
    ids_NI: torch.Tensor,
    weight_N: torch.Tensor | None = None,
    reduction: Reduction = "mean",
    *,
    beta: float = 0.5,
    normalizer: float | torch.Tensor | None = None,
    impl: Implementation | None = None,
) -> torch.Tensor:
    """The equation above. beta: the teacher's part in the mixture, in (0, 1). student_logits_NV: (N, V), any float
    dtype, computed in float32 (float64 stays). The other arguments as of `kl_loss`. Differentiable in the logits.
    Raises ConfigError for settings that cannot be.
    """
    if not 0 < beta < 1:
        raise ConfigError(f"beta is {beta}: must lie between 0 and 1 (at its ends: kl_loss, and no loss)")
    log_q_NI = listed_logprobs(student_logits_NV, ids_NI.clamp(min=0), impl=impl)
    loss_N = jsd_rows(log_q_NI, teacher_probs_NK, ids_NI, beta)
    return reduce_rows(loss_N, weight_N, reduction, normalizer)


def jsd_rows(log_q_NI: torch.Tensor, teacher_probs_NK: torch.Tensor, ids_NI: torch.Tensor, beta: float) -> torch.Tensor:
    """(N,) from the student's log-probabilities of ids_NI (whatever they are where an id is -1)."""
    p_NI = teacher_probs_NK[:, : ids_NI.shape[1]].to(log_q_NI.dtype)
    known_NI = ids_NI >= 0
    p_NI = torch.where(known_NI, p_NI, 0.0)
    q_NI = torch.where(known_NI, log_q_NI.exp(), 0.0)
    rest_N, other_N = (1 - p_NI.sum(1)).clamp(min=0), complement_of(q_NI)
    p_NB, q_NB = torch.cat([p_NI, rest_N[:, None]], 1), torch.cat([q_NI, other_N[:, None]], 1)
    log_q_NB = torch.cat([log_q_NI, other_N.log()[:, None]], 1)
    m_NB = beta * p_NB + (1 - beta) * q_NB
    log_m_NB = torch.where(m_NB > 0, m_NB, 1.0).log()
    of_teacher_N = xlogx_over(p_NB, p_NB.log(), log_m_NB).sum(1)
    of_student_N = xlogx_over(q_NB, log_q_NB, log_m_NB).sum(1)
    return beta * of_teacher_N + (1 - beta) * of_student_N
