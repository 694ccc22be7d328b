"""A loss that is not finite ends the run, and looking at it costs no waiting for the GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from storage_specs.errors import NonFiniteLossError


@dataclass(frozen=True, kw_only=True)
class _Watched:
    values: torch.Tensor  # the terms, then the loss; on the CPU once `copied`
    copied: "torch.cuda.Event | None"
    names: Sequence[str]
    doc_ids: Sequence[str]
    step: int


class FiniteLosses:
    """Looks at each loss after the next one is queued, or when asked: before a checkpoint, a log line, the end.

    On a CPU, where nothing is queued, at once. An optimizer step may have followed a bad loss by then, but nothing was
    saved after it.
    """

    def __init__(self) -> None:
        self._last: _Watched | None = None

    def watch(
        self, loss: torch.Tensor, terms: torch.Tensor, names: Sequence[str], doc_ids: Sequence[str], step: int
    ) -> None:
        """loss: scalar; terms: (len(names),), its parts. Raises NonFiniteLossError for the loss before this one."""
        values = torch.cat([terms.detach(), loss.detach().reshape(1)])
        copied = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        before = self._last
        self._last = _Watched(values=values, copied=copied, names=names, doc_ids=doc_ids, step=step)
        _check(before)
        if copied is None:
            self.check()

    def check(self) -> None:
        """Raises NonFiniteLossError, naming the documents of the batch, for the last loss watched."""
        last, self._last = self._last, None
        _check(last)


def _check(watched: _Watched | None) -> None:
    if watched is None:
        return
    if watched.copied is not None:
        watched.copied.synchronize()
    *terms, loss = watched.values.tolist()
    if not torch.isfinite(watched.values[-1]):
        raise NonFiniteLossError(
            f"the loss is {loss} at step {watched.step} "
            f"({', '.join(f'{name} {term:.4g}' for name, term in zip(watched.names, terms, strict=True))}) in the "
            f"batch of documents {', '.join(watched.doc_ids)}: lower --learning_rate or set --max_grad_norm, and "
            "look at these documents; checkpoints before this step are intact"
        )
