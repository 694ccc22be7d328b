"""What is measured of a model at inference: counts by hand, one process of its own, errors before anything runs."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from distill.evaluation.inference_benchmark import (
    InferenceSettings,
    Spread,
    machine,
    measure_apart,
    measured,
    parameters,
    weights_bytes,
)
from storage_specs.errors import ConfigError

SETTINGS = InferenceSettings(texts=("One text to go on from.", "Another, ünequal one"), new_tokens=4, repeats=3)


def positive(spread: Spread) -> bool:
    return 0 < spread.q1 <= spread.median <= spread.q3


def test_a_model_in_a_process_of_its_own(student_path, smollm2_tokenizer):
    figures = measure_apart(str(student_path), SETTINGS)
    # A two-layer Llama of 16 dimensions with tied embeddings, by hand: attention, MLP, norms.
    layer = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32 + 2 * 16
    assert figures.parameters_without_embeddings == 2 * layer + 16
    assert figures.parameters == 2 * layer + 16 + 49_152 * 16
    assert figures.weights_bytes == (student_path / "model.safetensors").stat().st_size
    assert figures.peak_bytes > 4 * figures.parameters
    assert (figures.dtype, figures.batch_size, figures.new_tokens, figures.repeats) == ("float32", 2, 4, 3)
    tokens = sum(len(smollm2_tokenizer(text).input_ids) for text in SETTINGS.texts)
    assert figures.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in SETTINGS.texts) / tokens)
    spreads = [value for value in vars(figures).values() if isinstance(value, Spread)]
    assert len(spreads) == 6
    assert all(map(positive, spreads))
    assert figures.decode_bytes.median == pytest.approx(figures.decode_tokens.median * figures.bytes_per_token)


def test_every_token_is_written_and_padding_is_none_of_the_text(student_path, smollm2_tokenizer, monkeypatch):
    """Left padding: what is written behind a text in a batch is what is written behind it alone."""
    model = AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32).eval()
    written, generate = [], model.generate

    def recorded(**options):
        written.append(generate(**options))
        return written[-1]

    monkeypatch.setattr(model, "generate", recorded)
    measured(model, smollm2_tokenizer, SETTINGS, weights_bytes=1, memory_before=0)
    alone, together = written[0], written[-1]
    assert len(written) == 2 * (2 + SETTINGS.repeats)
    assert alone[0, -4:].tolist() == together[0, -4:].tolist()
    second = smollm2_tokenizer(SETTINGS.texts[1]).input_ids
    assert together[1, -4 - len(second) : -4].tolist() == second


def test_an_encoder_decoder_is_measured_too(smollm2_tokenizer):
    config = T5Config(
        vocab_size=49_152, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    figures = measured(model, smollm2_tokenizer, SETTINGS, weights_bytes=1, memory_before=0)
    assert positive(figures.decode_tokens)
    total, without = parameters(model)
    embeddings = 49_152 * 16 * (1 if config.tie_word_embeddings else 2)
    assert total - without == embeddings


def test_weight_files(tmp_path, student_path):
    with pytest.raises(ConfigError, match="no weight files"):
        weights_bytes(str(tmp_path))
    for name, size in (("pytorch_model.bin", 5), ("training_args.bin", 99), ("optimizer.pt", 99)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert weights_bytes(str(tmp_path)) == 5
    for number in (1, 2):  # a sharded model; the older format beside it is not loaded
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(b"x" * 7)
    assert weights_bytes(str(tmp_path)) == 14


def test_what_cannot_be_measured(student_path, smollm2_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32)
    with pytest.raises(ConfigError, match="reads at most 256"):
        measured(model, smollm2_tokenizer, replace(SETTINGS, new_tokens=400), weights_bytes=1, memory_before=0)
    for change in ({"texts": ()}, {"texts": ("a", "")}, {"repeats": 1}, {"new_tokens": 1}):
        with pytest.raises(ConfigError):
            replace(SETTINGS, **change)


def test_spread_and_machine():
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 100.0]) == Spread(median=3.0, q1=2.0, q3=4.0)
    found = machine()
    assert found["cpu"]
    assert found["torch"] == torch.__version__
