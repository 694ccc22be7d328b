"""Several windows in one row: where each lies, and whether a model keeps them apart.

Positions start anew with every window and no attention mask is given: transformers then lets a token attend to its own
window only (a block-diagonal mask, or variable-length attention where the model runs flash attention). Models that
ignore positions or carry a state over tokens would mix them, so every model is asked once, by its logits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from storage_specs.errors import ConfigError

__all__ = ["check_packing", "first_fit"]


def first_fit(lengths: Sequence[int], capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """(W,) rows and (W,) columns of windows of these lengths: longest first, each in the first row that holds it."""
    rows, columns = np.zeros(len(lengths), dtype=np.int64), np.zeros(len(lengths), dtype=np.int64)
    filled: list[int] = []
    for number in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        fits = (row for row, tokens in enumerate(filled) if tokens + lengths[number] <= capacity)
        row = next(fits, len(filled))
        if row == len(filled):
            filled.append(0)
        rows[number], columns[number] = row, filled[row]
        filled[row] += lengths[number]
    return rows, columns


@torch.no_grad()
def check_packing(model: nn.Module, device: torch.device) -> None:
    """Raises ConfigError where a window's logits depend on its neighbours in a row, or on where it lies in it."""
    first, second, padding = torch.tensor([5, 6, 7, 8]), torch.tensor([9, 8, 6]), torch.tensor([0])
    ids = torch.cat([first, second, padding])[None].to(device)
    positions = torch.cat([torch.arange(4), torch.arange(3), torch.zeros(1, dtype=torch.int64)])[None].to(device)
    training = model.training
    model.eval()
    try:
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, :7]
        apart = [model(input_ids=row[None].to(device), use_cache=False).logits[0] for row in (first, second)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--packing: {type(model).__name__} takes no position_ids ({error}): {_REMEDY}") from error
    finally:
        model.train(training)
    expected = torch.cat(apart)
    bound = (1e-3 if expected.dtype == torch.float32 else 5e-2) * expected.abs().max()
    if not (packed - expected).abs().max() <= bound:
        raise ConfigError(f"--packing: {type(model).__name__} mixes the windows of a row: {_REMEDY}")


_REMEDY = "leave --packing out (--train_sampling_strategy group_by_length saves padding with any model)"
