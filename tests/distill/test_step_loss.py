"""Every mixture is its definition: naive float64 losses over a batch's columns, however the step is cut up."""

import math
import sys
from pathlib import Path

import pytest
import torch
from cache_making import WithSketch
from reference_losses import cached_uld, hybrid_rest, jsd, likelihood, mapped
from training import config, load_tokenizer, trainer, weights

from distill import CachedDistillationTrainer, CachedDocuments, DistillationCollator, uld_loss
from storage_specs import open_cache
from storage_specs.errors import ConfigError, TokenizerError

# loss, align; kl and jsd from the cache whose teacher has the student's tokenizer
CASES = [
    ("ce:0.5,uld:1.5,mapped:0.7,hybrid:0.3,likelihood:2", "boundary"),
    ("ce:1,uld:1,mapped:1,likelihood:1", "positional"),
    ("uld:2,likelihood:0.5", "merge"),
    ("likelihood:3", "boundary"),
    ("ce:1,uld:0.5,kl:1,jsd:0.25,likelihood:1", "boundary"),
]


def cache_of(loss, cache_path, chat_cache_path):
    return chat_cache_path if "kl" in loss or "jsd" in loss else cache_path


def naive_terms(batch, logits_PV):
    """{name: (values, samples)} of every loss, from the definitions."""
    nats_P = torch.full((len(logits_PV),), math.nan, dtype=torch.float64)
    index_R, ids_R = batch["label_index_R"], batch["label_ids_R"]
    nats_P[index_R] = -logits_PV[index_R].log_softmax(1)[torch.arange(len(ids_R)), ids_R]
    at_NV, probs_NK, tail_N = logits_PV[batch["student_index_N"]], batch["teacher_probs_NK"], batch["teacher_tail_N"]
    pairs = batch["sample_N"]
    terms = {"ce": (nats_P[index_R], batch["label_sample_R"])}
    if "earlier_index_M" in batch:
        terms["uld"] = (scaled_uld(batch, at_NV, nats_P), pairs)
    else:
        terms["uld"] = (cached_uld(at_NV, probs_NK, tail_N), pairs)
    if "words_NI" in batch:
        words_NI = batch["words_NI"]
        terms["mapped"] = terms["kl"] = (mapped(at_NV, probs_NK, words_NI), pairs)
        terms["jsd"] = (jsd(at_NV, probs_NK, words_NI, 0.5), pairs)
        terms["hybrid"] = (terms["mapped"][0] + hybrid_rest(at_NV, probs_NK, tail_N, words_NI), pairs)
    if "chunk_M" in batch:
        chunks = range(len(batch["chunk_gold_G"]))
        own = [list(-nats_P[batch["chunk_index_M"][batch["chunk_M"] == g]]) for g in chunks]
        gold = [[value] for value in batch["chunk_gold_G"].tolist()]
        terms["likelihood"] = (likelihood(own, gold, 100.0, lowered=1e-6), batch["chunk_sample_G"])
    return terms


def scaled_uld(batch, at_NV, nats_P):
    """ULD of a group's last rows, the student's times the probabilities of its earlier tokens (the teacher's are)."""
    values = []
    for n, (probs_K, tail) in enumerate(zip(batch["teacher_probs_NK"], batch["teacher_tail_N"], strict=True)):
        earlier_M = batch["earlier_index_M"][batch["earlier_group_M"] == n]
        q_V = torch.exp(-nats_P[earlier_M].sum()) * at_NV[n].softmax(0).sort(descending=True).values
        k = len(probs_K)
        values.append((probs_K.double() - q_V[:k]).abs().sum() + (tail.double() - q_V[k:].sum()).abs())
    return torch.stack(values)


def mean(values, samples, normalization):
    if normalization == "tokens":
        return values.mean()
    return torch.stack([values[samples == sample].mean() for sample in samples.unique()]).mean()


@pytest.mark.parametrize("normalization", ["tokens", "samples"])
@pytest.mark.parametrize(("loss", "align"), CASES, ids=str)
def test_loss_is_its_definition(cache_path, chat_cache_path, student_path, tmp_path, loss, align, normalization):
    path = cache_of(loss, cache_path, chat_cache_path)
    one = trainer(path, student_path, tmp_path, loss=loss, align=align, loss_normalization=normalization)
    batch = one.data_collator([one.train_dataset[n] for n in (0, 2)])
    found = one.compute_loss(one.model, batch)
    with torch.no_grad():
        logits = one.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    terms = naive_terms(batch, logits.flatten(0, 1).double())
    mixture = one.args.mixture
    expected = sum(mixture[name] * mean(*terms[name], normalization) for name in mixture.names)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("normalization", ["tokens", "samples"])
