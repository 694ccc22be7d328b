"""The losses fused with the output head: never the whole (N, V) logits in memory.

Rows are taken in chunks: logits = hidden @ weight.T, losses and gradient over the chunk's own memory, then the chunk's
share of both gradients. They are ready when the forward pass ends; the backward pass only scales them.

Legend: N rows, D hidden size, V student words, I mapped ranks, J tail bins, R rows of one chunk.
"""

from dataclasses import dataclass

import torch

from distill.fused import Implementation, RowLosses, row_losses
from distill.teacher_rows import TeacherRows
from storage_specs.errors import ConfigError

__all__ = ["LinearLosses", "linear_uld_loss"]

# Logits in memory at a time: large enough that the head's GEMMs run at full speed, small beside a model.
CHUNK_BYTES = {"cuda": 512 * 2**20, "cpu": 64 * 2**20}


@dataclass(frozen=True, kw_only=True)
class LinearLosses:
    """loss: scalar with gradients, ce_weight * ce + uld_weight * uld + mapped_weight * mapped. The parts and the
    per-row certificate (lower_N <= full-vocabulary ULD <= upper_N) are constants, None where not asked for.
    """

    loss: torch.Tensor
    ce: torch.Tensor | None
    uld: torch.Tensor | None
    mapped: torch.Tensor | None
    lower_N: torch.Tensor | None
    upper_N: torch.Tensor | None


def linear_uld_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor | None,
    teacher: TeacherRows | None,
    *,
    weight_N: torch.Tensor | None = None,
    words_NI: torch.Tensor | None = None,
    rank_edges: torch.Tensor | None = None,
    ce_weight: float = 1.0,
    uld_weight: float = 1.5,
    mapped_weight: float = 0.0,
    ce_normalizer: float | torch.Tensor | None = None,
    kd_normalizer: float | torch.Tensor | None = None,
    impl: Implementation | None = None,
    chunk_rows: int | None = None,
) -> LinearLosses:
    """The losses of `hidden_ND @ weight_VD.T`, with the gradients of both accumulated in the pass.

    hidden_ND: (N, D); weight_VD: (V, D), cast to the dtype of hidden_ND, in which the logits are too. labels_N: (N,)
    int64, negative = no label. weight_N: (N,) weights of the rows in ULD and mapped (0 = not compared). ce_normalizer
    and kd_normalizer: what the sums are divided by; None = the number of labels, the sum of weight_N. The rest as in
    `distill.fused.row_losses`. A term with weight 0 or without its inputs is not computed.

    Raises ConfigError as `row_losses` does, and when hidden_ND and weight_VD do not fit.
    """
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ConfigError(
            f"hidden {tuple(hidden_ND.shape)} and weight {tuple(weight_VD.shape)} must be (N, D) and (V, D)"
        )
    n = len(hidden_ND)
    device = hidden_ND.device
    if labels_N is None or ce_weight == 0:
        labels_N, ce_scale_N = None, None
    else:
        normalizer = (labels_N >= 0).sum() if ce_normalizer is None else ce_normalizer
        ce_scale_N = torch.ones(n, device=device) / _at_least_one_row(normalizer)
    if teacher is None or (uld_weight == 0 and mapped_weight == 0):
        teacher, kd_scale_N, words_NI = None, None, None
    else:
        kd_scale_N = torch.ones(n, device=device) if weight_N is None else weight_N.float()
        kd_scale_N = kd_scale_N / _at_least_one_row(kd_scale_N.sum() if kd_normalizer is None else kd_normalizer)
        words_NI = words_NI if mapped_weight else None
    head = _Head(
        labels_N=labels_N,
        teacher=teacher,
        words_NI=words_NI,
        rank_edges=rank_edges,
        scales=(ce_scale_N, kd_scale_N),
        weights=(ce_weight, uld_weight, mapped_weight),
        impl=impl,
        chunk_rows=chunk_rows or _chunk_rows(n, len(weight_VD), hidden_ND),
    )
    loss, ce, uld, mapped, lower_N, upper_N = _ChunkedHead.apply(hidden_ND, weight_VD, head)
    return LinearLosses(loss=loss, ce=ce, uld=uld, mapped=mapped, lower_N=lower_N, upper_N=upper_N)


