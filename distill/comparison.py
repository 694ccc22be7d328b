"""How much of a cache a student can learn from, measured on a sample before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill.collator import DistillationCollator
from storage_specs.document import CachedDocument
from storage_specs.errors import AlignmentError

SAMPLE_DOCUMENTS = 64


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Counts over sampled documents. mapped_*: shares of ids and of probability that find a student word, or None."""

    mode: str
    documents: int
    pairs: int
    teacher_rows: int
    student_positions: int
    mapped_ids: float | None
    mapped_mass: float | None
    cached_mass: float | None

    def __str__(self) -> str:
        text = (
            f"align {self.mode}: {self.pairs / max(1, self.teacher_rows):.1%} of the teacher's rows and "
            f"{self.pairs / max(1, self.student_positions):.1%} of the student's positions are compared "
            f"({self.documents} documents sampled)"
        )
        if self.mapped_ids is not None:
            text += (
                f"; {self.mapped_ids:.1%} of the teacher's ids and {self.mapped_mass:.1%} of its probability find a "
                f"student word (the cached ids hold {self.cached_mass:.1%})"
            )
        return text


def compare(documents: Sequence[CachedDocument], collator: DistillationCollator) -> Comparison:
    """Align the first documents as training would.

    Raises AlignmentError where not one position is compared, or not one word mapped for a loss that maps words.
    """
    sampled = pairs = teacher_rows = student_positions = 0
    masses: list[tuple[float, float, int]] = []
    for document in (documents[number] for number in range(min(len(documents), SAMPLE_DOCUMENTS))):
        batch = collator([document])
        sampled += 1
        pairs += len(batch["student_index_N"])
        teacher_rows += batch["teacher_rows"]
        student_positions += len(batch["label_index_R"])
        if collator.word_map is not None:
            ids_TI = document.token_ids
            mapped = collator.word_map.mapped_mass(ids_TI, document.probs)
            masses.append((mapped, float(document.probs[:, : ids_TI.shape[1]].sum(1).mean()), len(ids_TI)))
    if not pairs:
        raise AlignmentError(
            f"align {collator.config.align}: none of {student_positions} student positions and {teacher_rows} teacher "
            f"rows in {sampled} documents stand at the same place: the student's tokenizer shares no boundary with the "
            "cache's; try --align positional, or check that --model_name_or_path names the student you mean"
        )
    mapped_mass = cached_mass = None
    if masses and not any(mapped for mapped, _, _ in masses):
        raise AlignmentError(
            f"--loss {', '.join(collator.mixture.not_merged)}: not one of the teacher's likeliest words in {sampled} "
            f"documents is a word of this student ({collator.word_map.mapped_ids:.1%} of its whole vocabulary "
            f"is): with --mapping {collator.config.mapping} nothing would be learned; try --mapping first_token or "
            "--loss ce:1,uld:1.5, or check that --model_name_or_path names the student you mean"
        )
    if masses:
        mapped_T, cached_T, rows_T = np.array(masses).T
        mapped_mass, cached_mass = (float(np.average(share, weights=rows_T)) for share in (mapped_T, cached_T))
    return Comparison(
        mode=collator.config.align,
        documents=sampled,
        pairs=pairs,
        teacher_rows=teacher_rows,
        student_positions=student_positions,
        mapped_ids=None if collator.word_map is None else collator.word_map.mapped_ids,
        mapped_mass=mapped_mass,
        cached_mass=cached_mass,
    )
