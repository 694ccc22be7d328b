"""What CE alone would do from here, and what the mixture does: `--look_ahead_steps` of each, then everything put back.

At an evaluation during training, on the run's next batches, by the run's own steps:

    mixture   what the run is about to do: held-out bits per byte as they will be after these steps
    CE alone  the same batches, random draws, learning rates, optimizer state and clipping, but the gradient is CE's,
              brought to the length that the mixture's has in that step. AdamW's second moments are the mixture's: a
              gradient of another length would be another learning rate, and that would be what is compared.

The difference is one of pairs, and so is its error: over documents that both arms were measured on. Not seen: what the
teacher's losses bring over many epochs; and both arms begin with the mixture's momentum.

Cost: twice these steps and two more evaluations. Memory: one copy of trainable weights, buffers and optimizer state on
the CPU (AdamW in float32: 12 bytes for each trainable parameter and process) and these batches; on the device no more
than a training step and an evaluation take. A run with look-aheads takes bitwise the same steps as one without, as far
as the device repeats itself at all. Ranks of plain data parallelism take their shares of all that; FSDP and DeepSpeed
are refused.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from distill.collator import Batch
from distill.config import METRIC, DistillationConfig
from distill.dataset import CachedDocuments
from distill.held_out import held_out_sums
from distill.loss_mixture import LossMixture
from distill.run_state import RunState, draws_kept
from distill.scoring import SharedSums
from distill.step_loss import StepLoss
from storage_specs.errors import ConfigError, NonFiniteLossError, TeachOnceError

if TYPE_CHECKING:
    from distill.trainer import CachedDistillationTrainer

__all__ = ["check_look_ahead", "look_ahead", "look_ahead_warning"]

CE, MIXTURE, DIFFERENCE, ERROR = (
    f"ahead_ce_{METRIC}",
    f"ahead_mixture_{METRIC}",
    "ahead_difference",
    "ahead_difference_error",
)
# Of a warning: standard errors, a share of what CE alone gains, look-aheads in a row, documents for an error to be one.
ERRORS, SHARE, IN_A_ROW, DOCUMENTS = 7.0, 0.05, 3, 10
# What can be copied whole on every rank, and put back.
_PARALLEL = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
_INSIDE_BACKWARD = ("lomo", "layerwise")  # optimizers that step there, with state where it cannot be found


def check_look_ahead(config: DistillationConfig, accelerator: Accelerator) -> None:
    """Raises ConfigError where a run's state cannot be copied and put back."""
    if accelerator.distributed_type not in _PARALLEL:
        raise ConfigError(
            f"look_ahead_steps is {config.look_ahead_steps}, but under {accelerator.distributed_type.value} no process "
            "holds the whole state that must be put back: leave it out (--probe_steps works there), or use DDP"
        )
    if any(name in config.optim for name in _INSIDE_BACKWARD):
        raise ConfigError(
            f"look_ahead_steps is {config.look_ahead_steps}, but the optimizer {config.optim.value} steps in the "
            "backward pass, from where nothing can be put back: leave one of the two out"
        )


def look_ahead(trainer: "CachedDistillationTrainer", documents: CachedDocuments) -> dict[str, float]:
    """Bits per byte after `look_ahead_steps` of each arm, MIXTURE's less CE's, and that difference's standard error.

    Every rank must call, and gets the same. {} where fewer steps are left, where a batch cannot be had (the run says
    why when it comes there), and where what an arm has learned is not finite.
    """
    args, state = trainer.args, trainer.state
    try:
        steps = trainer.stream.peek(state.global_step, state.max_steps, args.look_ahead_steps)
    except TeachOnceError:
        steps = []
    if trainer.over_ranks(torch.tensor([float(len(steps) < args.look_ahead_steps)])):
        return {}
    divisors = [trainer.over_ranks(sum(map(trainer.step_loss.weight_sums, step))).clamp(min=1) for step in steps]
    ce_only = copy.copy(args)
    ce_only.loss = "ce:1"
    lengths: list[torch.Tensor] = []
    arms = []
    kept = RunState(trainer.model, trainer.optimizer, trainer.lr_scheduler, trainer.accelerator.scaler)
    for step_loss in (trainer.step_loss, StepLoss(ce_only)):
        try:
            with _aside(trainer, step_loss), draws_kept(list(trainer.model.parameters())):
                asked = lengths or [None] * len(steps)
                lengths = [_step(trainer, *each) for each in zip(steps, divisors, asked, strict=True)]
            arms.append(_scored(trainer, documents))
        finally:
            kept.restore()
    return _compared(*arms, trainer.over_ranks)


@contextmanager
def _aside(trainer: "CachedDistillationTrainer", step_loss: StepLoss) -> Iterator[None]:
    """Steps by this loss, of which nothing is told."""
    before = trainer.step_loss
    trainer.step_loss, trainer.is_looking_ahead = step_loss, True
    try:
        yield
    finally:
        trainer.step_loss, trainer.is_looking_ahead = before, False


