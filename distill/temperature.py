"""The teacher's side of a temperature: re-tempering a truncated row, with a bound, or not at all.

A cache holds temperature 1. At temperature t a probability becomes p^a / Z, a = 1 / t, Z = the sum of p^a over the
WHOLE vocabulary. The head's share of Z is known; the tail's is not, but bounded. Of a bin of n words with mass m whose
values lie between l and u (the neighbouring bins' means; 0 below the last, p_(K) above the first), with c = the chord
of x^a from l to u at the mean m / n:

    a < 1 (concave):   n c  <=  sum of p^a  <=  n (m / n)^a              a > 1 (convex): the other way round

Without a sketch the tail is one bin. The middle between the bounds of Z is taken; how far off the row may then be is
known, and rows of which too little is known are refused. At t > 1 the tail grows, and it takes the sketch; at t < 1 it
shrinks, and the head alone soon suffices.

The student's side needs no bound: softmax(logits / t), `uld_loss(student_temperature=t)`.

Legend: N rows, K ranks, J bins of the tail.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from distill.teacher_rows import TeacherRows
from storage_specs.errors import ConfigError

__all__ = ["TemperedRows", "tempered"]


class TemperedRows(NamedTuple):
    """teacher: the rows at the new temperature. error_N: (N,) the most that ULD (head + |T - S|) can be off by them."""

    teacher: TeacherRows
    error_N: torch.Tensor


def tempered(
    teacher: TeacherRows,
    temperature: float,
    vocab_size: int,
    *,
    rank_edges: torch.Tensor | None = None,
    largest_error: float = 0.05,
) -> TemperedRows:
    """The teacher's rows at another temperature than the cache's 1.

    vocab_size: the teacher's. rank_edges: (J + 1,) where `teacher.bins_NJ` is to be used. largest_error: the bound on
    the loss's error (an L1 distance, between 0 and 2) beyond which a row cannot be known well enough. Tail bins of the
    result are the tempered ones; ids stay, gold_N (a temperature-1 figure) does not.

    Raises ConfigError for an impossible temperature and for rows whose error could exceed `largest_error`.
    """
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature is {temperature}: must be finite and above 0")
    probs_NK = teacher.probs_NK.double()
    edges, masses_NJ = _bins(teacher, vocab_size, rank_edges)
    if temperature == 1:
        return TemperedRows(teacher, torch.zeros_like(teacher.tail_N))
    power = 1 / temperature
    # Everything as a multiple of the largest value: its power is 1, and nothing overflows or vanishes altogether.
    largest_N1 = probs_NK[:, :1].clamp(min=torch.finfo(torch.float64).tiny)
    head_NK = (probs_NK / largest_N1) ** power
    low_NJ, high_NJ = _bounds(masses_NJ / largest_N1, edges, probs_NK[:, -1:] / largest_N1, power)
    head_N, low_N, high_N = head_NK.sum(1), low_NJ.sum(1), high_NJ.sum(1)
    # The tail's share of the whole: between these two, and the middle is nowhere more than half of that away. The head
    # is scaled by what is left, so that the L1 distance to the truth is twice the share's.
    smallest_N, biggest_N = low_N / (head_N + low_N), high_N / (head_N + high_N)
    share_N = (smallest_N + biggest_N) / 2
    error_N = biggest_N - smallest_N
    if len(error_N) and error_N.max() > largest_error:
        row = int(error_N.argmax())
        remedy = "use the tail bins (rank_edges)" if rank_edges is None else "cache more ranks or more bins"
        raise ConfigError(
            f"temperature {temperature}: the tail of row {row} may hold {smallest_N[row]:.3f} to {biggest_N[row]:.3f} "
            f"of the tempered mass, so the loss may be off by {error_N[row]:.3f} (largest_error {largest_error}): "
            f"{remedy}, or stay nearer to temperature 1"
        )
    middle_NJ = (low_NJ + high_NJ) / 2
    middle_N = middle_NJ.sum(1)
    shares_NJ = middle_NJ / torch.where(middle_N > 0, middle_N, 1)[:, None] * share_N[:, None]
    dtype = teacher.probs_NK.dtype
    rows = replace(
        teacher,
        probs_NK=(head_NK / head_N[:, None] * (1 - share_N)[:, None]).to(dtype),
        tail_N=share_N.to(dtype),
        bins_NJ=None if rank_edges is None else shares_NJ.to(dtype),
        gold_N=None,
    )
    return TemperedRows(rows, error_N.to(dtype))


def _bins(teacher: TeacherRows, vocab_size: int, rank_edges: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges (J + 1,) float64 and masses (N, J) of the tail; one bin without a sketch, none where K is everything."""
    k, device = teacher.probs_NK.shape[1], teacher.probs_NK.device
    if vocab_size < k:
        raise ConfigError(f"vocab_size is {vocab_size}, but the rows have {k} ranks")
    if rank_edges is None:
        edges, masses_NJ = torch.tensor([k, vocab_size]), teacher.tail_N[:, None]
    elif teacher.bins_NJ is None:
        raise ConfigError("rank_edges given, but the rows have no tail bins: this cache was built without the sketch")
    else:
        edges, masses_NJ = rank_edges, teacher.bins_NJ
    if len(edges) != masses_NJ.shape[1] + 1 or int(edges[0]) != k or int(edges[-1]) != vocab_size:
        raise ConfigError(
            f"rank edges {edges.tolist()} do not fit {k} ranks, {masses_NJ.shape[1]} bins, {vocab_size} words"
        )
    if vocab_size == k:
        return edges[:1].to(device, torch.float64), masses_NJ[:, :0].double()
    return edges.to(device, torch.float64), masses_NJ.double()


def _bounds(
    masses_NJ: torch.Tensor, edges: torch.Tensor, smallest_head_N1: torch.Tensor, power: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper bound of the sum of p^power in every bin."""
    sizes_J = edges.diff()
    mean_NJ = masses_NJ / sizes_J
    # Values descend: none in a bin is above the mean of the bin before, nor below that of the bin after.
    upper_NJ = torch.cat([smallest_head_N1, mean_NJ], 1)[:, :-1] if len(sizes_J) else mean_NJ
    lower_NJ = torch.cat([mean_NJ, torch.zeros_like(smallest_head_N1)], 1)[:, 1:] if len(sizes_J) else mean_NJ
    # Rounding of stored masses may leave a mean outside: it is then what bounds it.
    upper_NJ, lower_NJ = torch.maximum(upper_NJ, mean_NJ), torch.minimum(lower_NJ, mean_NJ)
    width_NJ = upper_NJ - lower_NJ
    part_NJ = torch.where(width_NJ > 0, (mean_NJ - lower_NJ) / torch.where(width_NJ > 0, width_NJ, 1), 0)
    chord_NJ = sizes_J * (lower_NJ**power + part_NJ * (upper_NJ**power - lower_NJ**power))
    even_NJ = sizes_J * mean_NJ**power
    return torch.minimum(chord_NJ, even_NJ), torch.maximum(chord_NJ, even_NJ)
