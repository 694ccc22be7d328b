"""Byte spans where a tokenizer altered the text: from its character offsets back to the original bytes.

Offsets name whole characters, so tokens that share characters form a group; inside a group the tokens' own bytes say
where each ends. Three repairs come first: offsets that were trimmed of their spaces, characters that normalisation
merged into their neighbour (a combining accent), and ranges that do not increase.

Legend: T tokens of one text, C its characters.
"""

import unicodedata
from collections.abc import Callable

import numpy as np

from storage_specs.token_table import TokenTable


def aligned_spans(
    table: TokenTable,
    text: str,
    data: bytes,
    ids_T: np.ndarray,
    added_T: np.ndarray,
    offsets_T2: np.ndarray,
) -> np.ndarray:
    """(T, 2) int64 byte spans from (T, 2) character offsets; `added_T` marks special tokens that stand for no text."""
    kept_N = np.flatnonzero(~added_T)
    starts_N, ends_N = offsets_T2[kept_N, 0].copy(), offsets_T2[kept_N, 1].copy()
    spelled_N = [table.bytes[token_id] or b"" for token_id in ids_T[kept_N].tolist()]
    if table.trims_offsets:
        _untrim(spelled_N, starts_N, ends_N)
    ends_N = np.minimum(np.maximum.accumulate(np.maximum(starts_N, ends_N)), len(text)) if len(ends_N) else ends_N
    starts_N = np.minimum(np.maximum.accumulate(starts_N), ends_N) if len(starts_N) else starts_N
    _take_merged_characters(table, text, starts_N, ends_N)
    byte_of_C = _byte_positions(data)
    spans_N2 = np.stack([byte_of_C[starts_N], byte_of_C[ends_N]], axis=1)
    _share_groups(data, spelled_N, spans_N2)
    # A special token that was added stands, without width, where the token before it ended.
    spans_T2 = np.zeros_like(offsets_T2)
    spans_T2[kept_N] = spans_N2
    ends_T = np.maximum.accumulate(spans_T2[:, 1])
    spans_T2[added_T] = ends_T[added_T, None]
    return spans_T2


def _byte_positions(data: bytes) -> np.ndarray:
    """(C + 1,) int64: the byte at which each character starts; the last entry is the end of the text."""
    bytes_N = np.frombuffer(data, dtype=np.uint8)
    return np.append(np.flatnonzero((bytes_N & 0xC0) != 0x80), len(data))


def _untrim(spelled_N: list[bytes], starts_N: np.ndarray, ends_N: np.ndarray) -> None:
    """Give back the spaces that the byte-level post-processor cut off the offsets, in place."""
    for n, spelled in enumerate(spelled_N):
        if spelled[:1] == b" " or spelled[-1:] == b" ":
            leading = len(spelled) - len(spelled.lstrip(b" "))
            previous = ends_N[n - 1] if n else 0
            starts_N[n] = max(starts_N[n] - leading, min(previous, starts_N[n]))
            if leading < len(spelled):
                ends_N[n] += len(spelled) - len(spelled.rstrip(b" "))


def _take_merged_characters(table: TokenTable, text: str, starts_N: np.ndarray, ends_N: np.ndarray) -> None:
    """Extend tokens over following characters that normalisation merged into them, in place.

    NFC makes one character of "e" and a combining accent, and its offsets name only the "e". The accent was not
    dropped: the text normalises to something else with it than without it, and not to the two pieces side by side.
    """
    normalizer = table.backend.normalizer
    if normalizer is None or not len(starts_N):
        return
    next_N = np.append(starts_N[1:], len(text))
    for n in np.flatnonzero((next_N > ends_N) & (ends_N > starts_N)).tolist():
        start, end, stop = int(starts_N[n]), int(ends_N[n]), int(next_N[n])
        if text[end].isspace():  # white space is never merged, only dropped
            continue
        stop = _merged_until(table.backend.normalizer.normalize_str, text, start, end, stop)
        if stop > end:
            ends_N[ends_N == end] = stop


def _merged_until(normalize: Callable[[str], str], text: str, start: int, end: int, stop: int) -> int:
    """The end of the characters from `end` on, before `stop`, that are merged into the token at [start, end).

    Marks behind them take part: NFC composes a letter with a mark further on and skips those between.
    """
    marks = stop
    while marks < len(text) and unicodedata.combining(text[marks]):
        marks += 1
    while end < stop and not text[end].isspace():
        token, character, rest = text[start:end], text[end], text[end + 1 : marks]
        together = normalize(token + character + rest)
        dropped = together == normalize(token + rest) and normalize(token + character) == normalize(token)
        if dropped or together == normalize(token) + normalize(character) + normalize(rest):
            break
        end += 1
    return end


def _share_groups(data: bytes, spelled_N: list[bytes], spans_N2: np.ndarray) -> None:
    """Share out the bytes of groups of tokens whose ranges overlap, in place."""
    if not len(spans_N2):
        return
    joined_N = spans_N2[1:, 0] < spans_N2[:-1, 1]  # token n + 1 starts before token n ends
    edges = np.flatnonzero(np.diff(np.concatenate([[False], joined_N, [False]]).astype(np.int8)))
    for first, last in edges.reshape(-1, 2).tolist():
        start, end = int(spans_N2[first, 0]), int(spans_N2[last, 1])
        lengths = _share(data[start:end], spelled_N[first : last + 1])
        position = start
        for n, (skip, length) in enumerate(lengths, first):
            spans_N2[n] = position + skip, position + skip + length
            position += skip + length


def _share(text: bytes, tokens: list[bytes]) -> list[tuple[int, int]]:
    """Per token of a group: (bytes skipped before it, bytes of its own), together within `text`.

    Tokens that spell the text from its start or its end have just those bytes. Between them, spaces that the text does
    not have are invented (zero width), and the first token of what remains has all the remaining bytes.
    """
    front = 0
    left = 0
    while left < len(tokens) and tokens[left] and text.startswith(tokens[left], front):
        front += len(tokens[left])
        left += 1
    back, right = len(text), len(tokens)
    while right > left and tokens[right - 1] and text.endswith(tokens[right - 1], front, back):
        back -= len(tokens[right - 1])
        right -= 1
    shares = [(0, len(token)) for token in tokens[:left]]
    rest = back - front
    for token in tokens[left:right]:
        invented = token == b" " and not text[front:back].startswith(b" ") and right - left > 1
        shares.append((0, 0 if invented else rest))
        rest = rest if invented else 0
    skipped = rest  # no token between: the bytes were dropped
    for token in tokens[right:]:
        shares.append((skipped, len(token)))
        skipped = 0
    return shares
