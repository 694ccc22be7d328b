"""How a student learns from a cache: alignment, losses, a Trainer.

The names below are the public ones; they are loaded when first used, so that `distill --help` never waits for torch.
"""

import importlib
from typing import Any

_HOME_OF = {
    "CachedDistillationTrainer": "trainer",
    "CachedDocuments": "dataset",
    "DistillationCollator": "collator",
    "DistillationConfig": "config",
    "EpochBatches": "sampler",
    "Exclusions": "exclusions",
    "LossMixture": "loss_mixture",
    "TeacherRows": "teacher_rows",
    "WordMap": "word_map",
    "align": "alignment",
    "chunk_logprobs": "likelihood",
    "hybrid_loss": "hybrid",
    "jsd_loss": "same_tokenizer",
    "kl_loss": "same_tokenizer",
    "likelihood_loss": "likelihood",
    "map_words": "word_map",
    "linear_uld_loss": "linear",
    "mapped_loss": "losses",
    "merged_uld_loss": "merged",
    "row_losses": "fused",
    "same_words": "word_map",
    "tempered": "temperature",
    "uld_loss": "losses",
}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"distill.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
