"""CE, ULD and `mapped` of every row in one pass over the logits, with the certificate: how wrong can this ULD be.

Two implementations of one truth: `torch` (any device, compilable) and `triton` (CUDA; logits read two or three times,
never sorted, softmax never in memory). The fastest available is the default.

Legend: N rows, V student words, K ranks, I mapped words, J tail bins.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch

from distill.fused_torch import TorchRowLosses
from distill.teacher_rows import TeacherRows
from distill.teacher_tail import tail_laws
from storage_specs.errors import ConfigError

__all__ = ["Implementation", "RowLosses", "choose_implementation", "row_losses"]

Implementation = Literal["torch", "triton"]


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """Losses of each row, (N,) float32 (float64 for float64 logits); None where not asked for.

    ce_N is 0 where the label is negative. lower_N <= full-vocabulary ULD <= upper_N, constants.
    """

    ce_N: torch.Tensor | None = None
    uld_N: torch.Tensor | None = None
    mapped_N: torch.Tensor | None = None
    lower_N: torch.Tensor | None = None
    upper_N: torch.Tensor | None = None


def row_losses(
    logits_NV: torch.Tensor,
    *,
    labels_N: torch.Tensor | None = None,
    teacher: TeacherRows | None = None,
    uld: bool = True,
    rank_edges: torch.Tensor | None = None,
    words_NI: torch.Tensor | None = None,
    impl: Implementation | None = None,
    in_place: bool = False,
) -> RowLosses:
    """CE (with labels_N), ULD (with teacher and uld) and `mapped` (with teacher and words_NI) of each row.

    logits_NV: (N, V), any float dtype. labels_N: (N,) int64, negative = no label. rank_edges: (J + 1,) of the cache's
    manifest; with them and `teacher.bins_NJ` the ULD is the full-vocabulary sum against the sketch, without them
    head + |T - S|. words_NI: (N, I) int64, as for `mapped_loss`. impl: None = triton on CUDA where it can, else torch.
    in_place: the backward pass may write the gradient over the logits (saves N x V; nobody else may need their values).

    Raises ConfigError when nothing is asked for, when shapes do not fit, when the sketch has no bins, or when
    `impl="triton"` cannot do it.
    """
    if labels_N is None and teacher is None:
        raise ConfigError("row_losses: neither labels_N nor teacher given; there is nothing to compute")
    if words_NI is not None and teacher is None:
        raise ConfigError("row_losses: words_NI without teacher: `mapped` needs the teacher's probabilities")
    _check_shapes(logits_NV, labels_N, teacher, words_NI)
    laws = None
    if teacher is not None and uld and rank_edges is not None:
        if teacher.bins_NJ is None:
            raise ConfigError(
                "rank_edges given, but the rows have no tail bins: this cache was built without the sketch"
            )
        laws = partial(tail_laws, teacher.probs_NK.detach(), teacher.bins_NJ.detach(), rank_edges)
    with_uld = teacher is not None and uld
    word_probs_NI = None if words_NI is None else teacher.probs_NK[:, : words_NI.shape[1]].detach().contiguous()
    arguments = [
        labels_N,
        teacher.probs_NK.detach().contiguous() if with_uld else None,
        teacher.tail_N.detach().contiguous() if with_uld else None,
        None if words_NI is None else words_NI.contiguous(),
        word_probs_NI,
        laws,  # computed while a GPU is busy with the kernels before
        in_place,
    ]
    if choose_implementation(logits_NV, teacher if uld else None, impl) == "triton":
        from distill.fused_triton import FusedRowLosses, Tuning

        logits_NV = logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()
        for place in (1, 2, 4):
            arguments[place] = None if arguments[place] is None else arguments[place].float()
        computed = FusedRowLosses.apply(logits_NV, *arguments, Tuning())
    else:
        arguments[5] = laws and laws()
        computed = TorchRowLosses.apply(logits_NV, *arguments)
    ce_N, uld_N, mapped_N, floor_N, gap_N = computed
    return RowLosses(
        ce_N=None if labels_N is None else ce_N,
        uld_N=uld_N if with_uld else None,
        mapped_N=None if words_NI is None else mapped_N,
        lower_N=floor_N if with_uld else None,
        upper_N=floor_N + gap_N if with_uld else None,
    )


def _check_shapes(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor | None,
    teacher: TeacherRows | None,
    words_NI: torch.Tensor | None,
) -> None:
    """The kernels trust their shapes: here they are told apart from what would read another row's numbers."""
    if logits_NV.ndim != 2:
        raise ConfigError(f"logits of shape {tuple(logits_NV.shape)}: must be (rows, vocabulary)")
    columns = {"labels_N": labels_N, "words_NI": words_NI}
    if teacher is not None:
        columns |= {"probs_NK": teacher.probs_NK, "tail_N": teacher.tail_N, "bins_NJ": teacher.bins_NJ}
    for name, column in columns.items():
        if column is not None and len(column) != len(logits_NV):
            raise ConfigError(f"{len(column)} rows of {name} beside {len(logits_NV)} rows of logits")
    if words_NI is not None and words_NI.shape[1] > teacher.probs_NK.shape[1]:
        raise ConfigError(f"{words_NI.shape[1]} words of the first {teacher.probs_NK.shape[1]} ranks: too many")


def choose_implementation(
    logits_NV: torch.Tensor, teacher: TeacherRows | None, impl: Implementation | None
) -> Implementation:
    """The implementation to use; ConfigError says why a demanded one cannot."""
    if impl == "torch":
        return "torch"
    if impl not in (None, "triton"):
        raise ConfigError(f"impl {impl!r}: must be 'torch', 'triton' or None (the fastest available)")
    obstacle = _triton_obstacle(logits_NV, teacher)
    if obstacle is None and (impl == "triton" or logits_NV.is_cuda):
        return "triton"
    if impl is None:
        return "torch"
    raise ConfigError(f"impl='triton' cannot be used: {obstacle}; leave impl out or take impl='torch'")


def _triton_obstacle(logits_NV: torch.Tensor, teacher: TeacherRows | None) -> str | None:
    if not _has_triton():
        return "triton is not installed"
    from distill.fused_triton import INTERPRETED, LARGEST_HEAD

    if not logits_NV.is_cuda and not INTERPRETED:
        return f"the logits are on {logits_NV.device}, not on a CUDA device"
    if logits_NV.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"logits of {logits_NV.dtype}"
    if teacher is not None and teacher.probs_NK.shape[1] > LARGEST_HEAD:
        return f"K = {teacher.probs_NK.shape[1]} is more than {LARGEST_HEAD} ranks"
    return None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
