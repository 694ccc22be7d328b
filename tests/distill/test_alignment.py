"""`align` against a slow oracle that follows the definition, on random tokenisations and on real tokenizers."""

import numpy as np
import pytest
from cache_making import cached_document, window_of
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.alignment import align, align_groups
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


def merge_oracle(document, window):
    """Walk both token lists of a segment: open where both begin, extend the side that lags until both end together."""
    dropped = {
        (int(s), b)
        for s, start, token, end in zip(
            window.segment, window.byte_start, window.token_start, window.is_end, strict=True
        )
        if not end
        for b in range(int(start), int(token))
    }

    def tokens(side, start, segment):
        found = []
        for row in np.flatnonzero(side.segment == segment).tolist():
            bytes_kept = [b for b in range(int(start[row]), int(side.byte_end[row])) if (segment, b) not in dropped]
            if bytes_kept and not side.is_end[row]:
                found.append((bytes_kept[0], bytes_kept[-1], row))
        return found

    groups = []
    for segment in sorted(set(window.segment.tolist())):
        mine, theirs = tokens(window, window.token_start, segment), tokens(document, document.byte_start, segment)
        i = j = 0
        while i < len(mine) and j < len(theirs):
            if mine[i][0] != theirs[j][0]:
                i, j = (i + 1, j) if mine[i][0] < theirs[j][0] else (i, j + 1)
                continue
            first_i, first_j = i, j
            while i < len(mine) and j < len(theirs) and mine[i][1] != theirs[j][1]:
                i, j = (i + 1, j) if mine[i][1] < theirs[j][1] else (i, j + 1)
            if i < len(mine) and j < len(theirs):
                groups.append((mine[first_i][2], mine[i][2], theirs[first_j][2], theirs[j][2]))
            i, j = i + 1, j + 1
        ends = [np.flatnonzero((side.segment == segment) & side.is_end).tolist() for side in (window, document)]
        if all(ends):
            groups.append((ends[0][0], ends[0][0], ends[1][0], ends[1][0]))
    return groups


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
        groups = found_groups(document, window)
        assert groups == merge_oracle(document, window)
        index_N, row_N = align(document, window, "merge")
        assert index_N.tolist() == [int(window.logits_index[last]) for _, last, _, _ in groups]
        assert row_N.tolist() == [last for _, _, _, last in groups]


def found_groups(document, window):
    groups = align_groups(document, window)
    columns = (groups.student_first, groups.student_last, groups.teacher_first, groups.teacher_last)
    assert all(column.dtype == np.int64 for column in columns)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def content(*edges, segment=0, before=None):
    """Rows over these byte edges; `before` = where the first row's coordinate begins, if bytes were dropped."""
    starts = list(edges[:-1])
    befores = [starts[0] if before is None else before, *starts[1:]]
    return [(segment, b, s, e, False) for b, s, e in zip(befores, starts, edges[1:], strict=True)]


def test_groups_by_hand():
    teacher = cached_document([*content(0, 2, 5, 6, 9), (0, 9, 9, 9, True)])
    # two student tokens on two of the teacher's, one on one, one on one, the end on the end
    student = window_of([*content(0, 3, 5, 6, 9), (0, 9, 9, 9, True)])
    assert found_groups(teacher, student) == [(0, 1, 0, 1), (2, 2, 2, 2), (3, 3, 3, 3), (4, 4, 4, 4)]
    assert align_groups(teacher, student).sizes.tolist() == [[2, 2], [1, 1], [1, 1], [1, 1]]
    # BOS on the teacher's side only: the student's first token has no row
    assert found_groups(teacher, window_of(content(2, 5, 9))) == [(0, 0, 1, 1), (1, 1, 2, 3)]
    assert found_groups(teacher, window_of(content(3, 5, 9))) == [(1, 1, 2, 3)]
    # BOS on the student's side only
    late = cached_document(content(2, 5, 6, 9))
    assert found_groups(late, window_of(content(0, 2, 5, 9))) == [(1, 1, 0, 0), (2, 2, 1, 2)]
    # a student that ends earlier, on a boundary and inside a token
    assert found_groups(teacher, window_of(content(0, 2, 5))) == [(0, 0, 0, 0), (1, 1, 1, 1)]
    assert found_groups(teacher, window_of(content(0, 2, 4))) == [(0, 0, 0, 0)]
    # groups that never close, and sides without any row
    assert found_groups(teacher, window_of(content(0, 1, 8))) == []
    assert found_groups(cached_document([]), student) == []
    assert found_groups(teacher, window_of([])) == []
    # the end does not close what the content left open
    assert found_groups(teacher, window_of([*content(0, 1, 8), (0, 9, 9, 9, True)])) == [(2, 2, 4, 4)]


def test_groups_and_tokens_without_bytes():
    """On a boundary they are in no group; inside one they are a factor like any other."""
    teacher = cached_document([(0, 0, 0, 0, False), *content(0, 4), (0, 4, 4, 4, False), *content(4, 8)])
    assert found_groups(teacher, window_of(content(0, 4, 8))) == [(0, 0, 1, 1), (1, 1, 3, 3)]
    assert found_groups(teacher, window_of(content(0, 8))) == [(0, 0, 1, 3)]


def test_a_group_over_a_window_edge_is_left_out_and_nothing_else():
    teacher = cached_document(content(0, 3, 6, 9, 12))
    rows = content(0, 3, 5, 6, 9, 12)
    first, second = window_of(rows, 0, 2), window_of(rows, 2)
    assert found_groups(teacher, first) == [(0, 0, 0, 0)]
    assert found_groups(teacher, second) == [(1, 1, 2, 2), (2, 2, 3, 3)]


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
    for mode in ("boundary", "positional", "merge"):
        assert [a.tolist() for a in align(empty, some, mode)] == [[], []]
        assert [a.tolist() for a in align(cached_document([(0, 0, 0, 4, False)]), window_of([]), mode)] == [[], []]
    with pytest.raises(ConfigError, match="boundary, positional, merge"):
        align(empty, some, "observed")


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
