"""The Triton kernels on a CUDA device, at the sizes they are for. Collected only by `bash scripts/test_gpu.sh`."""

import pytest
import torch
from reference_losses import cached_uld, full_uld
from torch.nn.functional import cross_entropy

from distill.fused import row_losses
from distill.fused_triton import FusedRowLosses, Tuning
from distill.linear import linear_uld_loss
from distill.losses import TeacherRows, mapped_loss
from distill.teacher_tail import tail_laws

DEVICE = "cuda"
# The last bits of a float32 sum over a vocabulary; gradients are rounded to the dtype of the logits.
VALUE_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make_case(n, v, k, i, dtype, seed=0, ties=True, teacher_v=20_000):
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    if ties:
        logits_NV = (torch.randn(n, v, device=DEVICE, generator=generator) * 2.5).to(dtype)
    else:
        # Neighbouring bit patterns up to 12.75: as many distinct values as 16 bits have there.
        last = torch.tensor(12.75, dtype=dtype).view(torch.int16).item()
        values_V = torch.arange(last - v, last, device=DEVICE, dtype=torch.int16).view(dtype)
        logits_NV = torch.stack([values_V[torch.randperm(v, device=DEVICE, generator=generator)] for _ in range(n)])
    teacher_NU = (torch.randn(n, teacher_v, device=DEVICE, generator=generator) * 3).double().softmax(-1)
    teacher_NU = teacher_NU.sort(dim=-1, descending=True).values
    probs_NK = teacher_NU[:, :k].float()
    edges = torch.tensor(sorted({round(k * (teacher_v / k) ** (j / 16)) for j in range(17)}), device=DEVICE)
    ends_NU = torch.cat([teacher_NU.new_zeros(n, 1), teacher_NU.cumsum(1)], 1)
    bins_NJ = ends_NU[:, edges].diff(dim=1).float()
    teacher = TeacherRows(probs_NK=probs_NK, tail_N=(1 - probs_NK.double().sum(1)).float(), bins_NJ=bins_NJ)
    labels_N = torch.randint(0, v, (n,), device=DEVICE, generator=generator)
    labels_N[::3] = -100
    words_NI = torch.randint(-1, min(v, 40), (n, i), device=DEVICE, generator=generator)
    return logits_NV, teacher, labels_N, words_NI, edges, teacher_NU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("v", "k"),
    [(37, 64), (1000, 1), (1000, 64), (49_152, 16), (49_152, 100), (151_936, 64), (262_144, 64), (262_144, 256)],
)
def test_losses_equal_the_full_sort_in_float64(v, k, dtype):
    logits_NV, teacher, labels_N, words_NI, _, _ = make_case(7, v, k, min(k, 16), dtype)
    losses = row_losses(logits_NV, labels_N=labels_N, teacher=teacher, words_NI=words_NI, impl="triton")
    exact_NV = logits_NV.double()
    expected_uld_N = cached_uld(exact_NV, teacher.probs_NK, teacher.tail_N)
    torch.testing.assert_close(losses.uld_N.double(), expected_uld_N, atol=VALUE_TOLERANCE, rtol=0)
    expected_ce_N = cross_entropy(exact_NV, labels_N, reduction="none")
    torch.testing.assert_close(losses.ce_N.double(), expected_ce_N, atol=VALUE_TOLERANCE, rtol=1e-6)
    expected_mapped_N = mapped_loss(exact_NV, teacher.probs_NK, words_NI, reduction="none")
    torch.testing.assert_close(losses.mapped_N.double(), expected_mapped_N, atol=VALUE_TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize(
    ("v", "dtype"),
    [(151_936, torch.float32), (49_152, torch.float32), (1_100, torch.bfloat16), (1_100, torch.float16)],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_gradient_equals_float64_autograd(v, dtype, in_place):
    logits_NV, teacher, labels_N, words_NI, _, _ = make_case(5, v, 64, 16, dtype, ties=dtype == torch.float32)
    exact_NV = logits_NV.double().requires_grad_()
    scale_3N = torch.rand(3, 5, device=DEVICE)
    expected_N = (
        cross_entropy(exact_NV, labels_N, reduction="none") * scale_3N[0]
        + row_losses(exact_NV, teacher=teacher, impl="torch").uld_N * scale_3N[1]
        + mapped_loss(exact_NV, teacher.probs_NK, words_NI, reduction="none") * scale_3N[2]
    )
    expected_N.sum().backward()
    logits_NV = logits_NV.clone().requires_grad_()
    losses = row_losses(
        logits_NV, labels_N=labels_N, teacher=teacher, words_NI=words_NI, impl="triton", in_place=in_place
    )
    (losses.ce_N * scale_3N[0] + losses.uld_N * scale_3N[1] + losses.mapped_N * scale_3N[2]).sum().backward()
    error = (logits_NV.grad.double() - exact_NV.grad).norm() / exact_NV.grad.norm()
    assert error < GRADIENT_TOLERANCE[dtype]


def test_many_ties_sorted_rows_and_infinities():
    for seed, change in enumerate((torch.zeros_like, lambda z: z.sort(dim=1).values, torch.round, _with_infinities)):
        logits_NV, teacher, _, _, _, _ = make_case(4, 30_000, 64, 0, torch.bfloat16, seed=seed)
        logits_NV = change(logits_NV).contiguous().requires_grad_()
        losses = row_losses(logits_NV, teacher=teacher, impl="triton")
        expected_N = cached_uld(logits_NV.detach().double(), teacher.probs_NK, teacher.tail_N)
        torch.testing.assert_close(losses.uld_N.double(), expected_N, atol=VALUE_TOLERANCE, rtol=0)
        losses.uld_N.sum().backward()
        # Whatever the ties: the gradient of a function of the softmax sums to zero over the vocabulary.
        assert logits_NV.grad.isfinite().all()
        assert logits_NV.grad.double().sum(1).abs().max() < 1e-3


def _with_infinities(logits_NV):
    logits_NV = logits_NV.clone()
    logits_NV[:, 50:] = -torch.inf
    logits_NV[0, 1:] = -torch.inf
    return logits_NV


def test_sketch_is_close_to_the_exact_sort():
    logits_NV, teacher, _, _, edges, teacher_NU = make_case(6, 151_936, 64, 0, torch.float32)
    exact_NV = logits_NV.double().requires_grad_()
    expected_N = full_uld(exact_NV, teacher_NU)
    expected_N.sum().backward()
    logits_NV = logits_NV.requires_grad_()
    losses = row_losses(logits_NV, teacher=teacher, rank_edges=edges, impl="triton")
    losses.uld_N.sum().backward()
    assert (losses.uld_N - expected_N).abs().max() < 5e-3
    assert torch.cosine_similarity(logits_NV.grad.double(), exact_NV.grad).min() > 0.99
    by_torch = row_losses(logits_NV.detach(), teacher=teacher, rank_edges=edges, impl="torch")
    torch.testing.assert_close(losses.uld_N, by_torch.uld_N, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sketch", [False, True])
def test_linear_equals_unfused(sketch):
    _, teacher, labels_N, words_NI, edges, _ = make_case(300, 5_000, 32, 8, torch.float32)
    hidden_ND = torch.randn(300, 128, device=DEVICE)
    weight_VD = torch.randn(5_000, 128, device=DEVICE) * 0.2
    results = []
    for impl, chunk in (("torch", 300), ("triton", 70)):
        a_ND, w_VD = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        losses = linear_uld_loss(
            a_ND, w_VD, labels_N, teacher, words_NI=words_NI, rank_edges=edges if sketch else None, mapped_weight=0.5,
            impl=impl, chunk_rows=chunk,
        )  # fmt: skip
        (losses.loss * 3).backward()
        results.append((losses.loss.detach(), a_ND.grad, w_VD.grad))
    tolerance = 5e-3 if sketch else 1e-4
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-3 if sketch else 1e-5, rtol=0)
    for ours, theirs in zip(results[1][1:], results[0][1:], strict=True):
        assert (ours - theirs).norm() / theirs.norm() < tolerance


def test_extra_memory_is_small():
    logits_NV, teacher, labels_N, words_NI, edges, _ = make_case(1024, 151_936, 64, 16, torch.bfloat16, teacher_v=5_000)
    logits_NV = logits_NV.requires_grad_()
    laws = tail_laws(teacher.probs_NK, teacher.bins_NJ, edges)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ce_N, uld_N, mapped_N, _, _ = FusedRowLosses.apply(
        logits_NV, labels_N, teacher.probs_NK.contiguous(), teacher.tail_N, words_NI,
        teacher.probs_NK[:, :16].contiguous(), laws, True, Tuning(),
    )  # fmt: skip
    (ce_N + uld_N + mapped_N).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 32 * 2**20