@dataclass(frozen=True, kw_only=True)
class _Head:
    """All that stays the same over the chunks; scales: per-row factors of CE and of the teacher's terms."""

    labels_N: torch.Tensor | None
    teacher: TeacherRows | None
    words_NI: torch.Tensor | None
    rank_edges: torch.Tensor | None
    scales: tuple[torch.Tensor | None, torch.Tensor | None]
    weights: tuple[float, float, float]
    impl: Implementation | None
    chunk_rows: int

    def losses(self, logits_RV: torch.Tensor, rows: slice) -> RowLosses:
        """Losses of one chunk, whose logits may be overwritten."""
        return row_losses(
            logits_RV,
            labels_N=None if self.labels_N is None else self.labels_N[rows],
            teacher=None if self.teacher is None else _slice(self.teacher, rows),
            uld=self.weights[1] != 0,
            words_NI=None if self.words_NI is None else self.words_NI[rows],
            rank_edges=self.rank_edges,
            impl=self.impl,
            in_place=True,
        )

    def sums(self, losses: RowLosses, rows: slice) -> list[torch.Tensor | None]:
        """CE, ULD and mapped of one chunk, normalized and not yet weighted."""
        ce_scale_N, kd_scale_N = self.scales
        terms = ((losses.ce_N, ce_scale_N), (losses.uld_N, kd_scale_N), (losses.mapped_N, kd_scale_N))
        return [None if loss_N is None else (loss_N * scale_N[rows]).sum() for loss_N, scale_N in terms]


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, head):
        n = len(hidden_ND)
        with_gradients = any(ctx.needs_input_grad[:2])
        casted_VD = weight_VD.to(hidden_ND.dtype)
        grad_hidden_ND = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.zeros_like(casted_VD) if ctx.needs_input_grad[1] else None
        totals: list[torch.Tensor | None] = [None, None, None]
        bounds = []
        for start in range(0, n, head.chunk_rows):
            rows = slice(start, min(start + head.chunk_rows, n))
            hidden_RD = hidden_ND[rows]
            logits_RV = (hidden_RD @ casted_VD.T).requires_grad_(with_gradients)
            with torch.set_grad_enabled(with_gradients):
                losses = head.losses(logits_RV, rows)
                sums = head.sums(losses, rows)
                total = sum(w * s for w, s in zip(head.weights, sums, strict=True) if s is not None)
            if with_gradients:
                (gradient_RV,) = torch.autograd.grad(total, logits_RV)
                if grad_hidden_ND is not None:
                    torch.mm(gradient_RV, casted_VD, out=grad_hidden_ND[rows])
                if grad_weight_VD is not None:
                    grad_weight_VD.addmm_(gradient_RV.T, hidden_RD)
                del gradient_RV
            totals = [s if t is None else t + s for t, s in zip(totals, _detached(sums), strict=True)]
            if losses.lower_N is not None:
                bounds.append((losses.lower_N, losses.upper_N))
            del logits_RV, losses, sums, total
        ctx.grads = (grad_hidden_ND, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype))
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        for weight, total in zip(head.weights, totals, strict=True):
            loss = loss if total is None else loss + weight * total
        lower_N, upper_N = (torch.cat(side) for side in zip(*bounds, strict=True)) if bounds else (None, None)
        ctx.mark_non_differentiable(*[t for t in (*totals, lower_N, upper_N) if t is not None])
        return loss, *totals, lower_N, upper_N

    @staticmethod
    def backward(ctx, grad_loss, *_constants):
        if ctx.grads is None:
            raise RuntimeError(
                "linear_uld_loss: its gradients were used up by an earlier backward pass; compute it again"
            )
        grads, ctx.grads = ctx.grads, None
        return *[None if grad is None else grad.mul_(grad_loss.to(grad.dtype)) for grad in grads], None


def _detached(sums: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if s is None else s.detach() for s in sums]


def _slice(teacher: TeacherRows, rows: slice) -> TeacherRows:
    return TeacherRows(
        probs_NK=teacher.probs_NK[rows],
        tail_N=teacher.tail_N[rows],
        bins_NJ=None if teacher.bins_NJ is None else teacher.bins_NJ[rows],
    )


def _at_least_one_row(normalizer: float | torch.Tensor) -> float | torch.Tensor:
    """No rows: divide by 1, so that the sum over nothing stays 0."""
    if isinstance(normalizer, torch.Tensor):
        return torch.where(normalizer == 0, 1, normalizer)
    return normalizer or 1


def _chunk_rows(n: int, v: int, hidden_ND: torch.Tensor) -> int:
    """Equal chunks within CHUNK_BYTES, of a multiple of 128 rows where they are that large."""
    largest = max(1, CHUNK_BYTES.get(hidden_ND.device.type, CHUNK_BYTES["cuda"]) // (v * hidden_ND.element_size()))
    rows = -(-n // max(1, -(-n // largest)))
    return min(max(rows, 1) if rows < 128 else -(-rows // 128) * 128, largest)