def _step(
    trainer: "CachedDistillationTrainer",
    batches: Sequence[Batch],
    divisor: torch.Tensor,
    length: torch.Tensor | None,
) -> torch.Tensor:
    """One optimisation step as `Trainer.train` takes it; returns the gradient's length before clipping. length: what
    it is brought to first."""
    model, accelerator = trainer.model_wrapped, trainer.accelerator
    for number, batch in enumerate(batches, 1):
        with nullcontext() if number == len(batches) else accelerator.no_sync(model):
            trainer.training_step(model, batch, divisor)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    own = accelerator.clip_grad_norm_(model.parameters(), math.inf)  # clips nothing; undoes a scaler's scale
    if length is None:
        length = own
    else:
        ratio = length / own
        torch._foreach_mul_(gradients, torch.where(ratio.isfinite(), ratio, 1.0))
    if trainer.args.max_grad_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), trainer.args.max_grad_norm, length)
    trainer.optimizer.step()
    scheduler = trainer.lr_scheduler
    follows_steps = isinstance(scheduler, LRScheduler) and not isinstance(scheduler, ReduceLROnPlateau)
    if follows_steps and not accelerator.optimizer_step_was_skipped:
        scheduler.step()
    model.zero_grad()
    return length


def _scored(trainer: "CachedDistillationTrainer", documents: CachedDocuments) -> list[SharedSums] | None:
    """This rank's held-out documents; None where what is said about one of them is no finite number."""
    try:
        return held_out_sums(trainer.model, trainer.processing_class, documents, trainer.args, trainer.accelerator)
    except NonFiniteLossError:
        return None


def _compared(
    mixture: Sequence[SharedSums] | None,
    ce: Sequence[SharedSums] | None,
    over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """The figures of both arms over all documents of all ranks. The difference is a ratio of sums over documents,
    nats to bytes; its error is the linearised one of such a ratio (Cochran, Sampling Techniques, 1977, chapter 6)."""
    sums = torch.full((7,), math.nan, dtype=torch.float64)
    if mixture is not None and ce is not None and len(mixture) == len(ce):  # a shard may have broken in between
        pairs = [(a.nats["student"], b.nats["student"], a.bytes) for a, b in zip(mixture, ce, strict=True) if a.bytes]
        mixture_D, ce_D, bytes_D = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 3).T
        apart_D = mixture_D - ce_D
        columns = [mixture_D, ce_D, bytes_D, apart_D**2, apart_D * bytes_D, bytes_D**2, torch.ones_like(bytes_D)]
        sums = torch.stack([column.sum() for column in columns])
    sums = over_ranks(sums)
    if not sums.isfinite().all():
        return {}
    mixture_nats, ce_nats, size, squares, products, square_bytes, count = sums.tolist()
    rate = (mixture_nats - ce_nats) / size
    spread = max(0.0, squares - 2 * rate * products + rate**2 * square_bytes) * count / max(1.0, count - 1)
    nats = {CE: ce_nats / size, MIXTURE: mixture_nats / size, DIFFERENCE: rate, ERROR: math.sqrt(spread) / size}
    return {name: value / math.log(2) for name, value in nats.items()}


def look_ahead_warning(history: Sequence[Mapping[str, float]], mixture: LossMixture) -> str | None:
    """One line for the user at the third, sixth, ... look-ahead in a row in which CE alone did better, beyond noise.

    history: a run's log, the newest line last; None where that is no look-ahead. The error over documents does not know
    that a look-ahead is one draw of batches, nor that four steps are few. On Wikipedia text, for a small student
    (scripts/results/look_ahead.csv), `mapped`, which pays there in the end, was worse by 3 to 5 of these errors in the
    mean over draws, ULD by 15 to 21, with a spread over draws of 2 to 5, once 11. So it takes 7, three times in a row.
    """
    lines = [line for line in history if f"eval_{DIFFERENCE}" in line]
    if not lines or lines[-1] is not history[-1]:
        return None
    row = len(list(takewhile(_is_worse, reversed(lines))))
    if not row or row % IN_A_ROW:
        return None
    ce, with_teacher, difference, error = (lines[-1][f"eval_{name}"] for name in (CE, MIXTURE, DIFFERENCE, ERROR))
    of_teacher = [f"{name}:{mixture[name] / 4:g}" for name in mixture.of_teacher]
    smaller = ",".join([f"ce:{mixture['ce'] or 1:g}", *of_teacher])
    tries = [f"a smaller weight (--loss {smaller})", "another --learning_rate", "CE alone (--loss ce:1)"]
    if not mixture["mapped"]:
        tries.insert(1, "--loss ce:1,mapped:1 (needs ids)")
    return (
        f"warning: the teacher's losses harm on held-out text now: a few steps of CE alone lead to {ce:.4f} bits per "
        f"byte, as many of {mixture} to {with_teacher:.4f}: {difference:.4f} more (standard error over documents "
        f"{error:.4f}), and so it was at {row} look-aheads in a row. Try {', '.join(tries[:-1])}, or {tries[-1]}, and "
        f"compare them by eval_{METRIC}"
    )


def _is_worse(line: Mapping[str, float]) -> bool:
    """Whether a look-ahead's difference is more than its noise, and more than nothing beside what CE alone gains."""
    difference, gain = line[f"eval_{DIFFERENCE}"], abs(line[f"eval_{METRIC}"] - line[f"eval_{CE}"])
    enough = line["eval_documents"] >= DOCUMENTS
    return enough and difference > ERRORS * line[f"eval_{ERROR}"] and difference > SHARE * gain
