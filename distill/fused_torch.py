"""CE, ULD and `mapped` of each row of logits in plain torch, its gradient written down: any device, any dtype.

The counterpart of `distill.fused_triton`, equation by equation (`distill.gradient_kernels`): forward keeps a
log-sum-exp, a slope and a short list of words per row, backward writes `softmax * slope` and adds the listed words' own
gradients. Rows are taken in chunks, so that no float32 copy of the whole is ever made.

Legend: N rows, R rows of one chunk, V student words, K ranks, I mapped words, J tail bins, B steps of the tail's
histogram.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from distill.teacher_tail import TailLaws, area_above

__all__ = ["SMALLEST_COMPLEMENT", "TAIL_STEPS", "TAIL_STEP_NATS", "TorchRowLosses", "student_words", "top_logits"]

# Below this the mass that a student leaves to all other words is rounding error of float32, and its logarithm noise.
SMALLEST_COMPLEMENT = 1e-6
# 128 steps of 1/8 nat reach a factor of 1e-7 below the K-th probability; on the real pair 2e-5 off the exact sort.
TAIL_STEPS, TAIL_STEP_NATS = 128, 0.125
# Words per group of the exact top-k.
GROUP = 32
# Logits at a time: every further chunk costs threads that wait for each other, every larger one memory.
CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 256 * 2**20}


class TorchRowLosses(torch.autograd.Function):
    """(ce_N, uld_N, mapped_N, floor_N, gap_N) in float32 (float64 of float64 logits), arguments as of `FusedRowLosses`.

    What was not asked for (labels_N, probs_NK or words_NI is None) is empty.
    """

    @staticmethod
    def forward(ctx, logits_NV, labels_N, probs_NK, tail_N, words_NI, word_probs_NI, laws, in_place):
        dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
        kept = 0 if probs_NK is None else min(probs_NK.shape[1], logits_NV.shape[1])
        lses, tops, words = [], [], []
        for rows in _chunks(logits_NV):
            z_RV = logits_NV[rows].to(dtype)
            lses.append(_log_sum_exp(z_RV))
            if kept:
                top_RK, word_RK = top_logits(z_RV, kept)
                tops.append(top_RK)
                words.append(word_RK)
        lse_N = _joined(lses, logits_NV.new_zeros(0, dtype=dtype))
        gather = lambda index: logits_NV.gather(1, index).to(dtype)  # noqa: E731
        ce_N = uld_N = mapped_N = floor_N = gap_N = dense_uld_N = dense_mapped_N = kth_N = signs_NB = None
        head_NK = head_own_NK = mapped_NI = mapped_own_NI = None
        if labels_N is not None:
            gold_N = gather(labels_N.clamp(min=0)[:, None])[:, 0]
            ce_N = torch.where(labels_N >= 0, lse_N - gold_N, 0.0)
        if probs_NK is not None:
            head_NK = _joined(words, torch.zeros((0, kept), dtype=torch.int64, device=logits_NV.device))
            top_NK = _joined(tops, lse_N.new_zeros((0, kept)))
            probs_NK, tail_N = probs_NK.to(dtype), tail_N.to(dtype)
            q_NK = torch.exp(top_NK - lse_N[:, None])
            difference_NK = q_NK - probs_NK[:, :kept]
            outside_N = torch.zeros_like(lse_N)
            if kept < logits_NV.shape[1]:
                outside_N = (1 - q_NK.sum(1)).clamp(min=0)
            head_N = difference_NK.abs().sum(1) + probs_NK[:, kept:].sum(1)
            floor_N = head_N + (outside_N - tail_N).abs()
            gap_N = 2 * torch.minimum(tail_N, outside_N)
            sign_NK = difference_NK.sign()
            dense_uld_N = -(q_NK * sign_NK).sum(1)
            if laws is None:
                tail_sign_N = (outside_N - tail_N).sign()
                uld_N = floor_N.clone()
                dense_uld_N = dense_uld_N + tail_sign_N * (1 - outside_N)
            else:
                kth_N = top_NK[:, -1].contiguous()
                tail_loss_N, signs_NB, pull_N = _sketch_tail(logits_NV, lse_N, kth_N, outside_N, kept, laws)
                uld_N = head_N + tail_loss_N
                dense_uld_N = dense_uld_N - pull_N
                # All of the head lies in step 0 of the histogram.
                tail_sign_N = signs_NB[:, 0]
            head_own_NK = q_NK * (sign_NK - tail_sign_N[:, None])
        if words_NI is not None:
            mapped_NI, mass_NI, exists_NI = student_words(words_NI, word_probs_NI.to(dtype))
            log_q_NI = gather(mapped_NI) - lse_N[:, None]
            q_NI = log_q_NI.exp() * exists_NI
            rest_N = (1 - mass_NI.sum(1)).clamp(min=0)
            complement_N = 1 - q_NI.sum(1)
            clamped_N = complement_N < SMALLEST_COMPLEMENT
            complement_N = complement_N.clamp(min=SMALLEST_COMPLEMENT)
            # 0 ln q is 0 here also where q is 0 (logits of -inf).
            cross_NI = torch.where(mass_NI > 0, mass_NI * torch.where(mass_NI > 0, log_q_NI, 0.0), 0.0)
            mapped_N = (torch.xlogy(mass_NI, mass_NI) - cross_NI).sum(1)
            mapped_N = mapped_N + torch.xlogy(rest_N, rest_N) - rest_N * complement_N.log()
            ratio_N = torch.where(clamped_N, 0.0, rest_N / complement_N)
            dense_mapped_N = torch.where(clamped_N, 1 - rest_N, 1 - ratio_N)
            mapped_own_NI = ratio_N[:, None] * q_NI - mass_NI
        ctx.save_for_backward(
            logits_NV, labels_N, lse_N, head_NK, head_own_NK, mapped_NI, mapped_own_NI, dense_uld_N, dense_mapped_N,
            kth_N, signs_NB,
        )  # fmt: skip
        ctx.in_place = in_place
        # torch.compile wants a tensor in every place.
        outputs = [lse_N.new_zeros(0) if t is None else t for t in (ce_N, uld_N, mapped_N, floor_N, gap_N)]
        ctx.mark_non_differentiable(*outputs[3:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ce_N, grad_uld_N, grad_mapped_N, _floor, _gap):
        (
            logits_NV, labels_N, lse_N, head_NK, head_own_NK, mapped_NI, mapped_own_NI, dense_uld_N, dense_mapped_N,
            kth_N, signs_NB,
        ) = ctx.saved_tensors  # fmt: skip
        slope_N = torch.zeros_like(lse_N)
        own = []
        if labels_N is not None:
            grad_ce_N = torch.where(labels_N >= 0, grad_ce_N, 0.0)
            slope_N = slope_N + grad_ce_N
            own.append((labels_N.clamp(min=0)[:, None], -grad_ce_N[:, None]))
        if head_NK is not None:
            slope_N = slope_N + grad_uld_N * dense_uld_N
            own.append((head_NK, head_own_NK * grad_uld_N[:, None]))
        if mapped_NI is not None:
            slope_N = slope_N + grad_mapped_N * dense_mapped_N
            own.append((mapped_NI, mapped_own_NI * grad_mapped_N[:, None]))
        step_slope_NB = None
        if signs_NB is not None:
            step_slope_NB = slope_N[:, None] + grad_uld_N[:, None] * signs_NB
        if ctx.in_place:
            gradient_NV = logits_NV.detach()
        else:
            gradient_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        same_dtype = gradient_NV.dtype == lse_N.dtype and not ctx.in_place
        for rows in _chunks(logits_NV):
            z_RV = logits_NV[rows].to(lse_N.dtype)
            part_RV = torch.softmax(z_RV, 1, out=gradient_NV[rows] if same_dtype else None)
            if step_slope_NB is None:
                part_RV *= slope_N[rows, None]
            else:
                part_RV *= step_slope_NB[rows].gather(1, _steps_below(z_RV, kth_N[rows]))
            for words_NX, value_NX in own:
                part_RV.scatter_add_(1, words_NX[rows], value_NX[rows])
            if not same_dtype:
                gradient_NV[rows] = part_RV
        return gradient_NV, *[None] * 7


def top_logits(logits_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits of every row, descending, and their words: exactly `torch.topk`, but for the choice of ties.

    By group maxima: a word outside the k groups with the largest maxima is not larger than k others.
    """
    n, v = logits_NV.shape
    groups = v // GROUP
    # Worth it only where the candidates are few beside the vocabulary.
    if 4 * k * GROUP > v:
        return logits_NV.topk(k, dim=1)
    grouped_NGW = logits_NV[:, : groups * GROUP].unflatten(1, (groups, GROUP))
    chosen_NK = grouped_NGW.amax(dim=2).topk(k, dim=1, sorted=False).indices
    words_NC = (chosen_NK[:, :, None] * GROUP + torch.arange(GROUP, device=logits_NV.device)).flatten(1)
    if v % GROUP:
        # The words after the last whole group are candidates in any case.
        rest_NC = torch.arange(groups * GROUP, v, device=logits_NV.device).expand(n, -1)
        words_NC = torch.cat([words_NC, rest_NC], 1)
    values_NK, place_NK = logits_NV.gather(1, words_NC).topk(k, dim=1)
    return values_NK, words_NC.gather(1, place_NK)


