"""`distill evaluate`: held-out bits per byte, the one figure that models with different tokenizers share.

Bits per byte = nats of the non-end tokens / ln 2 / the bytes they cover, over the bytes that the teacher and EVERY
model score (`distill.scoring`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distill.checkpoint import saving
from distill.dataset import CachedDocuments
from distill.scoring import Scores, score, summed, teacher_scores
from distill.students import load_model, load_tokenizer
from storage_specs.errors import AlignmentError, ConfigError


def evaluate(
    cache: str | Path,
    models: Mapping[str, str],
    *,
    max_length: int = 1024,
    batch_size: int = 8,
    max_documents: int | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """{name: {"bits_per_byte", "documents", "bytes", "cache_id"}} for every model of {name: hub name or folder}, and
    for "teacher", whose figures come from the cache.

    Documents are rendered by each model's own tokenizer and template (chats with `chat_template`, where given), longer
    ones cut into windows of `max_length` tokens. Raises AlignmentError where there are no held-out documents, or no
    bytes that all score, and ConfigError.
    """
    if max_length < 1 or batch_size < 1:
        raise ConfigError(f"max_length is {max_length} and batch_size {batch_size}: both must be at least 1")
    if max_documents is not None and max_documents < 0:
        raise ConfigError(f"max_documents is {max_documents}: must not be negative")
    documents = CachedDocuments(cache, held_out=True)
    cache_id = documents.cache.manifest.cache_id
    held_out = [documents[n] for n in range(len(documents))[:max_documents]]
    if not held_out:
        raise AlignmentError(f"cache {cache} has no held-out documents to evaluate on: cache more documents")
    scores = {}
    for name, path in models.items():
        tokenizer, model = load_tokenizer(path), load_model(path, "float32")
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        scores[name] = score(
            model,
            tokenizer,
            held_out,
            max_length=max_length,
            batch_size=batch_size,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            label=name,
        )
        del model
    scores["teacher"] = [teacher_scores(document) for document in held_out]
    return figures(scores, cache_id)


def figures(scores: Mapping[str, Sequence[Scores]], cache_id: str) -> dict[str, dict[str, Any]]:
    """Bits per byte of every model over the bytes that all of them score; `scores`: per model, one per document."""
    sums = summed(scores)
    if not sums.bytes:
        raise AlignmentError("there is not one byte that the teacher and all models score between shared boundaries")
    common = {"documents": sums.documents, "bytes": sums.bytes, "cache_id": cache_id}
    return {name: {"bits_per_byte": nats / math.log(2) / sums.bytes, **common} for name, nats in sums.nats.items()}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures for a terminal."""
    width = max(len(name) for name in (*rows, "model"))
    lines = [f"{name:<{width}}  {row['bits_per_byte']:>9.4f}" for name, row in rows.items()]
    common = next(iter(rows.values()))
    head = f"held out: {common['documents']} documents, {common['bytes']:,} bytes that all of them score"
    return "\n".join([head, f"{'model':<{width}}  bits/byte", *lines])


def write_figures(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the figures as JSON, atomically. Raises StorageFullError, OutputFolderError."""
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}")
        scratch.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
        scratch.replace(path)
