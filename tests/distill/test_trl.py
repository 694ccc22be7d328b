"""The installed trl's own ULDLoss, on logits of the real pair and on a byte-level pair, against ours with K = V."""

import warnings
from types import SimpleNamespace

import pytest
import tokenizer_assets
import torch
from real_pair import RealPair, teacher_rows
from reference_losses import merged_rows, sorted_distance

from distill.alignment import align
from distill.hybrid import hybrid_loss
from distill.losses import mapped_loss, uld_loss
from storage_specs import byte_spans, completion_document

IGNORED = -100


@pytest.fixture(scope="module")
def trl_loss():
    """ULDLoss(extended, strategy), its distillation part alone."""
    with warnings.catch_warnings():
        # "experimental", and which versions of vLLM it likes.
        warnings.simplefilter("ignore")
        from trl.experimental.gold.gold_trainer import ULDLoss

    def make(extended, strategy, **hybrid):
        config = SimpleNamespace(
            uld_crossentropy_weight=0.0,
            uld_distillation_weight=1.0,
            uld_student_temperature=1.0,
            uld_teacher_temperature=1.0,
            uld_skip_student_eos=False,
            uld_skip_teacher_eos=False,
            use_extended_uld=extended,
            uld_token_merge_strategy=strategy,
            uld_use_hybrid_loss=bool(hybrid),
            uld_hybrid_matched_weight=1.0,
            uld_hybrid_unmatched_weight=1.0,
            beta=0.0,  # the forward KL
        )
        return ULDLoss(config, **hybrid)

    return make


@pytest.fixture(scope="module")
def scored(wiki_texts):
    """(document, teacher window, teacher logits, student window, student logits) of a prompt and its completion."""
    pair, text = RealPair(), wiki_texts[3]
    document = completion_document(text[:60], text[60:420])
    return document, *pair.scored("teacher", document, 128), *pair.scored("student", document, 128)


def ours(student_NV, teacher_NU, **options):
    probs_NU = teacher_NU.softmax(1).sort(dim=1, descending=True).values
    return uld_loss(student_NV, probs_NU, torch.zeros(len(probs_NU)), **options)


def labels_of(window):
    """(1, L) TRL's labels: the completion's tokens, without the end token."""
    labels_1L = torch.full((1, len(window.ids)), IGNORED)
    kept = ~window.is_end
    labels_1L[0, window.logits_index[kept] + 1] = torch.from_numpy(window.target_ids[kept])
    return labels_1L


def trl_value(loss, student, student_LV, teacher, teacher_LU):
    student_ids, teacher_ids = (torch.from_numpy(window.ids)[None] for window in (student, teacher))
    return loss(student_LV[None], teacher_LU[None], labels_of(student), labels_of(teacher), student_ids, teacher_ids)


def test_positional_on_the_real_pair(trl_loss, scored):
    document, teacher, teacher_LU, student, student_LV = scored
    leaf_LV = student_LV.clone().requires_grad_()
    theirs = trl_value(trl_loss(False, "bayesian"), student, leaf_LV, teacher, teacher_LU)
    (their_LV,) = torch.autograd.grad(theirs, leaf_LV)
    student_N, teacher_N = align(teacher_rows(document, teacher), student, "positional")
    inside = ~student.is_end[student_N - student.logits_index[0]] & ~teacher.is_end[teacher_N]
    student_N, teacher_N = student_N[inside], teacher_N[inside]
    loss = ours(leaf_LV[torch.from_numpy(student_N)], teacher_LU[teacher.logits_index[teacher_N]])
    (our_LV,) = torch.autograd.grad(loss, leaf_LV)
    assert len(student_N) > 15
    assert abs(theirs.item() - loss.item()) < 1e-5
    # A difference below the rounding of float32 may have either sign.
    assert (our_LV - their_LV).norm() / their_LV.norm() < 1e-3
    # `observed`, the default there: ours on logits that have already seen the token they should predict.
    observed = trl_value(trl_loss(False, "observed"), student, student_LV, teacher, teacher_LU)
    late = ours(student_LV[student_N + 1], teacher_LU[teacher.logits_index[teacher_N] + 1])
    assert abs(observed.item() - late.item()) < 1e-5
    assert abs(observed.item() - loss.item()) > 1e-3


def test_merge_on_our_groups_of_the_real_pair(trl_loss, scored):
    """TRL refuses this pair's bytes; its products over the groups between our boundaries, and our rows in them."""
    _, teacher, teacher_LU, student, student_LV = scored
    sides = []
    kept = [~window.is_end for window in (student, teacher)]
    ends = [window.byte_end[keep].tolist() for window, keep in zip((student, teacher), kept, strict=True)]
    groups = groups_between(*ends)
    for window, logits_LV, keep, of_side in zip(
        (student, teacher), (student_LV, teacher_LU), kept, groups, strict=True
    ):
        probs_NV, ids_N = logits_LV[window.logits_index[keep]].softmax(1), window.target_ids[keep].tolist()
        theirs_GV = trl_loss(True, "bayesian")._merge_probabilities_with_alignment_groups(probs_NV, of_side, ids_N)
        torch.testing.assert_close(theirs_GV, merged_rows(probs_NV, ids_N, of_side, "bayesian"))
        sides.append((logits_LV[window.logits_index[keep]], theirs_GV))
    (student_NV, student_GV), (teacher_NU, teacher_GU) = sides
    distance_G = sorted_distance(student_GV, teacher_GU)
    single = [g for g, pair in enumerate(zip(*groups, strict=True)) if len(pair[0]) == len(pair[1]) == 1]
    assert 5 < len(single) < len(distance_G)
    ours_G = ours(
        student_NV[[groups[0][g][0] for g in single]], teacher_NU[[groups[1][g][0] for g in single]], reduction="none"
    )
    torch.testing.assert_close(ours_G, distance_G[single], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("strategy", "shift"), [("bayesian", -1), ("observed", 0)])
