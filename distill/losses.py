"""What a student is pulled towards: the teacher's sorted values (ULD) and the teacher's words (mapped).

Both are pure functions of logits that were already picked at the compared positions, and of the teacher's rows there.

ULD, Boizard et al., arXiv 2402.12030 (TMLR 2025), for one position, p and q sorted descending and zero-padded:

    full    = sum_i |p_(i) - q_(i)|                       the closed form of the Wasserstein-1 distance of the paper
    cached  = sum_{i<=K} |p_(i) - q_(i)| + |T - S|        T, S = what each leaves outside its own K largest
    head + |T - S|  <=  full  <=  head + T + S            so `cached` is never more than 2 min(T, S) too small

Several incompatible losses are called ULD. Which choice here equals whose (tests/distill/test_conformance.py, and
test_trl.py against the installed package):

    | whose                          | compared rows               | sum                   | here                    |
    |--------------------------------|-----------------------------|-----------------------|-------------------------|
    | the paper's code (llm-recipes) | i-th with i-th, right shift | full, both sorted     | K = all, `positional`   |
    | TRL, not extended, `bayesian`  | the same                    | full                  | K = all, `positional`   |
    | TRL, not extended, `observed`  | each logits row 1 too late  | full                  | never: off by one       |
    | TRL, extended, `bayesian`      | last row of each byte group | full, of row times    | K = all, `merge`        |
    |                                |                             | golds before it       | (`distill.merged`)      |
    | TRL, extended, `observed`      | first row of each group,    | full, of row times    | never: off by one       |
    |                                | 1 too late                  | golds after it        |                         |
    | L1 of running sums (Soup)      | any                         | sum of CDF gaps       | never: another distance |
    | top-k caches without a tail    | any                         | head only             | never: 0.041 off in the |
    |                                |                             |                       | mean (ours 0.0025)      |

Which positions are compared is decided in `distill.alignment`; `boundary` compares the FIRST row of every group of
bytes, where both sides have read the same text. The paper and TRL take means over rows of a sample, then over samples:
`loss_normalization="samples"` of the trainer.

Legend: N compared rows, V student vocabulary, K ranks of the cached head, I ranks whose ids are cached, J tail bins.
"""

from typing import Literal, NamedTuple, overload

import torch

from distill.fused import Implementation, row_losses
from distill.teacher_rows import TeacherRows
from storage_specs.errors import ConfigError

__all__ = ["Certificate", "Reduction", "TeacherRows", "mapped_loss", "uld_loss"]

Reduction = Literal["none", "sum", "mean"]


class Certificate(NamedTuple):
    """Per row, constants: lower_N <= ULD over both whole vocabularies <= upper_N. Both (N,), not weighted."""

    lower_N: torch.Tensor
    upper_N: torch.Tensor


