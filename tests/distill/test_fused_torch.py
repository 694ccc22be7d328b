"""The torch implementation: real vocabularies, the gradient it writes down, the certificate, the head fused."""

from itertools import pairwise

import pytest
import torch
from reference_losses import cached_uld, full_uld, mapped
from torch.nn.functional import cross_entropy

from distill import fused_torch
from distill.fused import choose_implementation, row_losses
from distill.fused_torch import top_logits
from distill.linear import linear_uld_loss
from distill.losses import TeacherRows, uld_loss
from storage_specs.errors import ConfigError
from storage_specs.sketch import bin_masses, log_rank_edges

GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make_case(n, v, u, k, i=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits_NV = (2.5 * torch.randn(n, v, generator=generator, dtype=torch.float64)).to(dtype)
    teacher_NU = (3 * torch.randn(n, u, generator=generator, dtype=torch.float64)).softmax(1)
    teacher_NU = teacher_NU.sort(dim=1, descending=True).values
    teacher = TeacherRows(probs_NK=teacher_NU[:, :k], tail_N=teacher_NU[:, k:].sum(1))
    if k < u:
        edges = log_rank_edges(k, u, 16)
        bins_NJ = torch.from_numpy(bin_masses(teacher_NU.numpy(), edges)).float()
        teacher = TeacherRows(probs_NK=teacher.probs_NK, tail_N=teacher.tail_N, bins_NJ=bins_NJ)
    labels_N = torch.randint(0, v, (n,), generator=generator)
    labels_N[::3] = -100
    words_NI = torch.randint(-1, min(v, 20), (n, min(i, k)), generator=generator)
    return logits_NV, teacher, labels_N, words_NI, teacher_NU


def reference_terms(logits_NV, teacher, labels_N, words_NI):
    ce_N = cross_entropy(logits_NV, labels_N, reduction="none")
    uld_N = cached_uld(logits_NV, teacher.probs_NK, teacher.tail_N)
    return ce_N, uld_N, mapped(logits_NV, teacher.probs_NK, words_NI)


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=str)
@pytest.mark.parametrize(("v", "k"), [(1000, 1), (1000, 1500), (49_152, 64), (151_936, 64), (262_144, 64)])
def test_values_and_gradients_equal_their_definitions(v, k, dtype):
    logits_NV, teacher, labels_N, words_NI, _ = make_case(3, v, 1500, k, 4, dtype)
    exact_NV = logits_NV.double().requires_grad_()
    expected = reference_terms(exact_NV, teacher, labels_N, words_NI)
    scale_3N = torch.tensor([[0.5, 1.0, 2.0], [0.3, 0.0, 1.5], [1.0, 0.7, 0.2]], dtype=torch.float64)
    sum((term_N * scale_N).sum() for term_N, scale_N in zip(expected, scale_3N, strict=True)).backward()
    logits_NV = logits_NV.requires_grad_()
    losses = row_losses(logits_NV, labels_N=labels_N, teacher=teacher, words_NI=words_NI, impl="torch")
    got = (losses.ce_N, losses.uld_N, losses.mapped_N)
    for ours_N, theirs_N in zip(got, expected, strict=True):
        torch.testing.assert_close(ours_N.detach().double(), theirs_N.detach(), atol=2e-5, rtol=1e-5)
    sum((term_N * scale_N).sum() for term_N, scale_N in zip(got, scale_3N, strict=True)).backward()
    # Which of several equal logits stands before the other is a choice (of a subgradient), but their sum is none.
    for z_V, ours_V, theirs_V in zip(logits_NV.detach(), logits_NV.grad.double(), exact_NV.grad, strict=True):
        places_V = z_V.unique(return_inverse=True)[1]
        ours, theirs = (torch.zeros_like(theirs_V).scatter_add_(0, places_V, each_V) for each_V in (ours_V, theirs_V))
        assert (ours - theirs).norm() <= GRADIENT_TOLERANCE[dtype] * theirs.norm()


@pytest.mark.parametrize(("v", "k"), [(30, 4), (6, 9), (9, 9), (200, 1)])
def test_gradcheck_of_all_terms_together(v, k):
    logits_NV, teacher, labels_N, words_NI, _ = make_case(3, v, 20, k)

    def terms(logits_NV):
        losses = row_losses(logits_NV, labels_N=labels_N, teacher=teacher, words_NI=words_NI)
        return losses.ce_N, losses.uld_N, losses.mapped_N

    assert torch.autograd.gradcheck(terms, logits_NV.requires_grad_())


