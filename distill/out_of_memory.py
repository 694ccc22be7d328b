"""A training run that its device's memory cannot hold: which batch it was, what was kept, and what to do."""

import gc
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING

import torch

from distill.collator import Batch
from storage_specs.device_memory import memory_for
from storage_specs.errors import TeachOnceError

if TYPE_CHECKING:
    from distill.trainer import CachedDistillationTrainer

SMALLER = (
    "half the --per_device_train_batch_size with twice the --gradient_accumulation_steps (still the same run), "
    "--gradient_checkpointing (too), or in a new --output_dir --bf16, --use_peft or a smaller --max_length"
)
SMALLER_EVALUATION = "a smaller --per_device_eval_batch_size, or no --look_ahead_steps"
NAMED = 8  # documents


def in_memory(
    trainer: "CachedDistillationTrainer", doing: str, remedy: str, *, whole: bool = True
) -> AbstractContextManager[None]:
    """Types what is raised inside for want of memory, once what was learned so far is saved. Raises DeviceMemoryError.

    doing: what takes the memory. whole: whether the weights are those after a whole step. Of several processes the
    others may be in the middle of something and cannot save with this one: there the last checkpoint counts.
    """

    def saved() -> str:
        if whole and trainer.accelerator.num_processes == 1:
            trainer.model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()  # does nothing where no GPU was used
            with suppress(RuntimeError, TeachOnceError):  # there may be no room for that either
                trainer.save_last_step()
        step = trainer.last_saved_step()
        goes_on = "begins again" if step is None else f"resumes after step {step}"
        return f"the same command {goes_on}: try {remedy}"

    return memory_for(doing, saved)


def micro_batch(batch: Batch, step: int) -> str:
    """What a micro-batch is, for a message. step: those finished before it."""
    rows, tokens = batch["input_ids"].shape
    doc_ids = batch["doc_ids"]
    named = ", ".join(doc_id[:12] for doc_id in doc_ids[:NAMED]) + (", ..." if len(doc_ids) > NAMED else "")
    return f"step {step + 1}, a micro-batch of {len(doc_ids)} documents in {rows} x {tokens} tokens ({named})"
