"""ULD and mapped against their float64 definitions, and the properties that both promise."""

import pytest
import torch
from reference_losses import cached_uld, full_uld, mapped

from distill.losses import mapped_loss, uld_loss
from storage_specs.errors import ConfigError

# (rows, student vocabulary, teacher vocabulary, K): smaller and larger students, K = 1, K = all, odd shapes.
SHAPES = [(5, 1000, 1700, 64), (3, 50, 1000, 64), (4, 997, 64, 64), (7, 33, 33, 33), (1, 64, 300, 1), (2, 13, 200, 200)]
# dtype of the logits -> (rtol, atol) against float64 of the same rounded logits
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 2e-6),
    torch.bfloat16: (1e-5, 2e-6),
    torch.float16: (1e-5, 2e-6),
}


def rows(
    n: int, v: int, u: int, k: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits (N, V), teacher's whole distribution (N, U) descending, its head (N, K), its tail (N,); all float64."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = 3 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    probs_NU = (4 * torch.randn(n, u, generator=generator, dtype=torch.float64)).softmax(1)
    probs_NU = probs_NU.sort(dim=1, descending=True).values
    return logits_NV, probs_NU, probs_NU[:, :k], probs_NU[:, k:].sum(1)


def words(n: int, i: int, v: int, seed: int = 1) -> torch.Tensor:
    """(N, I) student words with repetitions and a third without a word."""
    generator = torch.Generator().manual_seed(seed)
    words_NI = torch.randint(0, max(2, min(v, i)), (n, i), generator=generator)
    return torch.where(torch.rand(n, i, generator=generator) < 0.33, -1, words_NI)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_uld_is_its_definition(shape, dtype):
    logits_NV, _, head_NK, tail_N = rows(*shape)
    logits_NV = logits_NV.to(dtype)
    loss_N = uld_loss(logits_NV, head_NK, tail_N, reduction="none")
    assert loss_N.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(loss_N.double(), cached_uld(logits_NV, head_NK, tail_N), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("v", "u"), [(1000, 300), (300, 1000), (128, 128)])
def test_uld_with_the_teachers_whole_vocabulary_is_full_uld(v, u):
    logits_NV, probs_NU, head_NK, tail_N = rows(6, v, u, u)
    torch.testing.assert_close(uld_loss(logits_NV, head_NK, tail_N, reduction="none"), full_uld(logits_NV, probs_NU))


@pytest.mark.parametrize("k", [1, 4, 16, 64, 300])
def test_certificate_holds_and_tightens(k):
    logits_NV, probs_NU, head_NK, tail_N = rows(50, 400, 300, k)
    q_NV = logits_NV.softmax(1).sort(dim=1, descending=True).values
    outside_N = q_NV[:, k:].sum(1)
    head_N = (head_NK - q_NV[:, :k]).abs().sum(1)
    full_N = full_uld(logits_NV, probs_NU)
    loss_N = uld_loss(logits_NV, head_NK, tail_N, reduction="none")
    torch.testing.assert_close(loss_N, head_N + (tail_N - outside_N).abs())
    assert (loss_N <= full_N + 1e-12).all()
    assert (full_N <= head_N + tail_N + outside_N + 1e-12).all()
    assert (full_N - loss_N <= 2 * torch.minimum(tail_N, outside_N) + 1e-12).all()
    assert (loss_N <= 2 + 1e-12).all()


def test_uld_is_zero_for_equal_distributions_and_blind_to_the_order_of_words():
    logits_NV, _, _, _ = rows(4, 200, 200, 200)
    q_NV = logits_NV.softmax(1).sort(dim=1, descending=True).values
    loss_N = uld_loss(logits_NV, q_NV[:, :64], q_NV[:, 64:].sum(1), reduction="none")
    torch.testing.assert_close(loss_N, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    _, _, head_NK, tail_N = rows(4, 200, 900, 64, seed=3)
    shuffled_NV = logits_NV[:, torch.randperm(200)]
    torch.testing.assert_close(uld_loss(shuffled_NV, head_NK, tail_N), uld_loss(logits_NV, head_NK, tail_N))


@pytest.mark.parametrize(("v", "k"), [(12, 4), (5, 8), (9, 9)])
def test_gradcheck(v, k):
    logits_NV, _, head_NK, tail_N = rows(3, v, 20, k)
    logits_NV.requires_grad_()
    weight_N = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    words_NI = words(3, k, v)
    assert torch.autograd.gradcheck(lambda logits: uld_loss(logits, head_NK, tail_N, weight_N), logits_NV)
    assert torch.autograd.gradcheck(lambda logits: mapped_loss(logits, head_NK, words_NI, weight_N), logits_NV)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mapped_is_its_definition(shape, dtype):
    n, v, _, k = shape
    logits_NV, _, head_NK, _ = rows(*shape)
    logits_NV = logits_NV.to(dtype)
    words_NI = words(n, max(1, k // 2), v)
    loss_N = mapped_loss(logits_NV, head_NK, words_NI, reduction="none")
    rtol, atol = TOLERANCES[dtype]
    # Logarithms of a complement 1 - sum q near 0 amplify float32's rounding.
    slack = 1 if dtype == torch.float64 else 50
    torch.testing.assert_close(
        loss_N.double(), mapped(logits_NV, head_NK, words_NI), rtol=rtol * slack, atol=atol * slack
    )


def test_mapped_edges():
    logits_NV, _, head_NK, _ = rows(3, 40, 90, 8)
    nothing_NI = torch.full((3, 8), -1)
    torch.testing.assert_close(
        mapped_loss(logits_NV, head_NK, nothing_NI, reduction="none"), torch.zeros(3, dtype=torch.float64)
    )
    # Every id maps to one word: the divergence of a two-sided coin.
    one_NI = torch.full((3, 8), 7)
    mass_N, q_N = head_NK.sum(1), logits_NV.softmax(1)[:, 7]
    coin_N = mass_N * (mass_N / q_N).log() + (1 - mass_N) * ((1 - mass_N) / (1 - q_N)).log()
    torch.testing.assert_close(mapped_loss(logits_NV, head_NK, one_NI, reduction="none"), coin_N)
    # A student that is sure of the teacher's words: the complement is clamped, the loss large but finite.
    sure_NV = torch.full((1, 40), -1e4).index_fill(1, torch.tensor([3]), 1e4).requires_grad_()
    loss = mapped_loss(sure_NV, torch.tensor([[0.5, 0.1]]), torch.tensor([[3, 4]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(sure_NV.grad).all()


def test_words_that_the_student_rules_out_cost_nothing_where_the_teacher_gives_them_nothing():
    logits_NV = torch.tensor([[0.0, 1.0, float("-inf")]], requires_grad=True)
    loss = mapped_loss(logits_NV, torch.tensor([[0.6, 0.4, 0.0]]), torch.tensor([[0, 1, 2]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits_NV.grad).all()
    assert torch.isfinite(uld_loss(logits_NV, torch.tensor([[0.6, 0.4, 0.0]]), torch.tensor([0.0])))


@pytest.mark.parametrize("loss", ["uld", "mapped"])
def test_reductions_and_weights(loss):
    logits_NV, _, head_NK, tail_N = rows(4, 60, 90, 8)
    second = tail_N if loss == "uld" else words(4, 8, 60)
    function = uld_loss if loss == "uld" else mapped_loss
    weight_N = torch.tensor([1.0, 0.0, 3.0, 0.5], dtype=torch.float64)
    plain_N = function(logits_NV, head_NK, second, reduction="none")
    torch.testing.assert_close(function(logits_NV, head_NK, second), plain_N.mean())
    torch.testing.assert_close(function(logits_NV, head_NK, second, weight_N, "none"), weight_N * plain_N)
    torch.testing.assert_close(function(logits_NV, head_NK, second, weight_N, "sum"), (weight_N * plain_N).sum())
    torch.testing.assert_close(
        function(logits_NV, head_NK, second, weight_N), (weight_N * plain_N).sum() / weight_N.sum()
    )
    with pytest.raises(ConfigError, match="average"):
        function(logits_NV, head_NK, second, reduction="average")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction):
    logits_NV = torch.zeros(0, 30, requires_grad=True)
    losses = [
        uld_loss(logits_NV, torch.zeros(0, 8), torch.zeros(0), reduction=reduction),
        mapped_loss(logits_NV, torch.zeros(0, 8), torch.zeros(0, 8, dtype=torch.int64), reduction=reduction),
    ]
    for loss in losses:
        assert loss.sum().item() == 0
        loss.sum().backward()
    assert logits_NV.grad.shape == (0, 30)


def test_gradient_follows_grad_output_and_strides():
    logits_NV, _, head_NK, tail_N = rows(4, 60, 90, 8)
    strided_NV = logits_NV.t().contiguous().t().requires_grad_()
    plain_NV = logits_NV.clone().requires_grad_()
    (3 * uld_loss(strided_NV, head_NK, tail_N)).backward()
    uld_loss(plain_NV, head_NK, tail_N).backward()
    torch.testing.assert_close(strided_NV.grad, 3 * plain_NV.grad)