def test_gradient_in_place_is_the_gradient():
    logits_NV, teacher, labels_N, words_NI, _ = make_case(4, 300, 100, 8)
    gradients = []
    for in_place in (False, True):
        leaf_NV = logits_NV.clone().requires_grad_()
        losses = row_losses(leaf_NV, labels_N=labels_N, teacher=teacher, words_NI=words_NI, in_place=in_place)
        (losses.ce_N + losses.uld_N + losses.mapped_N).sum().backward()
        gradients.append(leaf_NV.grad)
    assert torch.equal(*gradients)
    assert torch.equal(leaf_NV, gradients[0])


@pytest.mark.parametrize("v", [1000, 1013, 5000])
def test_top_logits_are_topk(v):
    logits_NV = torch.randn(6, v).round(decimals=1)
    for k in (1, 5, 40):
        values_NK, words_NK = top_logits(logits_NV, k)
        assert torch.equal(values_NK, logits_NV.topk(k, dim=1).values)
        assert torch.equal(logits_NV.gather(1, words_NK), values_NK)
        assert all(len(set(row)) == k for row in words_NK.tolist())


def test_chunks_change_nothing(monkeypatch):
    logits_NV, teacher, labels_N, words_NI, _ = make_case(7, 400, 300, 16)
    edges = torch.from_numpy(log_rank_edges(16, 300, 16))
    results = []
    for size in (2**30, 2 * 4 * 400):
        monkeypatch.setitem(fused_torch.CHUNK_BYTES, "cpu", size)
        leaf_NV = logits_NV.clone().requires_grad_()
        losses = row_losses(leaf_NV, labels_N=labels_N, teacher=teacher, words_NI=words_NI, rank_edges=edges)
        (losses.ce_N + losses.uld_N + losses.mapped_N).sum().backward()
        results.append((losses.uld_N.detach(), losses.upper_N, leaf_NV.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces an autograd function
def test_torch_compile_traces_it():
    logits_NV, teacher, labels_N, _, _ = make_case(4, 300, 100, 8, dtype=torch.float32)

    def loss(logits_NV):
        losses = row_losses(logits_NV, labels_N=labels_N, teacher=teacher, impl="torch")
        return (losses.ce_N + losses.uld_N).mean()

    leaf_NV, other_NV = logits_NV.clone().requires_grad_(), logits_NV.clone().requires_grad_()
    loss(leaf_NV).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(other_NV).backward()
    torch.testing.assert_close(other_NV.grad, leaf_NV.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_and_infinities(dtype):
    logits_NV, teacher, _, _, _ = make_case(4, 700, 300, 16, dtype=dtype)
    logits_NV = logits_NV.clone()
    logits_NV[0] = 0
    logits_NV[1] = logits_NV[1].round()
    logits_NV[2, 10:] = -torch.inf
    logits_NV[3, 1:] = -torch.inf
    expected_N = cached_uld(logits_NV, teacher.probs_NK, teacher.tail_N)
    losses = row_losses(logits_NV.requires_grad_(), teacher=teacher)
    torch.testing.assert_close(losses.uld_N.detach().double(), expected_N, atol=5e-6, rtol=0)
    losses.uld_N.sum().backward()
    assert logits_NV.grad.isfinite().all()
    assert logits_NV.grad.double().sum(1).abs().max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_certificate_tightens_with_k_and_closes_at_the_whole_vocabulary(dtype):
    widths = []
    for k in (1, 4, 16, 64, 300):
        logits_NV, teacher, _, _, teacher_NU = make_case(20, 400, 300, k, dtype=dtype)
        loss_N, certificate = uld_loss(
            logits_NV, teacher.probs_NK, teacher.tail_N, reduction="none", return_certificate=True
        )
        full_N = full_uld(logits_NV, teacher_NU)
        assert (certificate.lower_N <= full_N + 1e-6).all()
        assert (full_N <= certificate.upper_N + 1e-6).all()
        torch.testing.assert_close(loss_N, certificate.lower_N)
        assert (loss_N <= 2 + 1e-6).all()
        widths.append(certificate.upper_N - certificate.lower_N)
    for wider_N, narrower_N in pairwise(widths):
        assert (narrower_N <= wider_N + 1e-6).all()
    assert widths[-1].max() < 1e-6


def test_sketch_is_closer_to_the_full_sum_than_the_tail_mass():
    logits_NV, teacher, _, _, teacher_NU = make_case(30, 4000, 6000, 32)
    edges = torch.from_numpy(log_rank_edges(32, 6000, 16))
    exact_NV = logits_NV.clone().requires_grad_()
    expected_N = full_uld(exact_NV, teacher_NU)
    expected_N.sum().backward()
    errors, cosines = [], []
    for options in ({}, {"teacher_bins_NJ": teacher.bins_NJ, "rank_edges": edges}):
        leaf_NV = logits_NV.clone().requires_grad_()
        loss_N = uld_loss(leaf_NV, teacher.probs_NK, teacher.tail_N, reduction="none", **options)
        loss_N.sum().backward()
        errors.append((loss_N - expected_N).abs().mean().item())
        cosines.append(torch.cosine_similarity(leaf_NV.grad, exact_NV.grad).mean().item())
    assert errors[1] < 0.002 < errors[0]
    assert cosines[1] > 0.995 > cosines[0]


@pytest.mark.parametrize("sketch", [False, True])
def test_linear_equals_unfused(sketch):
    _, teacher, labels_N, words_NI, _ = make_case(11, 90, 300, 8)
    edges = torch.from_numpy(log_rank_edges(8, 300, 16)) if sketch else None
    generator = torch.Generator().manual_seed(5)
    hidden_ND = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(90, 6, generator=generator, dtype=torch.float64)
    weight_N = torch.rand(11, generator=generator)
    fused = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    plain = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    result = linear_uld_loss(
        *fused,
        labels_N,
        teacher,
        weight_N=weight_N,
        words_NI=words_NI,
        rank_edges=edges,
        mapped_weight=0.5,
        chunk_rows=4,
    )
    losses = row_losses(plain[0] @ plain[1].T, labels_N=labels_N, teacher=teacher, words_NI=words_NI, rank_edges=edges)
    ce = losses.ce_N.sum() / (labels_N >= 0).sum()
    uld, other = (weight_N * losses.uld_N).sum() / weight_N.sum(), (weight_N * losses.mapped_N).sum() / weight_N.sum()
    loss = ce + 1.5 * uld + 0.5 * other
    (3 * loss).backward()
    (3 * result.loss).backward()
    torch.testing.assert_close(result.loss.double(), loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.lower_N, losses.lower_N)
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-8)
    with pytest.raises(RuntimeError, match="used up"):
        result.loss.backward()


def test_explicit_normalizer_and_wrong_settings():
    logits_NV, teacher, labels_N, words_NI, _ = make_case(4, 30, 40, 8)
    rows = (logits_NV, teacher.probs_NK, teacher.tail_N)
    torch.testing.assert_close(uld_loss(*rows, normalizer=7.0), uld_loss(*rows, reduction="sum") / 7)
    torch.testing.assert_close(uld_loss(*rows, torch.zeros(4)), logits_NV.new_zeros(()))
    with pytest.raises(ConfigError, match="normalizer"):
        uld_loss(*rows, reduction="sum", normalizer=7.0)
    with pytest.raises(ConfigError, match="go together"):
        uld_loss(*rows, rank_edges=torch.tensor([8, 40]))
    with pytest.raises(ConfigError, match="student_temperature"):
        uld_loss(*rows, student_temperature=0.0)
    with pytest.raises(ConfigError, match="nothing to compute"):
        row_losses(logits_NV)
    with pytest.raises(ConfigError, match="9 words of the first 8 ranks"):
        row_losses(logits_NV, teacher=teacher, words_NI=torch.zeros(4, 9, dtype=torch.int64))
    with pytest.raises(ConfigError, match="5 rows of labels_N"):
        row_losses(logits_NV, labels_N=torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ConfigError, match="without teacher"):
        row_losses(logits_NV, labels_N=labels_N, words_NI=words_NI)
    bare = TeacherRows(probs_NK=teacher.probs_NK, tail_N=teacher.tail_N)
    with pytest.raises(ConfigError, match="no tail bins"):
        row_losses(logits_NV, teacher=bare, rank_edges=torch.tensor([8, 40]))
    with pytest.raises(ConfigError, match="must be 'torch'"):
        choose_implementation(logits_NV, None, "cuda")
    with pytest.raises(ConfigError, match="cannot be used"):
        uld_loss(*rows, impl="triton")
    with pytest.raises(ConfigError, match="must be"):
        linear_uld_loss(torch.zeros(3, 4), torch.zeros(5, 6), None, None)
