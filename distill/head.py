"""Logits at chosen positions only: the head sees the picked hidden states, never the whole batch.

With a vocabulary of 49,152 the head is most of a small model's work on a CPU, and the logits most of its memory.
"""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

# What a student is fed of a batch; of an encoder-decoder, positions are those of its decoder.
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "decoder_input_ids", "decoder_attention_mask")
# Rounding differs between a product of few rows and one of many; what is wrong differs by as much as logits do.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_LOW_PRECISION_TOLERANCE = 5e-2
_CHECKED: "WeakKeyDictionary[nn.Module, nn.Module | None]" = WeakKeyDictionary()


def picked_logits(model: nn.Module, inputs: Mapping[str, torch.Tensor], index_R: torch.Tensor) -> torch.Tensor:
    """(R, V) logits of `model(**inputs)` at the flattened positions `index_R` (b * L + i).

    The input of the model's output embedding (`get_output_embeddings()`) is thinned out on its way in, so that wrappers
    (DDP, FSDP, PEFT, compile) and whatever the model does to its logits afterwards (scaling, soft caps) stay in force.
    Once per model it is checked on a few tokens that this changes nothing; a model without such a head, or one that
    does more than calling it once on all positions, computes all logits and they are picked afterwards.
    """
    fed = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
    whole = _unwrapped(model)
    if whole not in _CHECKED:
        head = _head_of(whole)
        _CHECKED[whole] = head if head is not None and _can_be_thinned(model, head, fed) else None
    head = _CHECKED[whole]
    if head is None:
        return model(**fed, use_cache=False).logits.flatten(0, 1).index_select(0, index_R)
    logits, _ = _thinned(model, head, fed, index_R)
    return logits.squeeze(0)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile; FSDP2 wraps nothing."""
    while (inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None)) is not None:
        model = inner
    return model


def _head_of(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _thinned(
    model: nn.Module, head: nn.Module, inputs: Mapping[str, torch.Tensor], index_R: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """(1, R, V) logits where the head was called on (B, L, D), and how often it was."""
    calls = 0

    def thin(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal calls
        calls += 1
        hidden_BLD, *others = args
        return (hidden_BLD.flatten(0, 1).index_select(0, index_R).unsqueeze(0), *others)

    hook = head.register_forward_pre_hook(thin)
    try:
        return model(**inputs, use_cache=False).logits, calls
    finally:
        hook.remove()


@torch.no_grad()
def _can_be_thinned(model: nn.Module, head: nn.Module, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether thinning gives the logits that the whole model gives, on two rows of five tokens."""
    like = next(iter(inputs.values()))
    ids_BL = torch.arange(10, device=like.device).view(2, 5)
    made = {name: torch.ones_like(ids_BL) if name.endswith("mask") else ids_BL for name in inputs}
    if "position_ids" in inputs:
        made["position_ids"] = torch.arange(5, device=like.device).expand(2, 5)
    index_R = torch.tensor([0, 3, 5, 8], device=like.device)
    training = model.training
    model.eval()
    try:
        all_RV = model(**made, use_cache=False).logits.flatten(0, 1)[index_R]
        picked_1RV, calls = _thinned(model, head, made, index_R)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False  # what follows the head wants all positions
    finally:
        model.train(training)
    if calls != 1 or picked_1RV.shape != (1, *all_RV.shape):
        return False
    bound = _TOLERANCE.get(all_RV.dtype, _LOW_PRECISION_TOLERANCE) * all_RV.abs().max()
    return bool((picked_1RV[0] - all_RV).abs().max() <= bound)
