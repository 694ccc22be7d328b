"""Where student and teacher disagree about a document: nats of both over the same bytes, and the worst places.

Between two places where both tokenizers have a boundary lies a group: the smallest run of bytes to which both give a
likelihood. A document's disagreement is the mean over its bytes of what they differ by, group by group:

    disagreement = sum over groups |nats of the student - nats of the teacher| / ln 2 / bytes        (bits per byte)

Differences of both signs count, so that a document where the student is too sure here and lost there does not look
agreed upon; it is never less than the difference of the two bits per byte.

Where a cache holds ids, `different_words` is the total variation between the teacher's likeliest words, as student
words, and the student's, with everything else as one more word: the share of probability that the two put on
different words, at least.

Legend: G groups of one document, N compared rows, I ranks with ids.
"""

import math
from dataclasses import dataclass

import numpy as np

from distill.scoring import Scores, shared_boundaries

__all__ = ["SharedGroups", "Span", "different_words", "shared_groups", "worst_spans"]


@dataclass(frozen=True, kw_only=True)
class SharedGroups:
    """Groups in text order. segment, byte_start, byte_end: (G,) int64; student, teacher: (G,) float64 nats."""

    segment: np.ndarray
    byte_start: np.ndarray
    byte_end: np.ndarray
    student: np.ndarray
    teacher: np.ndarray

    @property
    def bytes(self) -> int:
        """Bytes that both score."""
        return int((self.byte_end - self.byte_start).sum())

    @property
    def bits_per_byte(self) -> tuple[float, float, float]:
        """Student's, teacher's, and the disagreement. Needs at least one byte."""
        scale = math.log(2) * self.bytes
        apart = np.abs(self.student - self.teacher).sum()
        return float(self.student.sum() / scale), float(self.teacher.sum() / scale), float(apart / scale)


@dataclass(frozen=True, kw_only=True)
class Span:
    """Adjoining groups about which the two differ. Bits of both."""

    segment: int
    byte_start: int
    byte_end: int
    student: float
    teacher: float


def shared_groups(student: Scores, teacher: Scores) -> SharedGroups:
    """The groups of one document; none where the two share no byte. Tokens without bytes belong to what stands before
    them, or to the first token, as in `scoring.summed`."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in SharedGroups.__dataclass_fields__}
    for segment, bytes_B in shared_boundaries([student, teacher]):
        columns["segment"].append(np.full(len(bytes_B) - 1, segment))
        columns["byte_start"].append(bytes_B[:-1])
        columns["byte_end"].append(bytes_B[1:])
        for name, scores in (("student", student), ("teacher", teacher)):
            columns[name].append(_nats_of_groups(scores, segment, bytes_B))
    empty = {"student": np.zeros(0), "teacher": np.zeros(0)}
    return SharedGroups(
        **{name: np.concatenate([empty.get(name, np.zeros(0, np.int64)), *parts]) for name, parts in columns.items()}
    )


def _nats_of_groups(scores: Scores, segment: int, bytes_B: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero((scores.segment == segment) & ~scores.is_end)
    group = np.searchsorted(bytes_B, scores.byte_end[rows]) - 1
    if scores.byte_start[rows].min() == bytes_B[0]:
        group = np.maximum(group, 0)
    inside = (group >= 0) & (group < len(bytes_B) - 1)
    return np.bincount(group[inside], weights=scores.nats[rows[inside]], minlength=len(bytes_B) - 1)


def worst_spans(groups: SharedGroups, count: int = 3) -> list[Span]:
    """The places where the two differ most, the largest first: a peak, and the groups beside it that differ in the same
    direction by at least half as much."""
    apart_G = groups.student - groups.teacher
    left_G, found = np.abs(apart_G), []
    while len(found) < count and left_G.max(initial=0) > 0:
        first = last = peak = int(left_G.argmax())

        def belongs(g: int, beside: int, peak: int = peak) -> bool:
            return (
                0 <= g < len(left_G)
                and left_G[g] > 0
                and groups.segment[g] == groups.segment[beside]
                and apart_G[g] / apart_G[peak] >= 0.5
            )

        while belongs(first - 1, first):
            first -= 1
        while belongs(last + 1, last):
            last += 1
        run = slice(first, last + 1)
        found.append(
            Span(
                segment=int(groups.segment[peak]),
                byte_start=int(groups.byte_start[first]),
                byte_end=int(groups.byte_end[last]),
                student=float(groups.student[run].sum() / math.log(2)),
                teacher=float(groups.teacher[run].sum() / math.log(2)),
            )
        )
        left_G[run] = 0
    return found


def different_words(words_NI: np.ndarray, teacher_NI: np.ndarray, student_NI: np.ndarray) -> np.ndarray:
    """(N,) float64 in [0, 1]: total variation, as above. words_NI: (N, I) int64, the student's word of each cached id,
    -1 for none; teacher_NI: (N, I) the ids' probabilities; student_NI: (N, I) the student's of the words."""
    known_NI = words_NI >= 0
    same_NII = (words_NI[:, :, None] == words_NI[:, None, :]) & known_NI[:, :, None] & known_NI[:, None, :]
    first_NI = known_NI & ~np.tril(same_NII, -1).any(2)  # several ids may begin with one word
    p_NI = np.where(first_NI, np.einsum("nij,nj->ni", same_NII, teacher_NI.astype(np.float64)), 0.0)
    q_NI = np.where(first_NI, student_NI.astype(np.float64), 0.0)
    rest_N = np.abs(p_NI.sum(1) - q_NI.sum(1))
    return (np.abs(p_NI - q_NI).sum(1) + rest_N) / 2
