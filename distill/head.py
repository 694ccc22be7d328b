"""Logits at chosen positions only: the head sees the picked hidden states, never the whole batch.

With a vocabulary of 49,152 the head is most of a small model's work on a CPU, and the logits most of its memory.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def picked_logits(
    model: nn.Module, head: nn.Module | None, inputs: Mapping[str, torch.Tensor], index_R: torch.Tensor
) -> torch.Tensor:
    """(R, V) logits of `model(**inputs)` at the flattened positions `index_R` (b * L + i).

    `head` is the model's output embedding (`get_output_embeddings()`), whose input is thinned out on its way in, so
    that wrappers (DDP, PEFT, compile) and whatever the model does to its logits afterwards (scaling, soft caps) stay
    in force. A model without one, or one that does not call it, computes all logits and they are picked afterwards.
    """
    thinned = False

    def thin(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal thinned
        thinned = True
        hidden_BLD, *others = args
        return (hidden_BLD.flatten(0, 1).index_select(0, index_R).unsqueeze(0), *others)

    hook = head.register_forward_pre_hook(thin) if head is not None else None
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits.squeeze(0) if thinned else logits.flatten(0, 1).index_select(0, index_R)
