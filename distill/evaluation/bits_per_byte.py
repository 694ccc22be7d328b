"""Held-out bits per byte, the one figure that models with different tokenizers share.

Bits per byte = nats of the non-end tokens / ln 2 / the bytes they cover, over the bytes that the teacher and EVERY
model score (`distill.scoring`).
"""

import math
from collections.abc import Mapping, Sequence

from distill.dataset import CachedDocuments
from distill.evaluation.report import Metric
from distill.scoring import Scores, shared_sums, teacher_scores
from storage_specs.document import CachedDocument
from storage_specs.errors import AlignmentError

__all__ = ["TEACHER", "bits_per_byte", "held_out_of"]

TEACHER = "teacher"


def held_out_of(documents: CachedDocuments, max_documents: int | None = None) -> list[CachedDocument]:
    """The first so many. Raises AlignmentError where there is none."""
    held_out = [documents[n] for n in range(len(documents))[:max_documents]]
    if not held_out:
        raise AlignmentError(
            f"cache {documents.cache.path} has no held-out documents to evaluate on: cache more documents"
        )
    return held_out


def bits_per_byte(
    held_out: Sequence[CachedDocument], scores: Mapping[str, Sequence[Scores]]
) -> tuple[dict[str, Metric], dict[str, int]]:
    """({name: its bits per byte} of every model and of the teacher, {"documents", "bytes"}).

    scores: per model, one per held-out document; the teacher's come from the cache. A metric's examples are documents,
    weighted by their bytes. Raises AlignmentError where not one byte is scored by all.
    """
    everyone = {**scores, TEACHER: [teacher_scores(document) for document in held_out]}
    each = [sums for sums in shared_sums(everyone) if sums.bytes]
    if not each:
        raise AlignmentError("there is not one byte that the teacher and all models score between shared boundaries")
    metrics = {
        name: Metric.of(
            [sums.nats[name] / math.log(2) / sums.bytes for sums in each],
            weights=[sums.bytes for sums in each],
            unit="bits/byte",
            higher_is_better=False,
        )
        for name in everyone
    }
    return metrics, {"documents": len(each), "bytes": sum(sums.bytes for sums in each)}
