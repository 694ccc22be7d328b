"""`hybrid`: the teacher's words where the student has them, sorted values on everything else. TRL GOLD's idea.

TRL splits both vocabularies once: tokens of equal text are compared by their words, the rest of both sides sorted, L1.
A cache knows words only for the first I ranks of a row, so here the split is made per row. With W the student words of
those ranks that have one (`mapped`'s), of K ranks in all:

    teacher's rest: the ranks <= I without a student word, then the ranks I < i <= K, whose words nobody knows
                    (a subsequence of the row, so still sorted: R values), and the tail mass T beyond K
    student's rest: its words outside W, sorted; the R largest, and the mass S beyond them

    hybrid = mapped + sum_{i<=R} |p'_(i) - q'_(i)| + |T - S|
    certificate:   lower = that   <=   mapped + the full sum over both rests   <=   upper = lower + 2 min(T, S)

Where I = K = the teacher's vocabulary and no two ids share a word, the rests are TRL's and so is their distance; TRL's
matched part is `mapped` without its bucket U ln(U / (1 - sum q)) (tests/distill/test_trl.py). TRL weighs both parts,
by default with the share of matched vocabulary; `--loss mapped:a,hybrid:b` weighs them a + b and b.
Cost beside CE and `mapped`: an exact top K + I and one gather (`distill.listed_words`). A sketch's bins are not used:
which of its ranks have a word is not known.

Legend: N rows, V student words, K ranks, I ranks with ids, M = min(K + I, V) candidates of the student's rest.
"""

import torch

from distill.fused import Implementation, row_losses
from distill.fused_torch import student_words, top_logits
from distill.listed_words import listed_logprobs
from distill.losses import Certificate, Reduction, reduce_rows
from distill.teacher_rows import TeacherRows

__all__ = ["hybrid_loss", "rest_words", "sorted_rest"]


def hybrid_loss(
    student_logits_NV: torch.Tensor,
    teacher_probs_NK: torch.Tensor,
    teacher_tail_N: torch.Tensor,
    words_NI: torch.Tensor,
    weight_N: torch.Tensor | None = None,
    reduction: Reduction = "mean",
    *,
    normalizer: float | torch.Tensor | None = None,
    impl: Implementation | None = None,
) -> tuple[torch.Tensor, Certificate]:
    """The equation above, and its certificate (constants, per row, not weighted).

    student_logits_NV: (N, V), any float dtype, computed in float32 (float64 stays). teacher_probs_NK: (N, K) sorted
    descending; teacher_tail_N: (N,) = 1 - its sum. words_NI: (N, I) int64, I <= K, -1 where an id has no student word.
    weight_N, reduction, normalizer, impl as of `uld_loss`. Differentiable in the logits. Raises ConfigError.
    """
    teacher = TeacherRows(probs_NK=teacher_probs_NK, tail_N=teacher_tail_N)
    labels_N = student_logits_NV.detach().argmax(1) if len(student_logits_NV) else words_NI.new_zeros(0)
    losses = row_losses(student_logits_NV, labels_N=labels_N, teacher=teacher, uld=False, words_NI=words_NI, impl=impl)
    rest = rest_words(student_logits_NV, words_NI, teacher_probs_NK.shape[1])
    log_q_NX = listed_logprobs(student_logits_NV, rest, labels_N, losses.ce_N)
    rest_N, gap_N = sorted_rest(log_q_NX, rest, words_NI, teacher_probs_NK, teacher_tail_N)
    loss_N = losses.mapped_N + rest_N
    certificate = Certificate(loss_N.detach(), (loss_N + gap_N).detach())
    return reduce_rows(loss_N, weight_N, reduction, normalizer), certificate


@torch.no_grad()
def rest_words(logits_NV: torch.Tensor, words_NI: torch.Tensor, k: int) -> torch.Tensor:
    """(N, M + I) int64: the words that `sorted_rest` wants log-probabilities of: the student's M likeliest, descending,
    and the distinct mapped words (word 0 where there is none)."""
    _, top_NM = top_logits(logits_NV, min(k + words_NI.shape[1], logits_NV.shape[1]))
    mapped_NI, _, _ = student_words(words_NI, torch.zeros(words_NI.shape, device=words_NI.device))
    return torch.cat([top_NM, mapped_NI], 1)


def sorted_rest(
    log_q_NX: torch.Tensor,
    listed_NX: torch.Tensor,
    words_NI: torch.Tensor,
    teacher_probs_NK: torch.Tensor,
    teacher_tail_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) the sorted L1 of both rests, and (N,) how much more it may be over both whole vocabularies: 2 min(T, S).

    listed_NX: `rest_words`; log_q_NX: (N, M + I) the student's log-probabilities of them.
    """
    ranks = words_NI.shape[1]
    k, m = teacher_probs_NK.shape[1], listed_NX.shape[1] - ranks
    probs_NK, tail_N = teacher_probs_NK.to(log_q_NX.dtype), teacher_tail_N.to(log_q_NX.dtype)
    # The teacher's rest, moved together: R values and zeros behind them.
    unmapped_NK = torch.ones_like(probs_NK, dtype=torch.bool)
    unmapped_NK[:, :ranks] = words_NI < 0
    p_NK = _moved_together(probs_NK, unmapped_NK, k)
    size_N1 = unmapped_NK.sum(1, keepdim=True)
    # The student's, R of them too.
    top_NM = listed_NX[:, :m]
    free_NM = torch.ones_like(top_NM, dtype=torch.bool)
    for rank in range(ranks):  # (N, M) at a time instead of (N, M, I)
        free_NM &= top_NM != words_NI[:, rank, None]
    taken_NM = free_NM & (free_NM.cumsum(1) <= size_N1)
    q_NX = log_q_NX.exp()
    q_NK = _moved_together(q_NX[:, :m], taken_NM, k)
    _, _, exists_NI = student_words(words_NI, torch.zeros_like(probs_NK[:, :ranks]))
    mapped_N = (q_NX[:, m:] * exists_NI).sum(1)
    outside_N = (1 - mapped_N - q_NK.sum(1)).clamp(min=0)
    loss_N = (p_NK - q_NK).abs().sum(1) + (tail_N - outside_N).abs()
    return loss_N, 2 * torch.minimum(tail_N, outside_N).detach()


def _moved_together(values_NM: torch.Tensor, kept_NM: torch.Tensor, size: int) -> torch.Tensor:
    """(N, size) the kept values of every row in their order, then zeros."""
    place_NM = torch.where(kept_NM, kept_NM.cumsum(1) - 1, size)
    moved_NK = values_NM.new_zeros(len(values_NM), size + 1)
    return moved_NK.scatter_add(1, place_NM, values_NM * kept_NM)[:, :size]
