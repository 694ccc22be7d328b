"""KL and JSD on the teacher's own words: definitions, whole vocabularies, TRL's, gradients, edges."""

import warnings

import pytest
import torch
from reference_losses import jsd, mapped
from test_losses import SHAPES, TOLERANCES, rows

from distill import jsd_loss, kl_loss
from storage_specs.errors import ConfigError


def ids(n: int, i: int, v: int) -> torch.Tensor:
    """(N, I) distinct words; where the student has fewer, -1."""
    generator = torch.Generator().manual_seed(7)
    found_NI = torch.stack([torch.randperm(max(v, i), generator=generator)[:i] for _ in range(n)])
    return torch.where(found_NI < v, found_NI, -1)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_are_their_definitions(shape, dtype):
    n, v, _, k = shape
    logits_NV, _, head_NK, _ = rows(*shape)
    logits_NV, ids_NI = logits_NV.to(dtype), ids(n, max(1, k // 2), v)
    rtol, atol = TOLERANCES[dtype]
    slack = 1 if dtype == torch.float64 else 50  # logarithms of a complement near 0
    tolerance = {"rtol": rtol * slack, "atol": atol * slack}
    found_N = kl_loss(logits_NV, head_NK, ids_NI, reduction="none")
    torch.testing.assert_close(found_N.double(), mapped(logits_NV, head_NK, ids_NI), **tolerance)
    for beta in (0.1, 0.5, 0.9):
        found_N = jsd_loss(logits_NV, head_NK, ids_NI, reduction="none", beta=beta)
        assert found_N.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found_N.double(), jsd(logits_NV, head_NK, ids_NI, beta), **tolerance)
        assert (found_N > -1e-6).all()


@pytest.mark.parametrize(("v", "k"), [(12, 4), (9, 9)])
def test_gradcheck(v, k):
    logits_NV, _, head_NK, _ = rows(3, v, 20, k)
    ids_NI = ids(3, k, v)
    weight_N = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    for beta in (0.2, 0.5):
        assert torch.autograd.gradcheck(
            lambda logits, beta=beta: jsd_loss(logits, head_NK, ids_NI, weight_N, beta=beta), logits_NV.requires_grad_()
        )
    assert torch.autograd.gradcheck(lambda logits: kl_loss(logits, head_NK, ids_NI, weight_N), logits_NV)


def test_with_all_ids_they_are_the_divergences_of_whole_vocabularies_and_trls():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "experimental", and which versions of vLLM it likes
        from trl.experimental.gold.gold_trainer import GOLDTrainer
    logits_NV, probs_NU, _, _ = rows(6, 40, 40, 40)
    order_NU = torch.stack([torch.randperm(40) for _ in range(6)])
    scattered_NV = torch.zeros_like(probs_NU).scatter(1, order_NU, probs_NU)
    for beta, found in (
        (0.0, kl_loss(logits_NV, probs_NU, order_NU)),
        (0.3, jsd_loss(logits_NV, probs_NU, order_NU, beta=0.3)),
        (0.5, jsd_loss(logits_NV, probs_NU, order_NU)),
    ):
        theirs = GOLDTrainer.generalized_jsd_loss(logits_NV, scattered_NV.log(), beta=beta, reduction="batchmean")
        # The clamped bucket, at most 1e-6 of mass.
        torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("i", [1, 4, 16])
def test_fewer_ids_never_find_more(i):
    logits_NV, probs_NU, _, _ = rows(20, 60, 60, 60)
    ids_NU = torch.stack([torch.randperm(60) for _ in range(20)])
    for loss in (kl_loss, jsd_loss):
        whole_N = loss(logits_NV, probs_NU, ids_NU, reduction="none")
        part_N = loss(logits_NV, probs_NU[:, :i], ids_NU[:, :i], reduction="none")
        assert (part_N <= whole_N + 1e-5).all()


def test_equal_distributions_and_words_ruled_out():
    logits_NV, _, _, _ = rows(4, 50, 50, 50)
    q_NV, order_NV = logits_NV.softmax(1).sort(dim=1, descending=True)
    for loss in (kl_loss, jsd_loss):
        zero_N = loss(logits_NV, q_NV[:, :9], order_NV[:, :9], reduction="none")
        torch.testing.assert_close(zero_N, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    logits_NV = torch.tensor([[0.0, 1.0, float("-inf"), 0.5]], requires_grad=True)
    loss = jsd_loss(logits_NV, torch.tensor([[0.6, 0.3, 0.1]]), torch.tensor([[0, 2, -1]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits_NV.grad).all()
    empty = jsd_loss(torch.zeros(0, 5), torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    assert empty == 0
    with pytest.raises(ConfigError, match="beta"):
        jsd_loss(torch.zeros(1, 5), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int64), beta=1.0)
