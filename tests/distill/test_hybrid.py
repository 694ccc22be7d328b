"""`hybrid`: `mapped` and sorted values on the rest: definition, gradient, certificate, edges."""

import pytest
import torch
from reference_losses import hybrid_rest, mapped
from test_losses import SHAPES, TOLERANCES, rows, words

from distill import hybrid_loss
from distill.losses import mapped_loss, uld_loss


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_its_definition(shape, dtype):
    n, v, _, k = shape
    logits_NV, _, head_NK, tail_N = rows(*shape)
    logits_NV, words_NI = logits_NV.to(dtype), words(n, max(1, k // 2), v)
    loss_N, _ = hybrid_loss(logits_NV, head_NK, tail_N, words_NI, reduction="none")
    expected_N = mapped(logits_NV, head_NK, words_NI) + hybrid_rest(logits_NV, head_NK, tail_N, words_NI)
    rtol, atol = TOLERANCES[dtype]
    slack = 1 if dtype == torch.float64 else 50
    torch.testing.assert_close(loss_N.double(), expected_N, rtol=rtol * slack, atol=atol * slack)


@pytest.mark.parametrize(("v", "k", "i"), [(14, 4, 3), (5, 8, 8), (9, 9, 2)])
def test_gradient_is_the_definitions(v, k, i):
    logits_NV, _, head_NK, tail_N = rows(3, v, 20, k)
    words_NI = words(3, i, v)
    weight_N = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    logits_NV.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: hybrid_loss(logits, head_NK, tail_N, words_NI, weight_N)[0], logits_NV
    )
    loss, _ = hybrid_loss(logits_NV, head_NK, tail_N, words_NI, weight_N, "sum")
    naive_N = mapped(logits_NV, head_NK, words_NI) + hybrid_rest(logits_NV, head_NK, tail_N, words_NI)
    ours, theirs = (torch.autograd.grad(total, logits_NV)[0] for total in (loss, (weight_N * naive_N).sum()))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("k", [4, 16, 64, 300])
def test_certificate_holds_over_both_whole_rests_and_closes(k):
    logits_NV, probs_NU, head_NK, tail_N = rows(40, 400, 300, k)
    words_NI = words(40, 4, 400)
    loss_N, certificate = hybrid_loss(logits_NV, head_NK, tail_N, words_NI, reduction="none")
    full_N = mapped(logits_NV, head_NK, words_NI) + hybrid_rest(logits_NV, probs_NU, 0 * tail_N, words_NI)
    torch.testing.assert_close(certificate.lower_N, loss_N)
    assert (certificate.lower_N <= full_N + 1e-9).all()
    assert (full_N <= certificate.upper_N + 1e-9).all()
    if k == 300:
        torch.testing.assert_close(certificate.upper_N, certificate.lower_N, atol=1e-9, rtol=0)


def test_where_nothing_maps_it_is_uld_and_where_all_maps_the_rest_is_the_tail():
    logits_NV, _, head_NK, tail_N = rows(5, 60, 90, 8)
    nothing_NI = torch.full((5, 8), -1)
    loss_N, certificate = hybrid_loss(logits_NV, head_NK, tail_N, nothing_NI, reduction="none")
    uld_N, of_uld = uld_loss(logits_NV, head_NK, tail_N, reduction="none", return_certificate=True)
    torch.testing.assert_close(loss_N, uld_N)
    torch.testing.assert_close(certificate.upper_N, of_uld.upper_N)
    all_NI = torch.arange(8).expand(5, 8)
    loss_N, _ = hybrid_loss(logits_NV, head_NK, tail_N, all_NI, reduction="none")
    outside_N = 1 - logits_NV.softmax(1)[:, :8].sum(1)
    torch.testing.assert_close(
        loss_N, mapped_loss(logits_NV, head_NK, all_NI, reduction="none") + (tail_N - outside_N).abs()
    )


def test_no_rows_and_words_ruled_out():
    loss, _ = hybrid_loss(torch.zeros(0, 9), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 2, dtype=torch.int64))
    assert loss == 0
    logits_NV = torch.tensor([[0.0, 1.0, float("-inf"), 0.5]], requires_grad=True)
    loss, _ = hybrid_loss(logits_NV, torch.tensor([[0.6, 0.3, 0.1]]), torch.tensor([0.0]), torch.tensor([[0, -1]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits_NV.grad).all()
