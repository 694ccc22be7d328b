"""Disagreement of a document: against loops over tokens and dictionaries of words."""

import math
from itertools import pairwise

import numpy as np
import pytest

from distill.review.disagreement import SharedGroups, different_words, shared_groups, worst_spans
from distill.scoring import Scores, summed


def scores_of(tokens: list[tuple[int, int, int]], nats: list[float], ends: int = 0) -> Scores:
    """Tokens as (segment, byte_start, byte_end); the last `ends` are end rows."""
    segment, start, end = np.array(tokens, dtype=np.int64).T
    is_end = np.arange(len(tokens)) >= len(tokens) - ends
    return Scores(segment=segment, byte_start=start, byte_end=end, is_end=is_end, nats=np.array(nats, dtype=np.float64))


def naive_groups(student: Scores, teacher: Scores) -> list[tuple[int, int, int, float, float]]:
    """(segment, start, end, nats of both) between neighbouring places where both have a boundary, byte by byte."""
    found = []
    for segment in sorted({*student.segment.tolist()} & {*teacher.segment.tolist()}):
        sides = []
        for scores in (student, teacher):
            columns = (scores.segment, scores.byte_start, scores.byte_end, scores.nats, scores.is_end)
            rows = zip(*(column.tolist() for column in columns), strict=True)
            sides.append([(a, b, nats) for where, a, b, nats, is_end in rows if where == segment and not is_end])
        latest = max(min(a for a, _, _ in side) for side in sides)
        places = set.intersection(*({place for a, b, _ in side for place in (a, b)} for side in sides))
        places = sorted(place for place in places if place >= latest)
        for start, end in pairwise(places):
            sums = []
            for side in sides:
                opens = start == min(a for a, _, _ in side) and start == places[0]
                sums.append(sum(n for a, b, n in side if start < b <= end or (opens and a == b == start)))
            found.append((segment, start, end, *sums))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_the_naive_ones_and_add_up_to_the_bits_per_byte(seed):
    random = np.random.default_rng(seed)

    def side() -> Scores:
        tokens = []
        for segment, first, last in ((0, 0, 30), (2, 30, 55)):
            cuts = np.flatnonzero(random.random(last - first) < 0.5) + first
            places = sorted({last, *cuts.tolist(), *([first] if random.random() < 0.5 else [])})
            tokens += [(segment, a, b) for a, b in pairwise(places)]
            tokens += [(segment, place, place) for place in random.choice(places, 2).tolist()]  # tokens without bytes
        tokens.sort()
        return scores_of([*tokens, (2, 55, 55)], random.exponential(size=len(tokens) + 1).tolist(), ends=1)

    student, teacher = side(), side()
    groups = shared_groups(student, teacher)
    naive = naive_groups(student, teacher)
    columns = (groups.segment, groups.byte_start, groups.byte_end)
    assert [*zip(*(column.tolist() for column in columns), strict=True)] == [each[:3] for each in naive]
    np.testing.assert_allclose(groups.student, [each[3] for each in naive])
    np.testing.assert_allclose(groups.teacher, [each[4] for each in naive])
    sums = summed({"student": [student], "teacher": [teacher]})
    assert groups.bytes == sums.bytes > 0
    bits = [sums.nats[name] / math.log(2) / sums.bytes for name in ("student", "teacher")]
    apart = sum(abs(each[3] - each[4]) for each in naive) / math.log(2) / sums.bytes
    np.testing.assert_allclose(groups.bits_per_byte, [*bits, apart])
    assert apart >= abs(bits[0] - bits[1]) - 1e-12


def test_nothing_shared_is_no_group():
    groups = shared_groups(scores_of([(0, 0, 3)], [1]), scores_of([(1, 3, 9)], [1]))
    assert groups.bytes == 0
    assert worst_spans(groups) == []


def test_worst_places_are_peaks_with_what_differs_beside_them_in_the_same_direction():
    apart = np.array([0.0, 3.0, 4.0, 2.0, 1.0, -5.0, -2.6, 4.0, 0.1])
    groups = SharedGroups(
        segment=np.array([0, 0, 0, 0, 0, 0, 0, 1, 1]),
        byte_start=np.arange(0, 18, 2),
        byte_end=np.arange(2, 20, 2),
        student=math.log(2) * (apart + 6),
        teacher=np.full(9, math.log(2) * 6),
    )
    spans = worst_spans(groups)
    assert [(span.segment, span.byte_start, span.byte_end) for span in spans] == [(0, 10, 14), (0, 2, 8), (1, 14, 16)]
    assert spans[1].student == pytest.approx(3 + 4 + 2 + 18)
    assert spans[1].teacher == pytest.approx(18)
    assert len(worst_spans(groups, 99)) == 5  # the group about which both agree is nobody's worst place


def test_different_words_is_the_total_variation_over_words():
    random = np.random.default_rng(0)
    words_NI = random.integers(-1, 4, (50, 6))  # several ids begin with one word, some have none
    teacher_NI = random.dirichlet(np.ones(7), 50)[:, :6]
    student_NV = random.dirichlet(np.ones(9), 50)
    listed_NI = np.take_along_axis(student_NV, np.maximum(words_NI, 0), 1)
    for n, found in enumerate(different_words(words_NI, teacher_NI, listed_NI)):
        teacher = dict.fromkeys(sorted({*words_NI[n].tolist()} - {-1}), 0.0)
        for word, probability in zip(words_NI[n].tolist(), teacher_NI[n].tolist(), strict=True):
            if word >= 0:
                teacher[word] += probability
        student = {word: student_NV[n, word] for word in teacher}
        apart = sum(abs(teacher[word] - student[word]) for word in teacher)
        rest = abs((1 - sum(teacher.values())) - (1 - sum(student.values())))
        assert found == pytest.approx((apart + rest) / 2)
        assert 0 <= found <= 1
