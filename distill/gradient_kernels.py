"""Triton kernels of the fused losses' gradients, from what the forward kernels (`distill.kernels`) left.

    dense_gradient   reads the logits once more and writes `softmax * slope`, over them if asked; one program per piece
                     of a row
    listed_gradient  puts the listed words right; one program per row

With q = softmax(z), s_i = sign(q_(i) - p_i), s_T = sign(S - T), c = sum q_(i) s_i + S s_T, Q = 1 - sum of q over the
mapped words, r = U / Q:

    d CE / dz_j     = q_j - [j = label]
    d ULD / dz_j    = q_j (s_T - c)  +  [j = the i-th largest] q_j (s_i - s_T)
    d mapped / dz_j = q_j (1 - r)    +  [j mapped] (r q_j - P_j)      where Q is clamped: 1 - U, 0 for 1 - r, r

With a sketch s_T is the sign of the step of the histogram in which z_j lies, and c sums over all of them.

Import this module only where triton is installed. Legend as in `distill.kernels`.
"""

import triton
import triton.language as tl

# ruff: noqa: E741 (I is a shape suffix)


@triton.jit
def _tail_sign(tail_signs, kth, values, step_nats, B: tl.constexpr):
    """The sign of the tail's step that each logit lies in."""
    below = tl.minimum((kth - values) / step_nats, B - 1.0)
    return tl.load(tail_signs + tl.maximum(below, 0.0).to(tl.int32)).to(tl.float32)


@triton.jit
def _dense_slope(
    row, labels_N, dense_uld_N, dense_mapped_N, grad_ce_N, grad_uld_N, grad_mapped_N,
    K: tl.constexpr, I: tl.constexpr, WITH_LABELS: tl.constexpr,
):  # fmt: skip
    """What every word's probability is multiplied by, and the three losses' own gradients."""
    slope = tl.zeros((), tl.float32)
    grad_ce = tl.zeros((), tl.float32)
    grad_uld = tl.zeros((), tl.float32)
    grad_mapped = tl.zeros((), tl.float32)
    if WITH_LABELS:
        grad_ce = tl.where(tl.load(labels_N + row) >= 0, tl.load(grad_ce_N + row), 0.0)
        slope += grad_ce
    if K > 0:
        grad_uld = tl.load(grad_uld_N + row)
        slope += grad_uld * tl.load(dense_uld_N + row)
    if I > 0:
        grad_mapped = tl.load(grad_mapped_N + row)
        slope += grad_mapped * tl.load(dense_mapped_N + row)
    return slope, grad_ce, grad_uld, grad_mapped


@triton.jit
def dense_gradient_kernel(
    logits_NV, row_stride, gradient_NV, gradient_stride, lse_N, labels_N, dense_uld_N, dense_mapped_N, kth_N,
    tail_signs_NB, grad_ce_N, grad_uld_N, grad_mapped_N, V, step_nats,
    K: tl.constexpr, I: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    WITH_LABELS: tl.constexpr, SKETCH: tl.constexpr,
):  # fmt: skip
    """`softmax * slope` over TILES tiles of one row; `gradient_NV` may be the logits themselves."""
    row = tl.program_id(0).to(tl.int64)
    lse = tl.load(lse_N + row)
    dense, _, grad_uld, _ = _dense_slope(
        row, labels_N, dense_uld_N, dense_mapped_N, grad_ce_N, grad_uld_N, grad_mapped_N, K, I, WITH_LABELS
    )
    kth = lse
    if SKETCH:
        kth = tl.load(kth_N + row)
    source, target = logits_NV + row * row_stride, gradient_NV + row * gradient_stride
    first = tl.program_id(1) * TILE * TILES
    for start in range(first, tl.minimum(first + TILE * TILES, V), TILE):
        word = start + tl.arange(0, TILE)
        values = tl.load(source + word, mask=word < V, other=float("-inf")).to(tl.float32)
        slope = dense
        if SKETCH:
            slope = dense + grad_uld * _tail_sign(tail_signs_NB + row * B, kth, values, step_nats, B)
        tl.store(target + word, (tl.exp(values - lse) * slope).to(gradient_NV.dtype.element_ty), mask=word < V)


