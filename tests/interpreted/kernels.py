"""The Triton kernels under Triton's interpreter, on the CPU: what they compute, at shapes that finish in seconds.

Run by tests/distill/test_fused_triton.py in a process of its own, because TRITON_INTERPRET=1 must be set before triton
is first imported:  TRITON_INTERPRET=1 python -m pytest tests/interpreted/kernels.py
"""

import pytest
import torch
from reference_losses import cached_uld, full_uld, mapped
from torch.nn.functional import cross_entropy

from distill.fused import choose_implementation, row_losses
from distill.fused_triton import INTERPRETED
from distill.linear import linear_uld_loss
from distill.losses import TeacherRows, uld_loss
from storage_specs.errors import ConfigError

SHAPES = [(37, 64, 5), (129, 1, 1), (1000, 8, 8), (1337, 16, 3)]  # student vocabulary, K, words

# A float32 sum over a vocabulary; gradients are rounded to the dtype of the logits.
VALUE_TOLERANCE = 5e-6
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make_case(n, v, k, i, dtype, seed=0, teacher_v=700):
    """Logits without ties, the teacher's rows with a sketch, labels, student words, rank edges, the whole teacher."""
    generator = torch.Generator().manual_seed(seed)
    levels_V = torch.linspace(-4, 9, v, dtype=torch.float64)
    if dtype != torch.float32:
        # Neighbouring bit patterns up to 9.5: as many distinct values as 16 bits have there.
        last = torch.tensor(9.5, dtype=dtype).view(torch.int16).item()
        levels_V = torch.arange(last - v, last, dtype=torch.int16).view(dtype)
    logits_NV = torch.stack([levels_V[torch.randperm(v, generator=generator)] for _ in range(n)]).to(dtype)
    teacher_NU = (3 * torch.randn(n, teacher_v, generator=generator, dtype=torch.float64)).softmax(1)
    teacher_NU = teacher_NU.sort(dim=1, descending=True).values
    edges = torch.tensor(sorted({round(k * (teacher_v / k) ** (j / 8)) for j in range(9)}))
    ends_NU = torch.cat([teacher_NU.new_zeros(n, 1), teacher_NU.cumsum(1)], 1)
    teacher = TeacherRows(
        probs_NK=teacher_NU[:, :k].float(),
        tail_N=teacher_NU[:, k:].sum(1).float(),
        bins_NJ=ends_NU[:, edges].diff(dim=1).float(),
    )
    labels_N = torch.randint(0, v, (n,), generator=generator)
    labels_N[::3] = -100
    # Few words, so that they repeat, and coincide with the head and the label.
    words_NI = torch.randint(-1, min(v, 20), (n, i), generator=generator)
    words_NI[1, :1] = labels_N[1]
    return logits_NV, teacher, labels_N, words_NI, edges, teacher_NU


def reference_terms(logits_NV, teacher, labels_N, words_NI):
    ce_N = cross_entropy(logits_NV, labels_N, reduction="none")
    uld_N = cached_uld(logits_NV, teacher.probs_NK, teacher.tail_N)
    return ce_N, uld_N, mapped(logits_NV, teacher.probs_NK, words_NI)


def test_this_is_the_interpreter():
    assert INTERPRETED
    assert choose_implementation(torch.zeros(1, 8), None, "triton") == "triton"


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("v", "k", "i", "in_place"),
    [
        *[(*shape, in_place) for shape in SHAPES for in_place in (False, True)],
        (700, 700 // 3, 16, False),
    ],
)
def test_values_and_gradients_equal_their_definitions(v, k, i, dtype, in_place):
    logits_NV, teacher, labels_N, words_NI, _, _ = make_case(3, v, k, i, dtype)
    exact_NV = logits_NV.double().requires_grad_()
    expected = reference_terms(exact_NV, teacher, labels_N, words_NI)
    scale_3N = torch.rand(3, 3, generator=torch.Generator().manual_seed(1))
    sum((term_N * scale_N).sum() for term_N, scale_N in zip(expected, scale_3N, strict=True)).backward()
    logits_NV = logits_NV.clone().requires_grad_()
    losses = row_losses(
        logits_NV, labels_N=labels_N, teacher=teacher, words_NI=words_NI, impl="triton", in_place=in_place
    )
    got = (losses.ce_N, losses.uld_N, losses.mapped_N)
    for ours_N, theirs_N in zip(got, expected, strict=True):
        torch.testing.assert_close(ours_N.detach().double(), theirs_N.detach(), atol=VALUE_TOLERANCE, rtol=1e-5)
    sum((term_N * scale_N).sum() for term_N, scale_N in zip(got, scale_3N, strict=True)).backward()
    error = (logits_NV.grad.double() - exact_NV.grad).norm() / exact_NV.grad.norm()
    assert error < GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("terms", ["ce", "uld", "mapped"])
def test_each_term_alone(terms):
    logits_NV, teacher, labels_N, words_NI, _, _ = make_case(3, 300, 8, 4, torch.float32)
    logits_NV.requires_grad_()
    losses = row_losses(
        logits_NV,
        labels_N=labels_N if terms == "ce" else None,
        teacher=None if terms == "ce" else teacher,
        uld=terms == "uld",
        words_NI=words_NI if terms == "mapped" else None,
        impl="triton",
    )
    references = reference_terms(logits_NV.double(), teacher, labels_N, words_NI)
    expected_N = dict(zip(("ce", "uld", "mapped"), references, strict=True))
    for name in ("ce", "uld", "mapped"):
        assert (getattr(losses, f"{name}_N") is not None) == (name == terms)
    got_N = getattr(losses, f"{terms}_N")
    torch.testing.assert_close(got_N.double(), expected_N[terms], atol=VALUE_TOLERANCE, rtol=1e-5)
    (expected,) = torch.autograd.grad(expected_N[terms].sum(), logits_NV)
    (got,) = torch.autograd.grad(got_N.sum(), logits_NV)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("change", ["equal", "ascending", "rounded", "infinite"])
