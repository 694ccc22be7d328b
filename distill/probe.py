"""What the teacher's losses do to CE and to held-out text, measured every `--probe_steps` steps by their gradients.

On one micro-batch of every rank, before a step, without taking one: gradients with respect to all trainable parameters
of CE (c), of each loss of the teacher's (k), of the whole mixture (m), and of CE on a held-out micro-batch (h).

    cosine      c.k / (|c| |k|)      1 = it teaches what CE teaches, 0 = something else, < 0 = against it
    norm ratio  |k| / |c|            times its weight: how hard it pulls beside CE of weight 1
    gain        h.c / (|h| |c|) and h.m / (|h| |m|): how much a short step along CE alone, and one along the mixture,
                lowers held-out CE, as a share of the most that a step of its length can (length times |h|, in nats per
                token). Of EQUAL length, because AdamW and gradient clipping take steps whose length does not follow
                the gradient's.

A mixture that gains less than CE alone makes held-out CE worse than CE alone would, at this point and to first order:
momentum, Adam's scaling and what a teacher's regularisation brings over many epochs are not seen. One micro-batch is
noisy, so a warning takes several probes: CE's lead must be 2.5 standard errors and more than a twentieth of its gain.
Real steps see more (`distill.look_ahead`), and where they are taken only they warn.
A run with probes takes the same steps as one without: random states and gradients are left as they were.
Cost of a probe: as many forward and backward passes as there are losses, and two; memory: two more gradients.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from distill.collator import Batch

__all__ = ["GradientProbe", "HarmWatch", "gradients_of", "random_states_kept"]

Gradient = list[torch.Tensor]


class GradientProbe:
    """parameters: the trainable ones. terms(batch): one forward pass, the (losses,) means of a batch, CE first; names
    and weights: of these losses."""

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        terms: Callable[[Batch], torch.Tensor],
        names: Sequence[str],
        weights: Sequence[float],
    ) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.terms, self.names, self.weights = terms, tuple(names), tuple(weights)

    def measure(self, batch: Batch, held_out: Batch) -> dict[str, float]:
        """`{name}_cosine` and `{name}_norm_ratio` of every loss but CE, `gain_ce`, `gain_mixture`; of the held-out
        batch `held_out_ce` (nats per token) and `held_out_norm` (|h|)."""

        def weighted(weights: Sequence[float]) -> Callable[[], torch.Tensor]:
            return lambda: _weighted(self.terms(batch), weights)

        one_hot = torch.eye(len(self.names)).tolist()
        held_out_ce, h = self._gradient(lambda: self.terms(held_out)[0])
        _, c = self._gradient(weighted(one_hot[0]))
        most, size = _dot(h, h) ** 0.5, _dot(c, c) ** 0.5
        found = {"held_out_ce": held_out_ce, "held_out_norm": most, "gain_ce": _ratio(_dot(h, c), most * size)}
        for n, name in enumerate(self.names[1:], 1):
            _, k = self._gradient(weighted(one_hot[n]))
            own = _dot(k, k) ** 0.5
            found |= {f"{name}_cosine": _ratio(_dot(c, k), size * own), f"{name}_norm_ratio": _ratio(own, size)}
            del k
        _, m = self._gradient(weighted(self.weights))
        return found | {"gain_mixture": _ratio(_dot(h, m), most * _dot(m, m) ** 0.5)}

    def _gradient(self, loss: Callable[[], torch.Tensor]) -> tuple[float, Gradient]:
        return gradients_of(loss, self.parameters)


def gradients_of(loss: Callable[[], torch.Tensor], parameters: Sequence[torch.nn.Parameter]) -> tuple[float, Gradient]:
    """The value of a loss and its gradients, through `backward`, so that wrappers (DDP, FSDP) do their part; gradients
    and random states are left as they were."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    with random_states_kept(parameters):
        value = loss()
        value.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient
    return value.item(), found


@contextmanager
def random_states_kept(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Dropout draws the same numbers in every pass, and the run's own go on where they were."""
    devices = {parameter.device for parameter in parameters if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        yield


def _dot(a: Gradient, b: Gradient) -> float:
    """The sum of products, in float32 per tensor and float64 over tensors; sharded tensors over all their ranks."""
    products = [(x.float() * y.float()).sum() for x, y in zip(a, b, strict=True)]
    products = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in products]
    return float(torch.stack([p.double() for p in products]).sum()) if products else 0.0


def _weighted(terms: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    return (terms.new_tensor(weights) * terms).sum()


def _ratio(value: float, by: float) -> float:
    return value / by if by else 0.0


@dataclass(frozen=True, kw_only=True)
class Harm:
    """Means over the probes that a warning speaks of. lead: how much larger CE's gain is, error: its standard one."""

    probes: int
    held_out_norm: float
    gain_ce: float
    gain_mixture: float
    lead: float
    error: float


_WATCHED = ("held_out_norm", "gain_ce", "gain_mixture")


class HarmWatch:
    """Tells when the mixture gains less on held-out text than CE alone, over the last probes and beyond their noise."""

    LEAST, MOST, ERRORS, SHARE = 5, 10, 2.5, 0.05

    def __init__(self) -> None:
        self.probes: deque[dict[str, float]] = deque(maxlen=self.MOST)

    def add(self, found: dict[str, float]) -> Harm | None:
        """One more probe, as `GradientProbe.measure` tells; where harm is seen, it is told and then looked for anew."""
        self.probes.append(found)
        n = len(self.probes)
        if n < self.LEAST:
            return None
        leads = [probe["gain_ce"] - probe["gain_mixture"] for probe in self.probes]
        lead = sum(leads) / n
        error = math.sqrt(sum((each - lead) ** 2 for each in leads) / (n - 1) / n)
        mean = {name: sum(probe[name] for probe in self.probes) / n for name in _WATCHED}
        if lead <= self.ERRORS * error or lead <= self.SHARE * abs(mean["gain_ce"]):
            return None
        self.probes.clear()
        return Harm(probes=n, lead=lead, error=error, **mean)


def warning(harm: Harm, mixture: str, learning_rate: float) -> str:
    """One line for the user. learning_rate: the run's peak, taken for the length of the step that is spoken of."""
    gains = (harm.gain_ce, harm.gain_mixture)
    told = [f"{gain * harm.held_out_norm * learning_rate:.2e} nats per token ({gain:.0%}" for gain in gains]
    return (
        f"warning: the teacher's losses harm on held-out text now: over the last {harm.probes} probes a step along CE "
        f"alone would lower held-out CE by {told[0]} of the most that a step of its length can), one along {mixture} "
        f"by {told[1]}; to first order, CE leads by {harm.lead / harm.error if harm.error else math.inf:.1f} standard "
        "errors). Try a smaller weight, another of --loss ce:1,mapped:1 (needs ids) and ce:1,uld:0.5, --align "
        "boundary, or CE alone, and compare them with --eval_strategy steps"
    )