@triton.jit
def listed_gradient_kernel(
    gradient_NV, gradient_stride, lse_N, listed_NM, listed_z_NM, listed_own_NM, labels_N, dense_uld_N, dense_mapped_N,
    kth_N, tail_signs_NB, grad_ce_N, grad_uld_N, grad_mapped_N, step_nats,
    K: tl.constexpr, KP: tl.constexpr, I: tl.constexpr, IP: tl.constexpr, B: tl.constexpr,
    WITH_LABELS: tl.constexpr, SKETCH: tl.constexpr,
):  # fmt: skip
    """The listed words of one row. A word may be in the head, mapped and the label: each place writes the same sum."""
    row = tl.program_id(0).to(tl.int64)
    lse = tl.load(lse_N + row)
    dense, grad_ce, grad_uld, grad_mapped = _dense_slope(
        row, labels_N, dense_uld_N, dense_mapped_N, grad_ce_N, grad_uld_N, grad_mapped_N, K, I, WITH_LABELS
    )
    M: tl.constexpr = K + I + 1
    listed, listed_z, listed_own = listed_NM + row * M, listed_z_NM + row * M, listed_own_NM + row * M
    target = gradient_NV + row * gradient_stride
    label = tl.load(listed + K + I)
    rank = tl.arange(0, KP)
    head = tl.load(listed + rank, mask=rank < K, other=-1)
    head_own = tl.load(listed_own + rank, mask=rank < K, other=0.0) * grad_uld
    item = tl.arange(0, IP)
    mapped = tl.load(listed + K + item, mask=item < I, other=-1)
    mapped_own = tl.load(listed_own + K + item, mask=item < I, other=0.0) * grad_mapped
    mapped_own = tl.where(mapped >= 0, mapped_own, 0.0)

    if K > 0:
        q = tl.exp(tl.load(listed_z + rank, mask=rank < K, other=float("-inf")) - lse)
        whole = q * dense + head_own - tl.where(head == label, grad_ce, 0.0)
        if I > 0:
            whole += tl.sum(tl.where(head[:, None] == mapped[None, :], mapped_own[None, :], 0.0), 1)
        tl.store(target + head, whole.to(gradient_NV.dtype.element_ty), mask=head >= 0)
    if I > 0:
        z = tl.load(listed_z + K + item, mask=item < I, other=float("-inf"))
        q = tl.exp(z - lse)
        slope = tl.zeros((IP,), tl.float32) + dense
        if K > 0:
            in_head = (head[:, None] == mapped[None, :]) & (head >= 0)[:, None]
            if SKETCH:
                sign = _tail_sign(tail_signs_NB + row * B, tl.load(kth_N + row), z, step_nats, B)
                slope += tl.where(tl.sum(in_head.to(tl.int32), 0) > 0, 0.0, grad_uld * sign)
        whole = q * slope + mapped_own - tl.where(mapped == label, grad_ce, 0.0)
        if K > 0:
            whole += tl.sum(tl.where(in_head, head_own[:, None], 0.0), 0)
        tl.store(target + mapped, whole.to(gradient_NV.dtype.element_ty), mask=mapped >= 0)
    if WITH_LABELS:
        z_label = tl.load(listed_z + K + I)
        q_label = tl.exp(z_label - lse)
        slope_label = dense
        if SKETCH:
            sign = _tail_sign(tail_signs_NB + row * B, tl.load(kth_N + row), z_label, step_nats, B)
            slope_label += tl.where(tl.sum((head == label).to(tl.int32), 0) > 0, 0.0, grad_uld * sign)
        whole_label = q_label * slope_label - grad_ce
        whole_label += tl.sum(tl.where(head == label, head_own, 0.0), 0)
        whole_label += tl.sum(tl.where(mapped == label, mapped_own, 0.0), 0)
        tl.store(target + label, whole_label.to(gradient_NV.dtype.element_ty), mask=label >= 0)
