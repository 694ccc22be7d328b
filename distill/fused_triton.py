"""Launches of the Triton kernels as one autograd function: CE, ULD and `mapped` of each row of logits in one pass.

Import this module only where triton is installed (`distill.fused` does it on demand). Shapes as in `distill.kernels`.
"""

import math
from dataclasses import dataclass

import torch
import triton

from distill import gradient_kernels, kernels
from distill.fused_torch import TAIL_STEP_NATS, TAIL_STEPS

__all__ = ["INTERPRETED", "LARGEST_HEAD", "FusedRowLosses", "Tuning"]

# TRITON_INTERPRET=1 before triton is first imported: the kernels run on the CPU, slowly.
INTERPRETED = not isinstance(kernels.scan_kernel, triton.JITFunction)

# One program holds a row's candidates in registers: beyond this many ranks the torch implementation is the one to use.
LARGEST_HEAD = 256


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Sizes of tiles and numbers of warps: the fastest of `scripts/bench_loss.py --tune` on an H200.

    group: words per group. spare: candidates per rank that the exact selection has room for. chunk_words: candidates
    read at once. tail_steps * tail_step_nats: how far below the K-th logit the tail is resolved.
    """

    group: int = 128
    scan_tile: int = 8192
    scan_warps: int = 4
    spare: int = 2
    chunk_words: int = 1024
    select_warps: int = 8
    tail_steps: int = TAIL_STEPS
    tail_step_nats: float = TAIL_STEP_NATS
    tail_tile: int = 8192
    tail_warps: int = 4
    gradient_tile: int = 4096
    sketch_gradient_tile: int = 2048
    gradient_tiles: int = 4
    gradient_warps: int = 4


class FusedRowLosses(torch.autograd.Function):
    """(ce_N, uld_N, mapped_N, floor_N, gap_N), float32; the last two are the certificate of head + |T - S|.

    laws: (slopes_NJ, log_starts_NJ, edges_J1) of the teacher's tail, or what computes them, or None. in_place: the
    gradient is written over the logits, whose values are lost. What was not asked for (labels_N, probs_NK or words_NI
    is None) is left unset.
    """

    @staticmethod
    def forward(ctx, logits_NV, labels_N, probs_NK, tail_N, words_NI, word_probs_NI, laws, in_place, tuning):
        N, V = logits_NV.shape
        K = 0 if probs_NK is None else probs_NK.shape[1]
        I = 0 if words_NI is None else words_NI.shape[1]  # noqa: E741
        G = triton.cdiv(V, tuning.group)
        B = tuning.tail_steps if laws is not None else 1
        device = logits_NV.device
        bits = 32 if logits_NV.dtype == torch.float32 else 16
        C = triton.next_power_of_2(max(tuning.spare * K, 1))

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, device=device, dtype=dtype)

        lse_N, ce_N, uld_N, mapped_N, floor_N, gap_N, dense_uld_N, dense_mapped_N, kth_N, outside_N = (
            empty(N) for _ in range(10)
        )
        maxima_NG = empty(N, G if K else 0, dtype=logits_NV.dtype)
        listed_NM = empty(N, K + I + 1, dtype=torch.int32)
        listed_z_NM, listed_own_NM = empty(N, K + I + 1), empty(N, K + I + 1)
        signs_NB = empty(N, B, dtype=torch.int8)
        # An argument that a kernel's switches leave unread may be any tensor.
        unread = lse_N
        if N:
            with _device_of(logits_NV):
                kernels.scan_kernel[(N,)](
                    logits_NV, logits_NV.stride(0), maxima_NG, lse_N, V, G, GROUP=tuning.group,
                    TILE_GROUPS=min(tuning.scan_tile // tuning.group, triton.next_power_of_2(G)), WITH_MAXIMA=K > 0,
                    num_warps=tuning.scan_warps,
                )  # fmt: skip
                kernels.select_kernel[(N,)](
                    logits_NV, logits_NV.stride(0), maxima_NG, lse_N,
                    unread if K == 0 else probs_NK, unread if K == 0 else tail_N,
                    unread if I == 0 else words_NI, unread if I == 0 else word_probs_NI,
                    unread if labels_N is None else labels_N,
                    empty(N, K, dtype=torch.int32), empty(N, C + K, dtype=torch.int32),
                    listed_NM, listed_z_NM, listed_own_NM,
                    ce_N, uld_N, mapped_N, floor_N, gap_N, dense_uld_N, kth_N, outside_N, dense_mapped_N, V, G,
                    K=K, C=C, GP=triton.next_power_of_2(G), I=I, IP=triton.next_power_of_2(max(I, 1)),
                    GROUP=tuning.group,
                    CHUNK=min(tuning.chunk_words // tuning.group, triton.next_power_of_2(max(K, 1))),
                    BITS=bits, WITH_LABELS=labels_N is not None, SKETCH=laws is not None,
                    num_warps=tuning.select_warps,
                )  # fmt: skip
                if laws is not None:
                    slopes_NJ, log_starts_NJ, edges_J1 = laws() if callable(laws) else laws
                    J = slopes_NJ.shape[1]
                    nats = tuning.tail_step_nats
                    kernels.tail_kernel[(N,)](
                        logits_NV, logits_NV.stride(0), lse_N, kth_N, outside_N, slopes_NJ, log_starts_NJ, edges_J1,
                        uld_N, dense_uld_N, signs_NB, V, K, nats, (1 - math.exp(-nats)) / nats,
                        J=J, JP=triton.next_power_of_2(J), B=B, TILE=min(tuning.tail_tile, triton.next_power_of_2(V)),
                        num_warps=tuning.tail_warps,
                    )  # fmt: skip
        ctx.save_for_backward(
            logits_NV,
            labels_N,
            lse_N,
            listed_NM,
            listed_z_NM,
            listed_own_NM,
            dense_uld_N,
            dense_mapped_N,
            kth_N,
            signs_NB,
        )
        ctx.sizes = (K, I, B)
        ctx.sketch, ctx.in_place, ctx.tuning = laws is not None, in_place, tuning
        ctx.mark_non_differentiable(floor_N, gap_N)
        ctx.set_materialize_grads(False)
        return ce_N, uld_N, mapped_N, floor_N, gap_N

    @staticmethod
    def backward(ctx, grad_ce_N, grad_uld_N, grad_mapped_N, _floor, _gap):
        logits_NV, labels_N, lse_N, *lists, dense_uld_N, dense_mapped_N, kth_N, signs_NB = ctx.saved_tensors
        gradient_NV = logits_NV if ctx.in_place else torch.empty_like(logits_NV)
        write_gradient(
            ctx, gradient_NV, logits_NV, labels_N, lse_N, lists, dense_uld_N, dense_mapped_N, kth_N, signs_NB,
            grad_ce_N, grad_uld_N, grad_mapped_N,
        )  # fmt: skip
        return gradient_NV.detach(), *[None] * 8


def write_gradient(
    ctx, gradient_NV, logits_NV, labels_N, lse_N, lists, dense_uld_N, dense_mapped_N, kth_N, signs_NB,
    grad_ce_N, grad_uld_N, grad_mapped_N,
):  # fmt: skip
    """Both gradient kernels, for the losses that have a gradient."""
    K, I, B = ctx.sizes  # noqa: E741
    N, V = logits_NV.shape
    tuning = ctx.tuning
    if N == 0:
        return
    zeros_N = None
    grads = []
    for grad_N in (grad_ce_N, grad_uld_N, grad_mapped_N):
        if grad_N is None:
            zeros_N = torch.zeros_like(lse_N) if zeros_N is None else zeros_N
            grad_N = zeros_N
        grads.append(grad_N.contiguous())
    with_labels = labels_N is not None
    labels_N = labels_N if with_labels else lse_N
    tile = tuning.sketch_gradient_tile if ctx.sketch else tuning.gradient_tile
    tile = min(tile, triton.next_power_of_2(V))
    with _device_of(logits_NV):
        gradient_kernels.dense_gradient_kernel[(N, triton.cdiv(V, tile * tuning.gradient_tiles))](
            logits_NV, logits_NV.stride(0), gradient_NV, gradient_NV.stride(0), lse_N, labels_N, dense_uld_N,
            dense_mapped_N, kth_N, signs_NB, *grads, V, tuning.tail_step_nats,
            K=K, I=I, B=B, TILE=tile, TILES=tuning.gradient_tiles, WITH_LABELS=with_labels, SKETCH=ctx.sketch,
            num_warps=tuning.gradient_warps,
        )  # fmt: skip
        gradient_kernels.listed_gradient_kernel[(N,)](
            gradient_NV, gradient_NV.stride(0), lse_N, *lists, labels_N, dense_uld_N, dense_mapped_N, kth_N, signs_NB,
            *grads, tuning.tail_step_nats, K=K, KP=triton.next_power_of_2(max(K, 1)), I=I,
            IP=triton.next_power_of_2(max(I, 1)), B=B, WITH_LABELS=with_labels, SKETCH=ctx.sketch,
            num_warps=4,
        )  # fmt: skip


def _device_of(tensor: torch.Tensor) -> torch.cuda.device:
    """Triton launches on the current device; CPU tensors (the interpreter) change nothing."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