def test_extended_on_a_byte_level_pair(trl_loss, wiki_texts, strategy, shift):
    """Real tokens of Qwen3 and GPT-2 with made-up logits, TRL's byte walk and ours."""
    from trl.experimental.utils import encode_with_byte_offsets

    text, generator = wiki_texts[5][:160], torch.Generator().manual_seed(0)
    sides = []
    for name, size in (("qwen3", 400), ("gpt2", 300)):
        tokenizer = tokenizer_assets.load(name)
        ((ids, offsets),) = encode_with_byte_offsets(tokenizer, [text])
        assert offsets == [tuple(span) for span in byte_spans(tokenizer, [text])[0].tolist()]
        # A prompt of two tokens in front, and an id space that fits the made-up logits.
        ids_1L = torch.tensor([[0, 0, *(i % size for i in ids)]])
        offsets_1L2 = torch.tensor([[(0, 0), (0, 0), *offsets]])
        labels_1L = ids_1L.clone()
        labels_1L[0, :2] = IGNORED
        logits_1LV = 3 * torch.randn(1, ids_1L.shape[1], size, generator=generator)
        sides.append((logits_1LV, labels_1L, ids_1L, offsets_1L2))
    student, teacher = sides
    arguments = [side[field] for field in range(4) for side in (student, teacher)]
    theirs = trl_loss(True, strategy)(*arguments)
    groups = groups_between(*([end for _, end in side[3][0, 2:].tolist()] for side in sides))
    merged = []
    for (logits_1LV, _, ids_1L, _), of_side in zip(sides, groups, strict=True):
        rows_NV = logits_1LV[0, 2 + shift : logits_1LV.shape[1] + shift].softmax(1)
        merged.append(merged_rows(rows_NV, ids_1L[0, 2:].tolist(), of_side, strategy))
    assert abs(theirs.item() - sorted_distance(*merged).mean().item()) < 1e-5
    assert max(len(group) for group in groups[1]) > 1
    single = [g for g, pair in enumerate(zip(*groups, strict=True)) if len(pair[0]) == len(pair[1]) == 1]
    ours_G = ours(
        student[0][0, [groups[0][g][0] + 2 + shift for g in single]],
        teacher[0][0, [groups[1][g][0] + 2 + shift for g in single]],
        reduction="none",
    )
    torch.testing.assert_close(ours_G, sorted_distance(*merged)[single], atol=1e-5, rtol=0)


def test_hybrid_is_trls_where_the_cache_holds_everything(trl_loss):
    """Whole rows with all ids: the same rests, the same sorted distance; their matched part is ours without its bucket
    for the rest."""
    teacher_words = ["the", "of", "a", "x1", "x2", "x3", "in", "x4", "is"]
    student_words = ["y1", "is", "the", "y2", "in", "y3", "y4", "of", "y5", "y6", "y7"]
    vocabularies = [
        SimpleNamespace(get_vocab=lambda words=words: {word: n for n, word in enumerate(words)})
        for words in (student_words, teacher_words)
    ]
    loss = trl_loss(False, "bayesian", student_tokenizer=vocabularies[0], teacher_tokenizer=vocabularies[1])
    generator = torch.Generator().manual_seed(3)
    teacher_NU = (2 * torch.randn(12, len(teacher_words), generator=generator, dtype=torch.float64)).softmax(1)
    logits_NV = 2 * torch.randn(12, len(student_words), generator=generator, dtype=torch.float64)
    logits_NV.requires_grad_()
    theirs = loss._compute_hybrid_uld_loss(logits_NV.softmax(1), teacher_NU)
    map_U = torch.tensor([student_words.index(w) if w in student_words else -1 for w in teacher_words])
    probs_NU, ids_NU = teacher_NU.sort(dim=1, descending=True)
    words_NU = map_U[ids_NU]
    ours_, certificate = hybrid_loss(logits_NV, probs_NU, torch.zeros(12), words_NU)
    torch.testing.assert_close(certificate.lower_N, certificate.upper_N)
    rest_N = (probs_NU * (words_NU < 0)).sum(1)
    left_N = 1 - logits_NV.softmax(1)[:, map_U[map_U >= 0]].sum(1)
    bucket = (rest_N * (rest_N / left_N).log()).mean()
    torch.testing.assert_close(ours_ - bucket, theirs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        ours_ - mapped_loss(logits_NV, probs_NU, words_NU), loss.last_unmatched_loss, atol=1e-6, rtol=1e-6
    )
    gradients = [torch.autograd.grad(value, logits_NV)[0] for value in (ours_ - bucket, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def groups_between(student_ends, teacher_ends):
    """Positions of both sides between the bytes at which both end a token."""
    shared = sorted(set(student_ends) & set(teacher_ends))
    return [
        [
            [i for i, end in enumerate(ends) if low < end <= high]
            for low, high in zip([-1, *shared], shared, strict=False)
        ]
        for ends in (student_ends, teacher_ends)
    ]