def _log_sum_exp(z_RV: torch.Tensor) -> torch.Tensor:
    """(R,) by the fused softmax, which on a CPU is several times faster than `torch.logsumexp`."""
    if z_RV.is_cuda or z_RV.shape[0] == 0:
        return torch.logsumexp(z_RV, 1)
    return z_RV.amax(1) - torch.softmax(z_RV, 1).amax(1).log()


def student_words(words_NI: torch.Tensor, probs_NI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distinct student words of a row, the teacher's mass on each, and 1 where there is one (0: word 0 with mass 0)."""
    words_NI, order_NI = words_NI.sort(dim=1)
    probs_NI = probs_NI.gather(1, order_NI)
    # Ids with the same word stand side by side now: number the groups of a row and add up inside each.
    begins_NI = torch.ones_like(words_NI)
    begins_NI[:, 1:] = (words_NI[:, 1:] != words_NI[:, :-1]).long()
    group_NI = begins_NI.cumsum(dim=1) - 1
    mapped_NI = (words_NI >= 0).to(probs_NI.dtype)
    mass_NI = torch.zeros_like(probs_NI).scatter_add_(1, group_NI, probs_NI * mapped_NI)
    word_NI = torch.zeros_like(words_NI).scatter_(1, group_NI, words_NI.clamp(min=0))
    exists_NI = torch.zeros_like(probs_NI).scatter_(1, group_NI, mapped_NI)
    return word_NI, mass_NI, exists_NI


def _steps_below(z_RV: torch.Tensor, kth_R: torch.Tensor) -> torch.Tensor:
    """(R, V) int64: the step of the tail's histogram that each logit lies in."""
    return ((kth_R[:, None] - z_RV) / TAIL_STEP_NATS).clamp_(0, TAIL_STEPS - 1).long()


def _sketch_tail(
    logits_NV: torch.Tensor, lse_N: torch.Tensor, kth_N: torch.Tensor, outside_N: torch.Tensor, k: int, laws: TailLaws
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tail's share of the full sum against the teacher's sketch: the area between two counting functions.

    A histogram over log q gives the student's, the bins' power laws the teacher's (see `kernels.tail_kernel`). Returns
    the share (N,), the sign of every step (N, B) and the sum of the steps' masses times signs (N,).
    """
    counts_NB = torch.zeros((len(lse_N), TAIL_STEPS), device=lse_N.device, dtype=lse_N.dtype)
    for rows in _chunks(logits_NV):
        below_RV = _steps_below(logits_NV[rows].to(lse_N.dtype), kth_N[rows])
        counts_NB[rows].scatter_add_(
            1, below_RV, torch.ones((), dtype=lse_N.dtype, device=lse_N.device).expand_as(below_RV)
        )
    # All of the head lies in step 0; the last step is the bottomless rest, without mass.
    counts_NB[:, 0] -= k
    counts_NB[:, -1] = 0
    above_NB = counts_NB.cumsum(1) - counts_NB
    steps_B1 = torch.arange(TAIL_STEPS + 1, device=lse_N.device, dtype=lse_N.dtype)
    log_level_NB1 = (kth_N - lse_N)[:, None] - steps_B1 * TAIL_STEP_NATS
    level_NB1 = log_level_NB1.exp()
    middle = (1 - math.exp(-TAIL_STEP_NATS)) / TAIL_STEP_NATS
    mass_NB = counts_NB * level_NB1[:, :-1] * middle
    # The steps' masses add up to what the head leaves, as far as values inside a step can lie off their middle.
    estimated_N = mass_NB.sum(1)
    scale_N = outside_N / torch.where(estimated_N > 0, estimated_N, 1)
    mass_NB *= scale_N.clamp(math.exp(-TAIL_STEP_NATS) / middle, 1 / middle)[:, None]
    student_NB = above_NB * -level_NB1.diff(dim=1) + mass_NB - counts_NB * level_NB1[:, 1:]
    teacher_NB1 = area_above(log_level_NB1, level_NB1, laws)
    difference_NB = student_NB - teacher_NB1.diff(dim=1)
    signs_NB = difference_NB.sign()
    return difference_NB.abs().sum(1) + teacher_NB1[:, 0], signs_NB, (signs_NB * mass_NB).sum(1)


def _chunks(logits_NV: torch.Tensor) -> list[slice]:
    """Rows to take at a time; all of them while torch.compile looks on, which fuses what it needs."""
    n, v = logits_NV.shape
    size = n
    if not torch.compiler.is_compiling():
        size = max(1, CHUNK_BYTES.get(logits_NV.device.type, CHUNK_BYTES["cuda"]) // (4 * v))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)] if n else []


def _joined(parts: list[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts) if parts else empty