@overload
def uld_loss(
    student_logits_NV: torch.Tensor,
    teacher_probs_NK: torch.Tensor,
    teacher_tail_N: torch.Tensor,
    weight_N: torch.Tensor | None = ...,
    reduction: Reduction = ...,
    *,
    normalizer: float | torch.Tensor | None = ...,
    teacher_bins_NJ: torch.Tensor | None = ...,
    rank_edges: torch.Tensor | None = ...,
    student_temperature: float = ...,
    impl: Implementation | None = ...,
    return_certificate: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def uld_loss(
    student_logits_NV: torch.Tensor,
    teacher_probs_NK: torch.Tensor,
    teacher_tail_N: torch.Tensor,
    weight_N: torch.Tensor | None = ...,
    reduction: Reduction = ...,
    *,
    normalizer: float | torch.Tensor | None = ...,
    teacher_bins_NJ: torch.Tensor | None = ...,
    rank_edges: torch.Tensor | None = ...,
    student_temperature: float = ...,
    impl: Implementation | None = ...,
    return_certificate: Literal[True],
) -> tuple[torch.Tensor, Certificate]: ...
def uld_loss(
    student_logits_NV,
    teacher_probs_NK,
    teacher_tail_N,
    weight_N=None,
    reduction="mean",
    *,
    normalizer=None,
    teacher_bins_NJ=None,
    rank_edges=None,
    student_temperature=1.0,
    impl=None,
    return_certificate=False,
):
    """Universal Logit Distillation from cached rows: sum_{i<=K} |p_(i) - q_(i)| + |T - S|, between 0 and 2 per row.

    student_logits_NV: (N, V), any float dtype; computed in float32 (float64 stays float64). A vocabulary smaller than K
    is zero-padded. teacher_probs_NK: (N, K), sorted descending. teacher_tail_N: (N,) = 1 - its sum. weight_N: (N,)
    weights of the rows, 1 where None. Equal to the full sum when K is the teacher's vocabulary size.

    teacher_bins_NJ (N, J) and rank_edges (J + 1,), both or neither: the teacher's sketch; the loss is then the sum over
    both whole vocabularies, up to what the sketch does not know.
    student_temperature: q = softmax(logits / it); the teacher's side is `distill.tempered`.
    reduction: "none" -> (N,) weight * loss, "sum" -> its sum, "mean" -> that sum / normalizer; normalizer: None = the
    sum of weights (0 without rows), or what a caller counted over micro-batches and ranks.
    impl: "torch", "triton" or None = the fastest available. return_certificate: also a `Certificate`.
    Differentiable once in the logits; the teacher is a constant. Raises ConfigError for settings that cannot be.
    """
    if (teacher_bins_NJ is None) != (rank_edges is None):
        raise ConfigError("teacher_bins_NJ and rank_edges (the sketch) go together: give both, or neither")
    if not 0 < student_temperature < float("inf"):
        raise ConfigError(f"student_temperature is {student_temperature}: must be finite and above 0")
    if student_temperature != 1:
        student_logits_NV = student_logits_NV / student_temperature
    teacher = TeacherRows(probs_NK=teacher_probs_NK, tail_N=teacher_tail_N, bins_NJ=teacher_bins_NJ)
    losses = row_losses(student_logits_NV, teacher=teacher, rank_edges=rank_edges, impl=impl)
    loss = reduce_rows(losses.uld_N, weight_N, reduction, normalizer)
    return (loss, Certificate(losses.lower_N, losses.upper_N)) if return_certificate else loss


def mapped_loss(
    student_logits_NV: torch.Tensor,
    teacher_probs_NK: torch.Tensor,
    words_NI: torch.Tensor,
    weight_N: torch.Tensor | None = None,
    reduction: Reduction = "mean",
    *,
    normalizer: float | torch.Tensor | None = None,
    impl: Implementation | None = None,
) -> torch.Tensor:
    """The teacher's probabilities on student words W, and everything else as one word: a Kullback-Leibler divergence.

        sum_{w in W} P_w ln(P_w / q_w) + U ln(U / (1 - sum_{w in W} q_w)),    P_w = sum of p over ids that map to w,
                                                                               U = 1 - sum_w P_w,    0 ln 0 = 0.

    student_logits_NV: (N, V), any float dtype; computed in float32 (float64 stays). teacher_probs_NK: (N, K), K >= I.
    words_NI: (N, I) int64, the student word of each of the first I ranks (`word_map`), -1 where there is none.
    The student's complement is clamped at 1e-6. A row of which nothing maps has loss 0. weight_N, reduction, normalizer
    and impl as in `uld_loss`. Differentiable once in the logits. Raises ConfigError for settings that cannot be.
    """
    teacher = TeacherRows(probs_NK=teacher_probs_NK, tail_N=1 - teacher_probs_NK.sum(1))
    losses = row_losses(student_logits_NV, teacher=teacher, uld=False, words_NI=words_NI, impl=impl)
    return reduce_rows(losses.mapped_N, weight_N, reduction, normalizer)


def reduce_rows(
    loss_N: torch.Tensor,
    weight_N: torch.Tensor | None,
    reduction: Reduction,
    normalizer: float | torch.Tensor | None,
) -> torch.Tensor:
    if reduction not in ("none", "sum", "mean"):
        raise ConfigError(f"reduction {reduction!r}: must be 'none', 'sum' or 'mean'")
    if normalizer is not None and reduction != "mean":
        raise ConfigError(f"normalizer given with reduction {reduction!r}: only 'mean' divides by one")
    weighted_N = loss_N if weight_N is None else weight_N.to(loss_N.dtype) * loss_N
    if reduction == "none":
        return weighted_N
    if reduction == "sum":
        return weighted_N.sum()
    if normalizer is None:
        normalizer = loss_N.new_tensor(len(loss_N)) if weight_N is None else weight_N.to(loss_N.dtype).sum()
        normalizer = torch.where(normalizer == 0, 1, normalizer)
    return weighted_N.sum() / normalizer
