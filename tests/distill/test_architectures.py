"""Every architecture: one step on picked positions is the step on all logits, value and gradients.

Tiny random models of the families that transformers has; soft caps, scales, biases, tied heads, experts, state spaces.
"""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM

from distill import head

V, B, L = 96, 3, 7
MODERN = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NEOX = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
CAUSAL = {
    "llama": MODERN,
    "llama-tied": MODERN | {"tie_word_embeddings": True},
    "qwen2": MODERN,
    "qwen3": MODERN | {"head_dim": 8},
    "gemma": MODERN | {"head_dim": 8},
    "gemma2": MODERN | {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": MODERN | {"head_dim": 8, "final_logit_softcapping": 2.0},
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
    },
    "gpt_neox": NEOX,
    "gpt_bigcode": GPT,
    "codegen": GPT | {"rotary_dim": 4},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 64,
    },
    "phi": NEOX,
    "phi3": MODERN | {"pad_token_id": 0},
    "mistral": MODERN,
    "mixtral": MODERN | EXPERTS,
    "qwen2_moe": MODERN | QWEN_EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": MODERN | QWEN_EXPERTS | {"head_dim": 8},
    "olmo2": MODERN,
    "olmoe": MODERN | {"num_experts": 4, "num_experts_per_tok": 2},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon-alibi": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "cohere": MODERN | {"logit_scale": 0.25},
    "granite": MODERN | {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "nemotron": MODERN,
    "stablelm": MODERN,
    "starcoder2": MODERN,
    "smollm3": MODERN | {"pad_token_id": 0},
    "glm4": MODERN | {"head_dim": 8, "pad_token_id": 0},
    "mamba": MAMBA,
    "mamba2": MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "recurrent_gemma": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "lru_width": 32,
        "attention_window_size": 8,
        "logits_soft_cap": 2.0,
    },
    "bart": ENCODER_DECODER,
    "biogpt": NEOX,
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64},
}
SEQ2SEQ = {
    "t5": T5,
    "t5-untied": T5 | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
    "mt5": T5,
    "bart": ENCODER_DECODER | {"decoder_start_token_id": 2},
    "pegasus": ENCODER_DECODER | {"decoder_start_token_id": 0},
}


def tiny(name, sizes, kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.partition("-")[0], vocab_size=V, **sizes)
    if name == "bart" and kind is AutoModelForCausalLM:
        config.is_decoder, config.is_encoder_decoder = True, False
    return kind.from_config(config).float()


def batch(encoder_decoder):
    torch.manual_seed(1)
    ids, mask = torch.randint(3, V, (B, L)), torch.ones(B, L, dtype=torch.int64)
    mask[1, 5:] = 0
    if not encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask}
    inputs = {"input_ids": torch.randint(3, V, (B, 4)), "attention_mask": torch.ones(B, 4, dtype=torch.int64)}
    return inputs | {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def step(logits_RV, model):
    """Loss and gradients of cross entropy at R positions."""
    model.zero_grad()
    labels = torch.arange(len(logits_RV)) % V
    loss = cross_entropy(logits_RV.float(), labels)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(model, encoder_decoder, splits=True):
    model.eval()  # no dropout
    inputs, index_R = batch(encoder_decoder), torch.tensor([0, 3, 6, 8, 11, 14, 20])
    expected_RV = model(**inputs).logits.flatten(0, 1)[index_R]
    expected_loss, expected = step(expected_RV, model)
    picked_RV = head.picked_logits(model, inputs, index_R)
    torch.testing.assert_close(picked_RV, expected_RV, rtol=1e-4, atol=1e-5)
    loss, found = step(picked_RV, model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert (head._CHECKED[model] is not None) == splits


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # gpt_bigcode's own
@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name):
    check(tiny(name, CAUSAL[name], AutoModelForCausalLM), encoder_decoder=False)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoders(name):
    check(tiny(name, SEQ2SEQ[name], AutoModelForSeq2SeqLM), encoder_decoder=True)


class PositionBias(LlamaForCausalLM):
    """A head whose logits depend on where they stand: thinned out, they would be wrong without an error."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        places = torch.arange(output.logits.shape[1], dtype=torch.float32)
        output.logits = output.logits * (1 + places[None, :, None])
        return output


class NotCalled(LlamaForCausalLM):
    """Uses its head's weight, and never calls the head."""

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        output.logits = output.last_hidden_state @ self.lm_head.weight.T
        return output


class TwiceCalled(LlamaForCausalLM):
    """Predicts two tokens ahead with one head, and adds what it thinks of both."""

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        hidden = output.last_hidden_state
        output.logits = self.lm_head(hidden) + 0.5 * self.lm_head(hidden.roll(1, 1))
        return output


class Reshapes(LlamaForCausalLM):
    """Wants logits of its inputs' shape."""

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        output.logits = self.lm_head(output.last_hidden_state).view(*input_ids.shape, -1)
        return output


class Headless(LlamaForCausalLM):
    """Names no head."""

    def get_output_embeddings(self) -> nn.Module | None:
        return None


@pytest.mark.parametrize("kind", [PositionBias, NotCalled, TwiceCalled, Reshapes, Headless])
def test_heads_that_cannot_be_split_get_all_positions(kind):
    torch.manual_seed(0)
    check(kind(LlamaConfig(vocab_size=V, **MODERN)), encoder_decoder=False, splits=False)


def test_half_precision_and_no_positions():
    model = tiny("llama", MODERN, AutoModelForCausalLM).bfloat16()
    inputs = batch(False)
    index_R = torch.tensor([0, 5, 8, 20])
    picked_RV = head.picked_logits(model, inputs, index_R)
    assert head._CHECKED[model] is model.lm_head
    expected_RV = model(**inputs).logits.flatten(0, 1)[index_R]
    torch.testing.assert_close(picked_RV, expected_RV, rtol=5e-2, atol=5e-2)
    assert head.picked_logits(model, inputs, index_R[:0]).shape == (0, V)
