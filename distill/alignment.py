"""Which student position is compared with which teacher row. Pure numpy, no Python loop per token.

`boundary` (default): both models stand at the same (segment, byte), each about to predict what follows. Bytes that the
student's tokenizer dropped (`byte_start`..`token_start`) hold no position of the student, so the places before, inside
and behind them are one place. Where several rows stand on one place, the row before a token with bytes counts; rows
of invented, zero-width tokens never pair. End rows pair with the end row of the same segment, and with nothing else.

`positional` (Boizard et al., arXiv 2402.12030): the i-th row of a segment with the i-th, the longer side cut off.

`merge` (TRL's `bayesian`): a group opens where both sides begin a token at one place, and closes at the next place
where both end one. Its last rows are compared, each scaled by the probabilities of the tokens before it in the group
(`distill.merged`). Rows without bytes on a shared boundary are in no group, those inside a group count. A group that
never closes (the student's window ends inside it, one side stops earlier) is left out: at most one per window edge.

Rows of both sides must be in text order, as renderings and caches have them.

Legend: R student rows of one window, T teacher rows of the document, N pairs or groups, G dropped gaps.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from storage_specs.document import CachedDocument
from storage_specs.errors import ConfigError
from storage_specs.windows import Window

Mode = Literal["boundary", "positional", "merge"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Runs of rows over the same bytes, in text order; all (N,) int64, both ends of a run included.

    student_first, student_last: rows of the window (its `logits_index[row]` is the position). teacher_first,
    teacher_last: rows of the document.
    """

    student_first: np.ndarray
    student_last: np.ndarray
    teacher_first: np.ndarray
    teacher_last: np.ndarray

    def __len__(self) -> int:
        return len(self.student_first)

    @property
    def sizes(self) -> np.ndarray:
        """(N, 2) int64: student and teacher rows of every group."""
        return np.stack([self.student_last - self.student_first, self.teacher_last - self.teacher_first], axis=1) + 1


def align(document: CachedDocument, window: Window, mode: Mode = "boundary") -> tuple[np.ndarray, np.ndarray]:
    """The pairs of one student window with its document's teacher rows, in text order.

    Returns (student_index_N, teacher_row_N), int64: positions in `window.ids` whose logits are compared (each is one of
    `window.logits_index`), and row numbers of the document; with `merge` the last ones of every group. No position and
    no row occurs twice, and over all windows of a document no row does. Raises ConfigError for an unknown mode.
    """
    if mode == "merge":
        groups = align_groups(document, window)
        return window.logits_index[groups.student_last], groups.teacher_last
    if mode == "boundary":
        student, teacher = _places(document, window)
        rows_N, row_N = _shared(student.rows, student.start, teacher.rows, teacher.start)
    elif mode == "positional":
        first_T = np.searchsorted(document.segment, document.segment)
        ordinal_T = np.arange(len(first_T)) - first_T
        stride = int(max(window.row_in_segment.max(initial=0), ordinal_T.max(initial=0))) + 1
        rows_N, row_N = _shared(
            np.arange(len(window.segment)),
            window.segment * stride + window.row_in_segment,
            np.arange(len(first_T)),
            document.segment * stride + ordinal_T,
        )
    else:
        raise ConfigError(f"align is {mode!r}: must be one of {', '.join(MODES)}")
    return window.logits_index[rows_N], row_N


def align_groups(document: CachedDocument, window: Window) -> Groups:
    """The smallest runs of rows that begin and end at the same places on both sides."""
    student, teacher = _places(document, window)
    student_first, teacher_first = _shared(student.rows, student.start, teacher.rows, teacher.start)
    student_last, teacher_last = _shared(student.rows, student.end, teacher.rows, teacher.end)
    # Opens and closes alternate but at the edges: a close belongs to the last open before it, if none closed that.
    open_of_close = np.searchsorted(student_first, student_last, side="right") - 1
    _, first_close = np.unique(open_of_close, return_index=True)
    closes = first_close[open_of_close[first_close] >= 0]
    opens = open_of_close[closes]
    both = teacher_first[opens] <= teacher_last[closes]
    opens, closes = opens[both], closes[both]
    return Groups(
        student_first=student_first[opens],
        student_last=student_last[closes],
        teacher_first=teacher_first[opens],
        teacher_last=teacher_last[closes],
    )


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Rows that may pair, and where their tokens start and end, ascending: one number for segment and place."""

    rows: np.ndarray
    start: np.ndarray
    end: np.ndarray


def _places(document: CachedDocument, window: Window) -> tuple[_Places, _Places]:
    """Student's and teacher's: bytes, not counting those that the student's tokenizer dropped; ends behind them all."""
    gaps_R = ~window.is_end & (window.token_start > window.byte_start)
    gap_start_G, gap_end_G = window.byte_start[gaps_R], window.token_start[gaps_R]
    behind = int(max(window.byte_end.max(initial=0), document.byte_end.max(initial=0))) + 1

    def places(segment: np.ndarray, start: np.ndarray, end: np.ndarray, is_end: np.ndarray) -> _Places:
        start, end = (byte - _dropped_before(byte, gap_start_G, gap_end_G) for byte in (start, end))
        rows = np.flatnonzero(is_end | (end > start))
        base = segment[rows] * (behind + 2)
        start, end = (np.where(is_end, last, place)[rows] for place, last in ((start, behind), (end, behind + 1)))
        return _Places(rows=rows, start=base + start, end=base + end)

    return (
        places(window.segment, window.token_start, window.byte_end, window.is_end),
        places(document.segment, document.byte_start, document.byte_end, document.is_end),
    )


def _shared(
    rows_A: np.ndarray, places_A: np.ndarray, rows_B: np.ndarray, places_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both sides that stand at one place; places ascend strictly on each side."""
    if not len(places_B):
        return rows_A[:0], rows_B
    at_A = np.minimum(np.searchsorted(places_B, places_A), len(places_B) - 1)
    same_A = places_B[at_A] == places_A
    return rows_A[same_A], rows_B[at_A[same_A]]


def _dropped_before(byte: np.ndarray, gap_start_G: np.ndarray, gap_end_G: np.ndarray) -> np.ndarray:
    """How many bytes of the (ordered, disjoint) gaps lie before each byte."""
    lengths_G = gap_end_G - gap_start_G
    before = np.concatenate([[0], np.cumsum(lengths_G)])
    gap = np.searchsorted(gap_start_G, byte, side="right")
    if not len(gap_start_G):
        return np.zeros_like(byte)
    last = np.maximum(gap - 1, 0)
    # All gaps that began earlier, less what of the last one lies behind the byte.
    return before[gap] - np.where(gap > 0, np.maximum(gap_end_G[last] - byte, 0), 0)
