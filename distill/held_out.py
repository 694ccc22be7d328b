"""Held-out bits per byte of a student while it trains, by the scoring of `distill evaluate`.

Ranks of plain data parallelism share the documents; where a forward pass needs all ranks (FSDP) each scores them all.
"""

import math

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import METRIC, DistillationConfig
from distill.dataset import CachedDocuments
from distill.exclusions import Exclusions
from distill.scoring import score, summed, teacher_scores
from storage_specs.errors import AlignmentError
from storage_specs.reader import Cache

__all__ = ["held_out_documents", "held_out_figures"]


def held_out_documents(cache: Cache, excluded: Exclusions | None = None) -> CachedDocuments:
    """The documents of a cache that are never trained on, less those of a list. Raises AlignmentError for none."""
    documents = CachedDocuments(cache, held_out=True, excluded=excluded)
    if not len(documents):
        raise AlignmentError(
            f"cache {cache.path} has no held-out documents: cache more, or leave out --eval_strategy and --probe_steps"
        )
    return documents


def held_out_figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: CachedDocuments,
    config: DistillationConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """{"bits_per_byte", "teacher_bits_per_byte", "documents"} over the bytes that student and teacher score.

    The model is put into evaluation mode meanwhile. Every rank must call, and gets the same figures. Raises
    AlignmentError where student and teacher score no byte between shared boundaries.
    """
    numbers = range(len(documents))[: config.max_eval_documents]
    shared = accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if shared:
        numbers = numbers[accelerator.process_index :: accelerator.num_processes]
    held_out = [documents[number] for number in numbers]
    training = model.training
    model.eval()
    try:
        students = score(
            model,
            tokenizer,
            held_out,
            max_length=config.max_length,
            batch_size=config.per_device_eval_batch_size,
            chat_template=config.chat_template,
            chat_template_kwargs=config.chat_template_kwargs,
            label="held out",
        )
    finally:
        model.train(training)
    sums = summed({"student": students, "teacher": [teacher_scores(document) for document in held_out]})
    totals = torch.tensor([sums.nats["student"], sums.nats["teacher"], sums.bytes, sums.documents], dtype=torch.float64)
    if shared:
        totals = accelerator.reduce(totals.to(accelerator.device), "sum").cpu()
    student, teacher, size, count = totals.tolist()
    if not size:
        raise AlignmentError("there is not one held-out byte that student and teacher score between shared boundaries")
    bits = {METRIC: student / math.log(2) / size, f"teacher_{METRIC}": teacher / math.log(2) / size}
    return {**bits, "documents": int(count)}
