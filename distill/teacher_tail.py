"""The teacher's tail as power laws, on the student's device: `storage_specs.sketch.power_laws` in torch.

Legend: N rows, K head values, J tail bins, B levels.
"""

from typing import NamedTuple

import torch

from storage_specs.sketch import FLATTEST, NEAR_ONE, SMALLEST_MASS, STEEPEST

__all__ = ["TailLaws", "area_above", "tail_laws"]


class TailLaws(NamedTuple):
    """A bin's density is exp(log_start) (rank / first edge)^slope; edges_J1: its ends, ranks + 1/2; all float32."""

    slopes_NJ: torch.Tensor
    log_starts_NJ: torch.Tensor
    edges_J1: torch.Tensor


def tail_laws(probs_NK: torch.Tensor, bins_NJ: torch.Tensor, rank_edges: torch.Tensor) -> TailLaws:
    """Slope and starting log-density of every bin's power law, computed in float64.

    probs_NK: (N, K) descending. bins_NJ: (N, J) masses of the sorted tail between rank_edges, (J + 1,) integers, the
    first K, the last the teacher's vocabulary size.
    """
    edges = rank_edges.to(device=bins_NJ.device, dtype=torch.float64)
    masses = bins_NJ.double().clamp(min=SMALLEST_MASS)
    log_density = torch.log(masses / edges.diff())
    log_centre = 0.5 * (torch.log(edges[:-1] + 0.5) + torch.log(edges[1:] + 0.5))
    head_end = probs_NK[:, -1:].double().clamp(min=SMALLEST_MASS).log()
    steps = torch.cat([head_end, log_density], 1).diff(dim=1) / torch.cat([edges[:1].log(), log_centre]).diff()
    slopes = torch.cat([(steps[:, :-1] + steps[:, 1:]) / 2, steps[:, -1:]], 1).clamp(STEEPEST, FLATTEST)
    slopes = torch.where((slopes + 1).abs() < NEAR_ONE, -1 - NEAR_ONE, slopes)
    first, power = edges[:-1] + 0.5, slopes + 1
    unit_mass = first * (((edges[1:] + 0.5) / first) ** power - 1) / power
    log_starts = masses.log() - unit_mass.log()
    return TailLaws(slopes.float().contiguous(), log_starts.float().contiguous(), (edges + 0.5).float())


def area_above(log_level_NB: torch.Tensor, level_NB: torch.Tensor, laws: TailLaws) -> torch.Tensor:
    """(N, B) the tail's mass in values above each level, minus the level times their number."""
    area_NB = torch.zeros_like(level_NB)
    first_J, last_J = laws.edges_J1[:-1], laws.edges_J1[1:]
    for j in range(laws.slopes_NJ.shape[1]):
        slope_N1, log_start_N1 = laws.slopes_NJ[:, j, None], laws.log_starts_NJ[:, j, None]
        reach_NB = ((log_level_NB - log_start_N1) / slope_N1).clamp(min=0)
        reach_NB = torch.minimum(reach_NB, torch.log(last_J[j] / first_J[j]))
        power_N1 = slope_N1 + 1
        mass_NB = torch.exp(log_start_N1) * first_J[j] / power_N1 * (torch.exp(power_N1 * reach_NB) - 1)
        area_NB = area_NB + mass_NB - level_NB * first_J[j] * (torch.exp(reach_NB) - 1)
    return area_NB
