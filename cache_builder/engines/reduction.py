"""From logits to what a row keeps: log-sum-exp, gold log-probability, sorted top-k, and the masses of the sorted tail.

`reduce_rows` runs the Triton kernels where logits lie on a CUDA device, plain torch elsewhere; both give the same rows
but for float32 rounding, and tail bins within 1e-4 of a full sort on CUDA (exact on the CPU).

Legend: B rows of one block, V vocabulary, G groups of E words each, C candidates, K top-k ranks, J tail bins.
"""

import itertools
from importlib.util import find_spec

import torch

from cache_builder.engines.reduction_memory import GROUP


def reduce_rows(
    logits_BV: torch.Tensor, target_B: torch.Tensor, k: int, rank_edges: tuple[int, ...] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values (B, 1 + K + J) float32, ids (B, K) int32) of a block of logits, float32 or 16 bits wide.

    values: gold log-probability; top-k log-probabilities, descending, equal ones by ascending id; mass of the sorted
    tail between consecutive `rank_edges` (J + 1 of them, from k to V; none where None).
    """
    if logits_BV.is_cuda and find_spec("triton"):
        from cache_builder.engines.reduction_triton import reduce_rows_triton

        return reduce_rows_triton(logits_BV, target_B, k, rank_edges)
    return reduce_rows_torch(logits_BV, target_B, k, rank_edges)


def reduce_rows_torch(
    logits_BV: torch.Tensor, target_B: torch.Tensor, k: int, rank_edges: tuple[int, ...] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reduce_rows` in plain torch; tail bins by a full sort."""
    logits_BV = logits_BV.float()
    norm_B1 = logits_BV.logsumexp(dim=-1, keepdim=True)
    values_BK, ids_BK = top_k(logits_BV, k)
    ids_BK, order_BK = ids_BK.sort(dim=1)
    values_BK, by_value_BK = values_BK.gather(1, order_BK).sort(dim=1, descending=True, stable=True)
    parts = [logits_BV.gather(1, target_B[:, None].long()) - norm_B1, values_BK - norm_B1]
    if rank_edges is not None:
        parts.append(tail_masses(logits_BV - norm_B1, rank_edges))
    return torch.cat(parts, dim=1), ids_BK.gather(1, by_value_BK).int()


def tail_masses(logprobs_BV: torch.Tensor, rank_edges: tuple[int, ...]) -> torch.Tensor:
    """(B, J) float32: mass of the sorted values between consecutive edges, by a full sort, summed in float64."""
    sorted_BV = logprobs_BV.sort(dim=1, descending=True).values
    bins = [sorted_BV[:, first:last].double().exp().sum(dim=1) for first, last in itertools.pairwise(rank_edges)]
    return torch.stack(bins, dim=1).float()


def top_k(logits_BV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest values (B, K) and their ids (B, K), in no order; of equal values at the border the lowest ids.

    Exact, by group maxima: the k + 1 largest values lie in the k + 1 groups with the largest maxima (several times
    faster than `torch.topk` over a large vocabulary). `torch.topk` alone keeps any of the values that tie at the
    border, and logits rounded to bfloat16 tie at rank 64 in two rows of three.
    """
    vocabulary = logits_BV.shape[1]
    groups = vocabulary // GROUP
    grouped_BGE = logits_BV[:, : groups * GROUP].unflatten(1, (groups, GROUP))
    rest_BE, ids_V = logits_BV[:, groups * GROUP :], torch.arange(vocabulary, device=logits_BV.device)
    maxima_BG = grouped_BGE.amax(dim=2)
    chosen_BG = maxima_BG.topk(min(k + 1, groups)).indices
    candidates_BC = grouped_BGE.gather(1, chosen_BG[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    candidate_ids_BC = ids_V[: groups * GROUP].view(groups, GROUP)[chosen_BG].flatten(1)
    candidate_ids_BC = torch.cat([candidate_ids_BC, ids_V[groups * GROUP :].expand(len(logits_BV), -1)], dim=1)
    values_BK, place_BK = torch.cat([candidates_BC, rest_BE], dim=1).topk(min(k + 1, vocabulary))
    ids_BK = candidate_ids_BC.gather(1, place_BK)
    if values_BK.shape[1] == k:
        return values_BK, ids_BK
    border_B = values_BK[:, k - 1]
    values_BK, ids_BK, tied_B = values_BK[:, :k], ids_BK[:, :k].clone(), border_B == values_BK[:, k]
    for row in tied_B.nonzero()[:, 0].tolist():
        inside_G = (maxima_BG[row] >= border_B[row]).nonzero()[:, 0]
        group, entry = (grouped_BGE[row, inside_G] == border_B[row]).nonzero(as_tuple=True)
        after = (rest_BE[row] == border_B[row]).nonzero()[:, 0] + groups * GROUP
        at_border = torch.cat([inside_G[group] * GROUP + entry, after])
        above = int((values_BK[row] > border_B[row]).sum())
        ids_BK[row, above:] = at_border[: k - above]
    return values_BK, ids_BK
