"""`align` against a slow oracle that follows the definition, on random tokenisations and on real tokenizers."""

import numpy as np
import pytest
from cache_making import cached_document, window_of
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.alignment import align
from storage_specs import cut_windows, render, text_document
from storage_specs.errors import ConfigError


def boundary_oracle(document, window):
    """Walk over the text byte by byte: what stands before byte b of a segment, and is it about to say something?"""
    dropped = {
        (int(s), int(b))
        for s, start, token, end in zip(
            window.segment, window.byte_start, window.token_start, window.is_end, strict=True
        )
        if not end
        for b in range(start, token)
    }

    def kept(segment, start, end):
        return [b for b in range(start, end) if (segment, b) not in dropped]

    pairs = []
    for row in range(len(window.segment)):
        segment, is_end = int(window.segment[row]), bool(window.is_end[row])
        for t in range(len(document.segment)):
            if int(document.segment[t]) != segment or bool(document.is_end[t]) != is_end:
                continue
            mine = kept(segment, int(window.token_start[row]), int(window.byte_end[row]))
            theirs = kept(segment, int(document.byte_start[t]), int(document.byte_end[t]))
            if is_end or (mine and theirs and mine[0] == theirs[0]):
                pairs.append((int(window.logits_index[row]), t))
    return pairs


def positional_oracle(document, windows):
    """The i-th row of a segment with the i-th, over all windows of the document."""
    seen: dict[int, int] = {}
    answers = []
    for window in windows:
        pairs = []
        for row, segment in enumerate(window.segment.tolist()):
            rows_of_segment = np.flatnonzero(document.segment == segment)
            ordinal = seen.get(segment, 0)
            seen[segment] = ordinal + 1
            if ordinal < len(rows_of_segment):
                pairs.append((int(window.logits_index[row]), int(rows_of_segment[ordinal])))
        answers.append(pairs)
    return answers


def random_rows(sizes, random, drops):
    """Rows over segments of these sizes: zero-width tokens, trailing bytes; with `drops` dropped bytes too."""
    rows, base = [], 0
    for segment, size in enumerate(sizes):
        previous = base
        while previous < base + size:
            start = previous
            if random.random() < 0.2:  # a token without bytes
                rows.append((segment, previous, previous, previous, False))
            if drops and random.random() < 0.25:
                start = random.randint(previous, base + size - 1)
            end = random.randint(start + 1, base + size)
            rows.append((segment, previous, start, end, False))
            previous = end
            if random.random() < 0.15:
                break  # trailing bytes without a token
        if random.random() < 0.7:
            rows.append((segment, base + size, base + size, base + size, True))
        base += size
    return rows


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=3), st.randoms(use_true_random=False), st.integers(2, 9))
def test_align_is_the_oracle(sizes, random, rows_per_window):
    document = cached_document(random_rows(sizes, random, drops=False))
    student = random_rows(sizes, random, drops=True)
    windows = [window_of(student, first, rows_per_window) for first in range(0, len(student), rows_per_window)]
    positional = positional_oracle(document, windows)
    for window, expected in zip(windows, positional, strict=True):
        assert list(zip(*(a.tolist() for a in align(document, window, "positional")), strict=True)) == expected
        index_N, row_N = align(document, window)
        assert index_N.dtype == row_N.dtype == np.int64
        assert list(zip(index_N.tolist(), row_N.tolist(), strict=True)) == boundary_oracle(document, window)


def test_dropped_spaces_are_one_place():
    """A teacher with ' ' tokens against a WordPiece student: the row before the word counts, not the one before ' '."""
    teacher = cached_document([(0, 0, 0, 3, False), (0, 3, 3, 4, False), (0, 4, 4, 7, False), (0, 7, 7, 7, True)])
    student = window_of([(0, 0, 0, 3, False), (0, 3, 4, 7, False), (0, 7, 7, 7, True)])
    assert [a.tolist() for a in align(teacher, student)] == [[0, 1, 2], [0, 2, 3]]


def test_the_end_of_a_turn_is_another_place_than_the_start_of_the_next():
    teacher = cached_document([(1, 5, 5, 9, False), (1, 9, 9, 9, True), (3, 9, 9, 12, False)])
    student = window_of([(1, 5, 5, 8, False), (1, 8, 8, 9, False), (3, 9, 9, 12, False), (3, 12, 12, 12, True)])
    assert [a.tolist() for a in align(teacher, student)] == [[0, 2], [0, 2]]


def test_nothing_to_pair_and_unknown_modes():
    empty, some = cached_document([]), window_of([(0, 0, 0, 4, False)])
    for mode in ("boundary", "positional"):
        assert [a.tolist() for a in align(empty, some, mode)] == [[], []]
    with pytest.raises(ConfigError, match="merge"):
        align(empty, some, "merge")


def test_real_tokenizers_on_real_text(gemma_tokenizer, smollm2_tokenizer, wiki_texts):
    """Every pair stands at the same byte of both tokenisations, and every byte that both have is a pair."""
    texts = [*wiki_texts[:8], "Zoë said:\r\n “naïve” 日本語 🧑🏽‍🚀  twice   spaced\u0000 e\u0301nd "]
    for text in texts:
        document = text_document(text)
        teacher = render(gemma_tokenizer, document)
        (rows,) = cut_windows(teacher, 10**6, 1)
        cached = cached_document(
            list(zip(rows.segment, rows.byte_start, rows.byte_start, rows.byte_end, rows.is_end, strict=True))
        )
        student = render(smollm2_tokenizer, document)
        starts = set(rows.byte_start[~rows.is_end & (rows.byte_end > rows.byte_start)].tolist())
        found = []
        windows = cut_windows(student, 64, 8)
        for window in windows:
            index_N, row_N = align(cached, window)
            own = np.searchsorted(window.logits_index, index_N)
            assert (window.byte_start[own] <= cached.byte_start[row_N]).all()
            assert (cached.byte_start[row_N] <= window.token_start[own]).all()
            assert (window.is_end[own] == cached.is_end[row_N]).all()
            found += row_N.tolist()
        assert found == sorted(set(found))
        content = [
            start
            for window in windows
            for start, end, is_end in zip(window.token_start, window.byte_end, window.is_end, strict=True)
            if not is_end and end > start
        ]
        assert len(found) == len(starts & set(content)) + 1  # and the end
        assert len(found) > (0.5 if "twice" in text else 0.7) * len(content)
