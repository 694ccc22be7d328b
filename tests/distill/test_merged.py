"""ULD over merged groups: its float64 definition, gradients, certificate, and the batch and trainer that feed it."""

import numpy as np
import pytest
import torch
from reference_losses import full_uld, merged_uld
from training import config, trainer

from distill import DistillationCollator
from distill.alignment import align_groups
from distill.losses import uld_loss
from distill.merged import log_scale_of, merged_uld_loss
from distill.numerals import numeral_rows
from storage_specs import open_cache, text_document
from storage_specs.errors import ConfigError

# student tokens and teacher tokens of each group, student vocabulary, K
CASES = [([(1, 1), (2, 1), (1, 3), (3, 2)], 41, 8), ([(2, 2), (5, 1)], 7, 16), ([(1, 1)], 64, 1), ([(2, 3)], 700, 4)]


def groups_of(sizes, v, k, seed=0):
    """Per group: the student's logits and earlier ids, and the teacher's last head, tail and earlier golds."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = [], []
    for own, theirs in sizes:
        logits = 2 * torch.randn(own, v, generator=generator, dtype=torch.float64)
        student.append((logits, torch.randint(0, v, (own - 1,), generator=generator).tolist()))
        probs = (3 * torch.randn(k + 5, generator=generator, dtype=torch.float64)).softmax(0).sort(descending=True)[0]
        golds = (-5 * torch.rand(theirs - 1, generator=generator, dtype=torch.float64)).tolist()
        teacher.append((probs[:k], float(probs[k:].sum()), golds))
    return student, teacher


def ours(student, teacher):
    last_NV = torch.stack([logits[-1] for logits, _ in student])
    golds = [logits.log_softmax(1)[n, token] for logits, ids in student for n, token in enumerate(ids)]
    group_M = torch.tensor([g for g, (_, ids) in enumerate(student) for _ in ids], dtype=torch.int64)
    gold_M = torch.stack(golds) if golds else last_NV.new_zeros(0)
    scale_N = torch.tensor([np.exp(np.sum(golds)) for _, _, golds in teacher], dtype=torch.float64)
    probs_NK = torch.stack([probs for probs, _, _ in teacher]) * scale_N[:, None]
    tail_N = torch.tensor([tail for _, tail, _ in teacher], dtype=torch.float64) * scale_N
    log_scale_N = log_scale_of(gold_M, group_M, len(student))
    return merged_uld_loss(last_NV, log_scale_N, probs_NK, tail_N, reduction="none")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_merged_uld_and_its_gradient_are_the_definition(case):
    student, teacher = groups_of(*case)
    gradients = []
    for compute in (lambda s, t: ours(s, t)[0], merged_uld):
        leaves = [(logits.clone().requires_grad_(), ids) for logits, ids in student]
        loss_N = compute(leaves, teacher)
        loss_N.sum().backward()
        gradients.append((loss_N.detach(), [logits.grad for logits, _ in leaves]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


def test_groups_of_one_token_are_plain_uld():
    student, teacher = groups_of([(1, 1)] * 5, 50, 8)
    logits_NV = torch.stack([logits[-1] for logits, _ in student])
    head_NK = torch.stack([probs for probs, _, _ in teacher])
    tail_N = torch.tensor([tail for _, tail, _ in teacher], dtype=torch.float64)
    torch.testing.assert_close(ours(student, teacher)[0], uld_loss(logits_NV, head_NK, tail_N, reduction="none"))


@pytest.mark.parametrize("k", [1, 8, 60])
def test_certificate_holds_for_the_scaled_rows(k):
    generator = torch.Generator().manual_seed(k)
    logits_NV = 3 * torch.randn(40, 50, generator=generator, dtype=torch.float64)
    probs_NU = (3 * torch.randn(40, 90, generator=generator, dtype=torch.float64)).softmax(1).sort(1, True).values
    p_N, q_N = torch.rand(2, 40, generator=generator, dtype=torch.float64)
    # The whole sum over scaled rows: scale q by giving the definition its logarithm.
    q_NV = (logits_NV.softmax(1) * q_N[:, None]).sort(1, True).values
    pad = torch.zeros(40, 40, dtype=torch.float64)
    full_N = (p_N[:, None] * probs_NU - torch.cat([q_NV, pad], 1)).abs().sum(1)
    scaled_NK = probs_NU[:, :k] * p_N[:, None]
    tail_N = probs_NU[:, k:].sum(1) * p_N
    _, certificate = merged_uld_loss(logits_NV, q_N.log(), scaled_NK, tail_N)
    assert (certificate.lower_N <= full_N + 1e-12).all()
    assert (full_N <= certificate.upper_N + 1e-12).all()
    assert (certificate.upper_N <= p_N + q_N + 1e-12).all()
    one = torch.ones(40, dtype=torch.float64)
    plain, _ = merged_uld_loss(logits_NV, one.log(), probs_NU, 0 * one, reduction="none")
    torch.testing.assert_close(plain, full_uld(logits_NV, probs_NU))


def test_no_groups_have_loss_zero_and_factors_have_a_floor():
    loss, _ = merged_uld_loss(torch.zeros(0, 5), torch.zeros(0), torch.zeros(0, 2), torch.zeros(0))
    assert loss == 0
    log_scale_N = log_scale_of(torch.tensor([-100.0, -1.0]), torch.tensor([1, 1]), 2)
    torch.testing.assert_close(log_scale_N, torch.tensor([0.0, np.log(1e-8) - 1], dtype=torch.float32))


@pytest.mark.parametrize("max_length", [24, 200])
def test_a_batch_holds_groups(cache_path, smollm2_tokenizer, tmp_path, max_length):
    cache = open_cache(cache_path)
    collator = DistillationCollator(smollm2_tokenizer, config(tmp_path, max_length=max_length, align="merge"), cache)
    documents = [cache[3], cache[11], cache[21]]
    batch = collator(documents)
    length, n, b = batch["input_ids"].shape[1], 0, 0
    earlier = list(zip(batch["earlier_index_M"].tolist(), batch["earlier_group_M"].tolist(), strict=True))
    assert earlier
    for document in documents:
        for window in collator.inputs.windows([document])[0]:
            groups = align_groups(document, window)
            for own_first, own_last, first, last in zip(*vars(groups).values(), strict=True):
                scale = np.exp(document.gold_logprob[first:last].astype(np.float64).sum())
                np.testing.assert_allclose(batch["teacher_probs_NK"][n], document.probs[last] * scale, rtol=1e-5)
                np.testing.assert_allclose(batch["teacher_tail_N"][n], document.tail_mass[last] * scale, rtol=1e-5)
                assert batch["student_index_N"][n] == b * length + window.logits_index[own_last]
                expected = [(b * length + i, n) for i in window.logits_index[own_first:own_last].tolist()]
                assert [pair for pair in earlier if pair[1] == n] == expected
                n += 1
            b += 1
    assert n == len(batch["student_index_N"])


def test_training_with_merge_is_its_definition_and_learns(cache_path, student_path, tmp_path):
    one = trainer(cache_path, student_path, tmp_path, align="merge", max_steps=6)
    batch = one.data_collator([one.train_dataset[n] for n in range(3)])
    logits_LV = one.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
    ids_L = batch["input_ids"].flatten()
    student = []
    for n, last in enumerate(batch["student_index_N"].tolist()):
        before = batch["earlier_index_M"][batch["earlier_group_M"] == n].tolist()
        student.append((logits_LV[[*before, last]].detach(), [int(ids_L[i + 1]) for i in before]))
    teacher = [(p, float(t), []) for p, t in zip(batch["teacher_probs_NK"], batch["teacher_tail_N"], strict=True)]
    expected = merged_uld(student, teacher).mean()
    found = one.compute_loss(one.model, batch, return_outputs=True)[1]["terms"][1]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    one.train()
    losses = [line["uld"] for line in one.state.log_history if "uld" in line]
    assert losses[-1] < losses[0]


def test_merged_rows_have_no_words(tmp_path):
    with pytest.raises(ConfigError, match="--align boundary"):
        config(tmp_path, align="merge", loss="uld:1,mapped:1")


@pytest.mark.parametrize("align", ["boundary", "merge"])
def test_numerals_are_left_out(cache_path, smollm2_tokenizer, tmp_path, align):
    cache = open_cache(cache_path)
    documents = [cache[number] for number in range(len(cache))]
    assert any(numeral_rows(document).any() for document in documents)
    collators = [
        DistillationCollator(
            smollm2_tokenizer, config(tmp_path, align=align, max_length=200, skip_numerals=skip), cache
        )
        for skip in (False, True)
    ]
    dropped = 0
    for document in documents:
        every, kept = (collator([document]) for collator in collators)
        assert set(kept["student_index_N"].tolist()) <= set(every["student_index_N"].tolist())
        dropped += len(every["student_index_N"]) - len(kept["student_index_N"])
        if not numeral_rows(document).any():
            assert torch.equal(kept["student_index_N"], every["student_index_N"])
    assert dropped > 0


@pytest.mark.parametrize("text", ["in 1984, 2½ or x9", "٣ apples é7\u0967", "no digits ²①"])
def test_numeral_rows_are_those_with_a_decimal_digit(text, smollm2_tokenizer):
    from cache_making import random_rows_for

    from storage_specs import render

    document = text_document(text)
    cached = random_rows_for(render(smollm2_tokenizer, document), document, 4, 0, 50, 0)
    position, digits = 0, set()
    for character in text:
        size = len(character.encode())
        digits |= set(range(position, position + size)) if character.isdecimal() else set()
        position += size
    spans = zip(cached.byte_start.tolist(), cached.byte_end.tolist(), strict=True)
    assert numeral_rows(cached).tolist() == [bool(digits & set(range(start, end))) for start, end in spans]
