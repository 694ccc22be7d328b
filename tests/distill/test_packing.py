"""Packed rows: the same losses and gradients as unpacked ones, and models that would mix documents are refused."""

import numpy as np
import pytest
import torch
from training import config, load_tokenizer, trainer
from transformers import AutoConfig, AutoModelForCausalLM

from distill import DistillationCollator
from distill.packing import check_packing, first_fit
from storage_specs import open_cache
from storage_specs.errors import ConfigError

LOSS = "ce:1,uld:1.5,mapped:0.7,likelihood:0.3"


def test_first_fit():
    rows, columns = first_fit([5, 9, 3, 1, 4, 10], 10)
    assert rows.tolist() == [2, 1, 3, 1, 2, 0]
    assert columns.tolist() == [0, 0, 0, 9, 5, 0]
    lengths = np.random.default_rng(0).integers(1, 40, 200)
    rows, columns = first_fit(lengths, 64)
    covered = np.zeros((rows.max() + 1, 64), dtype=int)
    for row, column, length in zip(rows, columns, lengths, strict=True):
        covered[row, column : column + length] += 1
    assert covered.max() == 1
    assert covered.sum() == lengths.sum()


def test_rows_hold_several_documents_and_their_labels(cache_path, smollm2_tokenizer, tmp_path):
    cache = open_cache(cache_path)
    documents = [cache[n] for n in (3, 11, 0, 21)]
    plain, packed = (
        DistillationCollator(smollm2_tokenizer, config(tmp_path, loss=LOSS, packing=packing), cache)(documents)
        for packing in (False, True)
    )
    assert len(packed["input_ids"]) < len(plain["input_ids"])
    assert "attention_mask" not in packed
    assert packed["tokens"] == plain["tokens"]
    flat = packed["input_ids"].flatten()
    assert (flat[packed["label_index_R"] + 1] == packed["label_ids_R"]).all()
    assert (packed["label_index_R"].diff() > 0).all()

    def by_document(batch):
        pairs = zip(batch["label_sample_R"].tolist(), batch["label_ids_R"].tolist(), strict=True)
        return sorted(pairs)

    assert by_document(packed) == by_document(plain)


@pytest.mark.parametrize("normalization", ["tokens", "samples"])
@pytest.mark.parametrize("align", ["boundary", "merge"])
def test_packing_changes_nothing(cache_path, student_path, tmp_path, normalization, align):
    loss = LOSS if align == "boundary" else "ce:1,uld:1.5"
    found = []
    for packing in (False, True):
        options = {"packing": packing, "loss": loss, "loss_normalization": normalization, "align": align}
        one = trainer(cache_path, student_path, tmp_path / str(packing), optim="sgd", **options)
        one.train()
        losses = [line["loss"] for line in one.state.log_history if "loss" in line]
        found.append((losses, {name: value.clone() for name, value in one.model.state_dict().items()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-4, atol=1e-6)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96}
ATTENTION = SIZES | {"intermediate_size": 48, "num_attention_heads": 4}


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt_neox", "gemma3_text", "phi"])
def test_models_that_keep_windows_apart(name):
    torch.manual_seed(0)
    extra = {"num_key_value_heads": 2} if name in ("qwen3", "gemma3_text", "mistral") else {}
    extra |= {"head_dim": 8} if name in ("qwen3", "gemma3_text") else {}
    check_packing(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **ATTENTION, **extra)), "cpu")


@pytest.mark.parametrize("name", ["mamba", "bloom"])
def test_models_that_would_mix_windows_are_refused(name):
    torch.manual_seed(0)
    extra = {"n_head": 4, "n_layer": 2} if name == "bloom" else {"state_size": 8}
    with pytest.raises(ConfigError, match="group_by_length"):
        check_packing(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, **extra)), "cpu")


def test_a_tokenizer_that_truncates_is_left_as_it_is(cache_path, student_path, tmp_path):
    from copy import deepcopy

    tokenizer = deepcopy(load_tokenizer(student_path))
    tokenizer.backend_tokenizer.enable_truncation(max_length=4)
    cache = open_cache(cache_path)
    batch = DistillationCollator(tokenizer, config(tmp_path), cache)([cache[11]])
    expected = DistillationCollator(load_tokenizer(student_path), config(tmp_path), cache)([cache[11]])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 4
