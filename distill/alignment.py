"""Which student position is compared with which teacher row. Pure numpy, no Python loop per token.

`boundary` (default): both models stand at the same (segment, byte), each about to predict what follows. Bytes that the
student's tokenizer dropped (`byte_start`..`token_start`) hold no position of the student, so the places before, inside
and behind them are one place. Where several rows stand on one place, the row before a token with bytes counts; rows
of invented, zero-width tokens never pair. End rows pair with the end row of the same segment, and with nothing else.

`positional` (Boizard et al., arXiv 2402.12030): the i-th row of a segment with the i-th, the longer side cut off.

Legend: R student rows of one window, T teacher rows of the document, N pairs, G dropped gaps.
"""

from typing import Literal, get_args

import numpy as np

from storage_specs.document import CachedDocument
from storage_specs.errors import ConfigError
from storage_specs.windows import Window

Mode = Literal["boundary", "positional"]
MODES: tuple[Mode, ...] = get_args(Mode)


def align(document: CachedDocument, window: Window, mode: Mode = "boundary") -> tuple[np.ndarray, np.ndarray]:
    """The pairs of one student window with its document's teacher rows, in text order.

    Returns (student_index_N, teacher_row_N), int64: positions in `window.ids` whose logits are compared (each is one of
    `window.logits_index`), and row numbers of the document. No position and no row occurs twice, and over all windows
    of a document no row does. Raises ConfigError for an unknown mode.
    """
    if mode == "boundary":
        student_R, teacher_T = _places(document, window)
    elif mode == "positional":
        first_T = np.searchsorted(document.segment, document.segment)
        student_R, teacher_T = window.row_in_segment, np.arange(len(first_T)) - first_T
    else:
        raise ConfigError(f"align is {mode!r}: must be one of {', '.join(MODES)}")
    stride = int(max(student_R.max(initial=0), teacher_T.max(initial=0))) + 1
    student_rows, teacher_rows = np.flatnonzero(student_R >= 0), np.flatnonzero(teacher_T >= 0)
    _, student_N, teacher_N = np.intersect1d(
        (window.segment * stride + student_R)[student_rows],
        (document.segment * stride + teacher_T)[teacher_rows],
        return_indices=True,
    )
    rows_N = student_rows[student_N]
    order_N = np.argsort(rows_N)
    return window.logits_index[rows_N[order_N]], teacher_rows[teacher_N[order_N]]


def _places(document: CachedDocument, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """(R,) and (T,) int64: where each row may pair inside its segment; -1 for rows that never do.

    The end is place 0; content places are 1 + the byte, not counting bytes that the student's tokenizer dropped.
    """
    gaps_R = ~window.is_end & (window.token_start > window.byte_start)
    gap_start_G, gap_end_G = window.byte_start[gaps_R], window.token_start[gaps_R]

    def places(start: np.ndarray, end: np.ndarray, is_end: np.ndarray) -> np.ndarray:
        start, end = (byte - _dropped_before(byte, gap_start_G, gap_end_G) for byte in (start, end))
        return np.where(is_end, 0, np.where(end > start, start + 1, -1))

    return (
        places(window.token_start, window.byte_end, window.is_end),
        places(document.byte_start, document.byte_end, document.is_end),
    )


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