def test_ties_sorted_rows_and_infinities(change):
    logits_NV, teacher, _, _, _, _ = make_case(3, 900, 16, 0, torch.bfloat16)
    if change == "equal":
        logits_NV = torch.zeros_like(logits_NV)
    elif change == "ascending":
        logits_NV = logits_NV.sort(dim=1).values
    elif change == "rounded":
        logits_NV = logits_NV.round()
    else:
        logits_NV = logits_NV.clone()
        logits_NV[:, 10:] = -torch.inf
        logits_NV[0, 1:] = -torch.inf
    logits_NV = logits_NV.contiguous().requires_grad_()
    losses = row_losses(logits_NV, teacher=teacher, impl="triton")
    expected_N = cached_uld(logits_NV.detach(), teacher.probs_NK, teacher.tail_N)
    torch.testing.assert_close(losses.uld_N.detach().double(), expected_N, atol=VALUE_TOLERANCE, rtol=0)
    losses.uld_N.sum().backward()
    assert logits_NV.grad.isfinite().all()
    # Whatever the ties: the gradient of a function of the softmax sums to zero over the vocabulary.
    assert logits_NV.grad.double().sum(1).abs().max() < 1e-2


def test_strides_masked_rows_and_no_rows():
    logits_NV, teacher, labels_N, _, _, _ = make_case(4, 300, 8, 0, torch.float32)
    expected_N = row_losses(logits_NV, teacher=teacher, impl="triton").uld_N
    for strided_NV in (logits_NV.t().contiguous().t(), torch.cat([logits_NV, logits_NV], 1)[:, :300]):
        assert not strided_NV.is_contiguous()
        torch.testing.assert_close(row_losses(strided_NV, teacher=teacher, impl="triton").uld_N, expected_N)
    logits_NV.requires_grad_()
    weight_N = torch.zeros(4)
    loss = uld_loss(logits_NV, teacher.probs_NK, teacher.tail_N, weight_N, impl="triton")
    loss = loss + row_losses(logits_NV, labels_N=torch.full_like(labels_N, -100), impl="triton").ce_N.sum()
    loss.backward()
    assert loss.item() == 0
    assert not logits_NV.grad.any()
    nothing = uld_loss(torch.zeros(0, 300), torch.zeros(0, 8), torch.zeros(0), impl="triton")
    assert nothing.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sketch_equals_the_torch_implementation(dtype):
    logits_NV, teacher, labels_N, words_NI, edges, teacher_NU = make_case(4, 1500, 16, 4, dtype)
    results = []
    for impl in ("torch", "triton"):
        leaf_NV = logits_NV.clone().requires_grad_()
        losses = row_losses(leaf_NV, labels_N=labels_N, teacher=teacher, rank_edges=edges, words_NI=words_NI, impl=impl)
        (losses.ce_N + 2 * losses.uld_N + losses.mapped_N).sum().backward()
        results.append((losses.uld_N.detach(), leaf_NV.grad.double()))
    torch.testing.assert_close(results[1][0], results[0][0], atol=2e-5, rtol=0)
    assert (results[1][1] - results[0][1]).norm() / results[0][1].norm() < max(1e-4, GRADIENT_TOLERANCE[dtype])
    assert (results[1][0] - full_uld(logits_NV, teacher_NU)).abs().max() < 2e-2


def test_certificate():
    logits_NV, teacher, _, _, _, teacher_NU = make_case(4, 900, 16, 0, torch.float32)
    losses = row_losses(logits_NV, teacher=teacher, impl="triton")
    full_N = full_uld(logits_NV, teacher_NU)
    assert (losses.lower_N <= full_N + 1e-6).all()
    assert (full_N <= losses.upper_N + 1e-6).all()


def test_linear_equals_unfused():
    _, teacher, labels_N, words_NI, _, _ = make_case(7, 300, 8, 4, torch.float32)
    generator = torch.Generator().manual_seed(3)
    hidden_ND, weight_VD = torch.randn(7, 12, generator=generator), torch.randn(300, 12, generator=generator)
    results = []
    for impl, chunk_rows in (("torch", 7), ("triton", 3)):
        leaves = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        options = {"words_NI": words_NI, "mapped_weight": 0.5, "impl": impl, "chunk_rows": chunk_rows}
        losses = linear_uld_loss(*leaves, labels_N, teacher, **options)
        (losses.loss * 3).backward()
        results.append([losses.loss.detach(), losses.lower_N, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_what_the_kernels_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="float64"):
        row_losses(torch.zeros(1, 8, dtype=torch.float64), labels_N=torch.zeros(1, dtype=torch.int64), impl="triton")
    rows = TeacherRows(probs_NK=torch.full((1, 300), 1 / 300), tail_N=torch.zeros(1))
    with pytest.raises(ConfigError, match="256"):
        row_losses(torch.zeros(1, 400), teacher=rows, impl="triton")
