"""Windows as engines see them, for the tests of vLLM."""

import types
from typing import Any

import numpy as np


def window_of(ids: list[int], every: int = 1) -> Any:
    """All tokens after the first as rows, or every n-th of them; engines look at nothing but these three."""
    index_R = np.arange(0, len(ids) - 1, every)
    ids_L = np.array(ids, dtype=np.int64)
    return types.SimpleNamespace(ids=ids_L, logits_index=index_R, target_ids=ids_L[index_R + 1])
