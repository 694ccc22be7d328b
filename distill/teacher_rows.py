"""The teacher's rows at the compared positions, as tensors.

Legend: N compared rows, K ranks of the cached head, I ranks whose ids are cached, J tail bins.
"""

from dataclasses import dataclass

import torch

__all__ = ["TeacherRows"]


@dataclass(frozen=True, kw_only=True)
class TeacherRows:
    """The teacher's rows at the compared positions, as tensors on the student's device.

    probs_NK: (N, K) float32, descending. tail_N: (N,) float32, the mass outside. bins_NJ: (N, J) float32, masses of the
    sorted tail between rank edges, or None. ids_NI: (N, I) int64, teacher ids of the first I ranks, or None.
    gold_N: (N,) float32, the log-probability in nats of the teacher's token that really followed, or None.
    """

    probs_NK: torch.Tensor
    tail_N: torch.Tensor
    bins_NJ: torch.Tensor | None = None
    ids_NI: torch.Tensor | None = None
    gold_N: torch.Tensor | None = None
