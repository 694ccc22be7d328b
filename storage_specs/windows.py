"""Cut a document's tokens into windows that fit a model, so that every scored token is predicted exactly once.

Legend: P prefix tokens, T tokens of the document after its prefix, L tokens of one window, R rows of one window.
"""

from dataclasses import dataclass

import numpy as np

from storage_specs.errors import ConfigError
from storage_specs.rendering import TokenSequence


@dataclass(frozen=True, kw_only=True)
class Window:
    """One model input and the rows that are read from its logits.

    ids: (L,) int64 = the prefix, then a slice of the document. logits_index: (R,) int64, the position in `ids` whose
    logits predict the row's token: `ids[logits_index + 1] == target_ids`. segment, token_start, byte_start, byte_end:
    (R,) int64 and is_end: (R,) bool are the rows' coordinates. row_in_segment: (R,) int64, the row's number among all
    rows of its segment. first_row: rows in earlier windows of the document.
    """

    ids: np.ndarray
    logits_index: np.ndarray
    target_ids: np.ndarray
    segment: np.ndarray
    token_start: np.ndarray
    byte_start: np.ndarray
    byte_end: np.ndarray
    is_end: np.ndarray
    row_in_segment: np.ndarray
    first_row: int


def cut_windows(sequence: TokenSequence, capacity: int, overlap: int) -> list[Window]:
    """Windows of at most `capacity` tokens, prefix included, over the scored tokens of `sequence`, in order.

    Each window repeats the prefix and ends with its last row's token. A token after the first window has at least
    `overlap` tokens of the document before it. There are as few windows as that allows, and each is filled with as much
    context before its first row as it can hold. A first token without any prefix has nothing that predicts it, and no
    row. No rows, no windows.

    Raises ConfigError where `overlap` < 1 or `capacity` cannot hold the prefix, the overlap and one more token.
    """
    prefix = len(sequence.prefix_ids)
    if overlap < 1:
        raise ConfigError(f"window overlap is {overlap}: every window but the first needs at least 1 token of context")
    if capacity < prefix + overlap + 1:
        raise ConfigError(
            f"windows of {capacity} tokens cannot hold {prefix} prefix tokens, {overlap} tokens of overlap and a token "
            "to predict: raise --max-model-len or lower --window-overlap"
        )
    room = capacity - prefix
    rows_R = np.flatnonzero(sequence.scored)
    if prefix == 0:
        rows_R = rows_R[rows_R > 0]
    segment_R = sequence.segment[rows_R]
    row_in_segment_R = np.arange(len(rows_R)) - np.searchsorted(segment_R, segment_R)
    windows: list[Window] = []
    done = 0
    while done < len(rows_R):
        latest_start = 0 if rows_R[done] < room else int(rows_R[done]) - overlap
        stop = int(np.searchsorted(rows_R, latest_start + room))
        start = max(0, int(rows_R[stop - 1]) + 1 - room)  # unscored tokens behind the last row leave room for context
        windows.append(_window(sequence, start, rows_R[done:stop], row_in_segment_R[done:stop], first_row=done))
        done = stop
    return windows


def _window(
    sequence: TokenSequence, start: int, rows_R: np.ndarray, row_in_segment_R: np.ndarray, first_row: int
) -> Window:
    """The window that starts at token `start` and predicts the tokens `rows_R`."""
    prefix = len(sequence.prefix_ids)
    return Window(
        ids=np.concatenate([sequence.prefix_ids, sequence.ids[start : rows_R[-1] + 1]]),
        logits_index=prefix + rows_R - start - 1,  # THE shift: the logits of position i predict token i + 1
        target_ids=sequence.ids[rows_R],
        segment=sequence.segment[rows_R],
        token_start=sequence.token_start[rows_R],
        byte_start=sequence.byte_start[rows_R],
        byte_end=sequence.byte_end[rows_R],
        is_end=sequence.is_end[rows_R],
        row_in_segment=row_in_segment_R,
        first_row=first_row,
    )
