"""A trainer on the tiny cache, for tests."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill import CachedDistillationTrainer, CachedDocuments, DistillationConfig
from distill.evaluation.report import read_report

load_tokenizer = cache(AutoTokenizer.from_pretrained)


def config(output_dir: Path, **options: Any) -> DistillationConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "loss": "ce:1,uld:1.5",  # reads no ids, which not every cache here has
        "max_length": 48,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DistillationConfig(**(defaults | options))


def trainer(cache_path: Path, student_path: Path, output_dir: Path, **options: Any) -> CachedDistillationTrainer:
    args = config(output_dir, **options)
    model = AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32)
    documents = CachedDocuments(cache_path, ids=args.mixture.needs_ids)
    return CachedDistillationTrainer(model, args, documents, load_tokenizer(student_path))


def weights(one: CachedDistillationTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in one.model.state_dict().items()}


def bits_per_byte_in(report: Path) -> dict[str, float]:
    """{model: held-out bits per byte} of a report of `distill evaluate`."""
    return {name: model.metrics["bits_per_byte"].value for name, model in read_report(report).models.items()}
