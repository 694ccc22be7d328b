"""Re-tempered rows against the whole distribution, tempered: inside the bound, or refused."""

import pytest
import torch

from distill.losses import TeacherRows, uld_loss
from distill.temperature import tempered
from storage_specs.errors import ConfigError
from storage_specs.sketch import bin_masses, log_rank_edges

U = 3000


def teacher_rows(k, bins=None, n=20):
    logits_NU = 3 * torch.randn(n, U, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sorted_NU = logits_NU.softmax(1).sort(dim=1, descending=True).values
    edges = None if bins is None else log_rank_edges(k, U, bins)
    teacher = TeacherRows(
        probs_NK=sorted_NU[:, :k],
        tail_N=sorted_NU[:, k:].sum(1),
        bins_NJ=None if bins is None else torch.from_numpy(bin_masses(sorted_NU.numpy(), edges)),
        gold_N=torch.zeros(n),
    )
    return sorted_NU, teacher, None if bins is None else torch.from_numpy(edges)


@pytest.mark.parametrize("temperature", [0.25, 0.7, 1.3, 2.0, 4.0])
@pytest.mark.parametrize("bins", [None, 4, 16, 48])
def test_the_truth_lies_within_the_bound(temperature, bins):
    k = 32
    sorted_NU, teacher, edges = teacher_rows(k, bins)
    truth_NU = sorted_NU ** (1 / temperature)
    truth_NU = truth_NU / truth_NU.sum(1, keepdim=True)
    rows, error_N = tempered(teacher, temperature, U, rank_edges=edges, largest_error=2)
    torch.testing.assert_close(rows.probs_NK.sum(1) + rows.tail_N, torch.ones(20, dtype=torch.float64))
    off_N = (rows.probs_NK - truth_NU[:, :k]).abs().sum(1) + (rows.tail_N - truth_NU[:, k:].sum(1)).abs()
    assert (off_N <= error_N + 1e-12).all()
    assert rows.gold_N is None
    # And so no loss computed with them is further off.
    logits_NV = 2 * torch.randn(20, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"reduction": "none", "student_temperature": temperature}
    ours_N = uld_loss(logits_NV, rows.probs_NK, rows.tail_N, **options)
    theirs_N = uld_loss(logits_NV, truth_NU[:, :k], truth_NU[:, k:].sum(1), **options)
    assert ((ours_N - theirs_N).abs() <= error_N + 1e-12).all()
    if bins is not None:
        torch.testing.assert_close(rows.bins_NJ.sum(1), rows.tail_N)


def test_more_bins_bound_tighter_and_the_whole_vocabulary_is_exact():
    widths = []
    for bins in (None, 2, 8, 32, 128):
        _, teacher, edges = teacher_rows(32, bins)
        widths.append(tempered(teacher, 2.0, U, rank_edges=edges, largest_error=2).error_N.mean())
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.05 < widths[0]
    sorted_NU, teacher, _ = teacher_rows(U)
    rows, error_N = tempered(teacher, 3.0, U)
    expected_NU = (sorted_NU.log() / 3).softmax(1)
    torch.testing.assert_close(rows.probs_NK, expected_NU)
    assert not error_N.any()


def test_temperature_one_changes_nothing_and_a_student_at_two_is_one_of_halved_logits():
    _, teacher, _ = teacher_rows(32)
    rows, error_N = tempered(teacher, 1.0, U)
    assert rows is teacher
    assert not error_N.any()
    logits_NV = torch.randn(20, 90)
    halved = uld_loss(logits_NV / 2, teacher.probs_NK, teacher.tail_N)
    torch.testing.assert_close(uld_loss(logits_NV, teacher.probs_NK, teacher.tail_N, student_temperature=2.0), halved)


def test_what_cannot_be_known_is_refused():
    _, teacher, _ = teacher_rows(32)
    with pytest.raises(ConfigError, match="use the tail bins"):
        tempered(teacher, 2.0, U)
    # Cold enough, the head says it all.
    assert tempered(teacher, 0.25, U).error_N.max() < 0.05
    _, sketched, edges = teacher_rows(32, 2)
    with pytest.raises(ConfigError, match="more bins"):
        tempered(sketched, 4.0, U, rank_edges=edges)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="must be finite"):
            tempered(teacher, wrong, U)
    with pytest.raises(ConfigError, match="have 32 ranks"):
        tempered(teacher, 2.0, 10)
    with pytest.raises(ConfigError, match="no tail bins"):
        tempered(teacher, 2.0, U, rank_edges=edges)
    with pytest.raises(ConfigError, match="do not fit"):
        tempered(sketched, 2.0, U + 1, rank_edges=edges)