@pytest.mark.parametrize(("loss", "align"), [CASES[0], CASES[2]], ids=str)
def test_accumulation_changes_nothing(cache_path, student_path, tmp_path, loss, align, normalization):
    """4 documents of unequal lengths at once, or one by one: the same loss, the same weights."""
    runs = []
    for size, steps in ((4, 1), (1, 4)):
        one = trainer(
            cache_path,
            student_path,
            tmp_path / str(size),
            loss=loss,
            align=align,
            loss_normalization=normalization,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            max_steps=2,
        )
        one.train()
        runs.append((weights(one), [line for line in one.state.log_history if "loss" in line]))
    for line, other in zip(runs[0][1], runs[1][1], strict=True):
        names = [*one.step_loss.names, "loss"]
        assert [other[name] for name in names] == pytest.approx([line[name] for name in names], rel=1e-5)
        total = sum(one.args.mixture[name] * line[name] for name in one.args.mixture.names)
        assert line["loss"] == pytest.approx(total, rel=1e-4)
    for name, value in runs[0][0].items():
        torch.testing.assert_close(runs[1][0][name], value, rtol=1e-5, atol=1e-6)


def test_widths_of_certificates_are_logged(cache_path, student_path, tmp_path):
    one = trainer(cache_path, student_path, tmp_path, loss="ce:1,uld:1,hybrid:1", max_steps=1)
    one.train()
    (line,) = [line for line in one.state.log_history if "loss" in line]
    assert 0 < line["uld_width"] <= 2
    assert 0 < line["hybrid_width"] <= 2
    assert one.step_loss.names == ("ce", "uld", "hybrid", "uld_width", "hybrid_width")


def test_a_sketch_reaches_the_loss(cache_path, student_path, tmp_path):
    sketched = WithSketch(open_cache(cache_path))
    args = config(tmp_path, loss="ce:1,uld:1")
    documents = CachedDocuments(sketched)
    plain = trainer(cache_path, student_path, tmp_path, loss="ce:1,uld:1")
    one = CachedDistillationTrainer(plain.model, args, documents, load_tokenizer(student_path))
    batch = one.data_collator([documents[n] for n in (0, 5, 9)])
    bins_NJ = batch["teacher_bins_NJ"]
    torch.testing.assert_close(bins_NJ.sum(1), batch["teacher_tail_N"])
    terms = dict(zip(one.step_loss.names, one._terms(one.model, batch).tolist(), strict=True))
    with torch.no_grad():
        logits = one.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = uld_loss(
        logits.flatten(0, 1)[batch["student_index_N"]],
        batch["teacher_probs_NK"],
        batch["teacher_tail_N"],
        teacher_bins_NJ=bins_NJ,
        rank_edges=torch.tensor(WithSketch.RANK_EDGES),
    )
    assert terms["uld"] == pytest.approx(expected.item(), rel=1e-5)
    without = plain._terms(plain.model, plain.data_collator([plain.train_dataset[n] for n in (0, 5, 9)]))
    assert abs(terms["uld"] - without[1].item()) > 1e-3
    one.train()
    assert all(math.isfinite(line["loss"]) for line in one.state.log_history if "loss" in line)
    with pytest.raises(ConfigError, match="--align boundary"):
        DistillationCollator(load_tokenizer(student_path), config(tmp_path, align="merge"), sketched)


def test_losses_on_the_same_words_want_the_teachers_tokenizer(cache_path, chat_cache_path, smollm2_tokenizer, tmp_path):
    for loss in ("kl:1", "ce:1,jsd:1"):
        with pytest.raises(TokenizerError, match="--loss mapped"):
            DistillationCollator(smollm2_tokenizer, config(tmp_path, loss=loss), open_cache(cache_path))
        args = config(tmp_path, loss=loss)
        with pytest.raises(ConfigError, match="ids=True"):
            DistillationCollator(smollm2_tokenizer, args, open_cache(chat_cache_path, ids=False))
        cache = open_cache(chat_cache_path)
        batch = DistillationCollator(smollm2_tokenizer, config(tmp_path, loss=loss), cache)([cache[0]])
        assert batch["words_NI"].tolist() == cache[0].token_ids.tolist()


WAITING = ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


@pytest.mark.parametrize("loss", ["ce:1,uld:1.5", "ce:1,mapped:1,likelihood:0.5", "ce:1,hybrid:1"])
def test_a_steps_loss_asks_no_tensor_for_its_value(cache_path, student_path, tmp_path, monkeypatch, loss):
    """On a GPU every such question would wait for it; the first step may ask, whether the head can be thinned.

    What transformers asks (about masks) stock training asks too. `FiniteLosses` asks when the next loss is queued; on
    a CPU, where nothing is, at once.
    """
    one, asked = trainer(cache_path, student_path, tmp_path, loss=loss, max_steps=3, logging_steps=10), []
    inside = False

    def noted(name: str):
        real = getattr(torch.Tensor, name)

        def ask(self, *arguments, **options):
            if inside and Path(sys._getframe(1).f_code.co_filename).parent.name == "distill":
                asked.append((one.state.global_step, name))
            return real(self, *arguments, **options)

        return ask

    real_terms = one._terms

    def terms(*arguments, **options):
        nonlocal inside
        inside = True
        try:
            return real_terms(*arguments, **options)
        finally:
            inside = False

    for name in WAITING:
        monkeypatch.setattr(torch.Tensor, name, noted(name))
    monkeypatch.setattr(one, "_terms", terms)
    one.train()
    assert {step for step, _ in asked} == {0}
