"""Chunk likelihoods: the binarised divergence, in log space and at its ends, and the chunks of a batch."""

import numpy as np
import pytest
import torch
from reference_losses import likelihood
from training import config

from distill import DistillationCollator, chunk_logprobs, likelihood_loss
from distill.alignment import align_groups
from storage_specs import open_cache
from storage_specs.errors import ConfigError

SIZES = [(1, 1), (3, 1), (1, 4), (2, 5)]  # tokens of student and teacher in each chunk


def chunks(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda count: (-4 * torch.rand(count, generator=generator, dtype=torch.float64)).tolist()  # noqa: E731
    student = torch.tensor([value for own, _ in SIZES for value in draw(own)], dtype=torch.float64)
    owner = torch.tensor([g for g, (own, _) in enumerate(SIZES) for _ in range(own)])
    return student, owner, [draw(theirs) for _, theirs in SIZES]


def ours(student_M, owner_M, teacher, temperature, dtype=torch.float64):
    gold_G = torch.tensor([sum(theirs) for theirs in teacher], dtype=dtype)
    own_G = chunk_logprobs(student_M.to(dtype), owner_M, len(teacher))
    return likelihood_loss(own_G, gold_G, reduction="none", temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 3.0, 100.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=str)
def test_it_is_its_definition(temperature, dtype, tolerance):
    student_M, owner_M, teacher = chunks()
    student = [student_M[owner_M == g] for g in range(len(teacher))]
    expected_G = likelihood(student, teacher, temperature, lowered=1e-6)
    found_G = ours(student_M, owner_M, teacher, temperature, dtype)
    assert found_G.dtype == dtype
    torch.testing.assert_close(found_G.double(), expected_G, rtol=tolerance, atol=1e-3 * tolerance)
    # What the lowering by 1e-6 does: nothing that matters.
    torch.testing.assert_close(found_G.double(), likelihood(student, teacher, temperature), rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_gradcheck(temperature):
    student_M, owner_M, teacher = chunks(1)
    student_M = student_M * 0.5 - 0.1
    assert torch.autograd.gradcheck(lambda x: ours(x, owner_M, teacher, temperature), student_M.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_certain_and_hopeless_chunks_stay_finite(dtype):
    student_G = torch.tensor([0.0, 0.0, -1e-9, -80.0, -300.0, -2000.0], dtype=dtype, requires_grad=True)
    teacher_G = torch.tensor([0.0, -5.0, -1e-9, -0.1, -300.0, -0.0], dtype=dtype)
    for temperature in (1.0, 100.0):
        loss_G = likelihood_loss(student_G, teacher_G, reduction="none", temperature=temperature)
        (gradient_G,) = torch.autograd.grad(loss_G.sum(), student_G)
        assert torch.isfinite(loss_G).all()
        assert torch.isfinite(gradient_G).all()
        assert (loss_G >= -1e-6).all()
        assert gradient_G[[0, 2]].abs().max() < 1e-3  # agreement
        assert gradient_G[1] > 0  # too sure: lower it
        assert gradient_G[3] < 0  # too unsure: raise it


def test_equal_likelihoods_cost_nothing_and_the_loss_falls_towards_the_teacher():
    teacher_G = torch.tensor([-1.0, -7.0, -0.2])
    torch.testing.assert_close(likelihood_loss(teacher_G, teacher_G), torch.tensor(0.0), atol=1e-7, rtol=0)
    further = [likelihood_loss(teacher_G * factor, teacher_G).item() for factor in (1.1, 2.0, 4.0)]
    assert further == sorted(further)
    assert likelihood_loss(teacher_G[:0], teacher_G[:0]) == 0
    with pytest.raises(ConfigError, match="temperature"):
        likelihood_loss(teacher_G, teacher_G, temperature=0.0)


@pytest.mark.parametrize("max_length", [24, 200])
def test_a_batch_holds_the_chunks_between_shared_boundaries(cache_path, smollm2_tokenizer, tmp_path, max_length):
    cache = open_cache(cache_path)
    args = config(tmp_path, max_length=max_length, loss="likelihood:1")
    collator = DistillationCollator(smollm2_tokenizer, args, cache)
    documents = [cache[3], cache[11], cache[21]]
    batch = collator(documents)
    length, g, b = batch["input_ids"].shape[1], 0, 0
    sizes = set()
    for number, document in enumerate(documents):
        for window in collator.inputs.windows([document])[0]:
            groups = align_groups(document, window)
            for own_first, own_last, first, last in zip(*vars(groups).values(), strict=True):
                members = batch["chunk_index_M"][batch["chunk_M"] == g].tolist()
                assert members == [b * length + i for i in window.logits_index[own_first : own_last + 1].tolist()]
                gold = document.gold_logprob[first : last + 1].astype(np.float64).sum()
                assert batch["chunk_gold_G"][g].item() == pytest.approx(gold, rel=1e-6)
                assert batch["chunk_sample_G"][g] == number
                sizes.add((own_last - own_first + 1, last - first + 1))
                g += 1
            b += 1
    assert g == len(batch["chunk_gold_G"]) > 0
    assert len(sizes) > 2
    assert set(batch["chunk_index_M"].tolist()) <= set(batch["label_index_R"].tolist())
