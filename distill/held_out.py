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
from distill.scoring import SharedSums, score, shared_sums, teacher_scores
from storage_specs.errors import AlignmentError
from storage_specs.reader import Cache

__all__ = ["held_out_documents", "held_out_figures", "held_out_sums"]


def held_out_documents(cache: Cache, excluded: Exclusions | None = None) -> CachedDocuments:
    """The documents of a cache that are never trained on, less those of a list. Raises AlignmentError for none."""
    documents = CachedDocuments(cache, held_out=True, excluded=excluded)
    if not len(documents):
        raise AlignmentError(
            f"cache {cache.path} has no held-out documents: cache more, or leave out --eval_strategy and --probe_steps"
        )
    return documents


def held_out_sums(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: CachedDocuments,
    config: DistillationConfig,
    accelerator: Accelerator,
) -> list[SharedSums]:
    """Nats of `student` and `teacher` over the bytes that both score, of each document that this rank has a share of.

    The model is put into evaluation mode meanwhile. Every rank must call.
    """
    numbers = range(len(documents))[: config.max_eval_documents]
    if _shared(accelerator):
        numbers = numbers[accelerator.process_index :: accelerator.num_processes]
    held_out = documents.readable(numbers)
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
    return shared_sums({"student": students, "teacher": [teacher_scores(document) for document in held_out]})


def held_out_figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: CachedDocuments,
    config: DistillationConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """{"bits_per_byte", "teacher_bits_per_byte", "documents"} over the bytes that student and teacher score.

    As `held_out_sums`; every rank gets the same figures. Raises AlignmentError where student and teacher score no byte
    between shared boundaries.
    """
    each = held_out_sums(model, tokenizer, documents, config, accelerator)
    rows = [[one.nats["student"], one.nats["teacher"], one.bytes, one.documents] for one in each]
    totals = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4).sum(0)
    if _shared(accelerator):
        totals = accelerator.reduce(totals.to(accelerator.device), "sum").cpu()
    student, teacher, size, count = totals.tolist()
    if not size:
        raise AlignmentError("there is not one held-out byte that student and teacher score between shared boundaries")
    bits = {METRIC: student / math.log(2) / size, f"teacher_{METRIC}": teacher / math.log(2) / size}
    return {**bits, "documents": int(count)}


def _shared(accelerator: Accelerator) -> bool:
    """Whether each rank scores a share of the documents."""
    return accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
