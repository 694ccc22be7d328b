"""A prepared model's logits stay in the precision they were computed in.

accelerate copies every output of a model under autocast to float32. Of a head's logits that is the largest tensor of a
step, three times over (copy, its gradient, that gradient's cast); the losses here read bfloat16 as it is.
"""

from types import MethodType

import torch
from accelerate.utils.operations import ConvertOutputsToFp32


def keep_output_dtype(model: torch.nn.Module) -> None:
    """Take the copy to float32 out of `model.forward`, where accelerate put one; autocast stays."""
    forward = model.__dict__.get("forward")
    inner = getattr(getattr(forward, "__func__", forward), "__wrapped__", None)
    if isinstance(inner, ConvertOutputsToFp32):
        plain = inner.model_forward
        model.forward = MethodType(plain, model) if isinstance(forward, MethodType) else plain
