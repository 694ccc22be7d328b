"""Ours against what others compute under the name ULD (files made by scripts/make_conformance_vectors.py).

The same where the table in `distill.losses` says so; where we differ on purpose, the difference is shown.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from reference_losses import cdf_distance, merged_rows, sorted_distance

from distill.losses import uld_loss

FOLDER = Path(__file__).parents[1] / "conformance"
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def load(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        vector = {key: file[key] for key in file.files}
    assert len(str(vector.pop("provenance"))) > 20
    tensors = {key: torch.from_numpy(array) for key, array in vector.items()}
    tensors["student_logits"] = tensors["student_logits"].double().requires_grad_()
    tensors["teacher_logits"] = tensors["teacher_logits"].double()
    return tensors


def answers(vector, side, shift):
    """Per sample (logits rows, ids, offsets) of the answer; shift -1: the rows that predict it."""
    for b, labels in enumerate(vector[f"{side}_labels"]):
        places = (labels != -100).nonzero()[:, 0]
        yield (
            vector[f"{side}_logits"][b, places + shift],
            vector[f"{side}_ids"][b, places],
            vector[f"{side}_offsets"][b, places],
        )


def ours(student_NV, teacher_NU):
    """K = the whole vocabulary of the teacher: no tail."""
    probs_NU = teacher_NU.softmax(1).sort(dim=1, descending=True).values
    return uld_loss(student_NV, probs_NU, torch.zeros(len(probs_NU), dtype=torch.float64))


def positional(vector, shift):
    samples = []
    for (student_NV, *_), (teacher_NU, *_) in zip(
        answers(vector, "student", shift), answers(vector, "teacher", shift), strict=True
    ):
        size = min(len(student_NV), len(teacher_NU))
        samples.append(ours(student_NV[:size], teacher_NU[:size]))
    return torch.stack(samples).mean()


def groups_of(student_ends, teacher_ends):
    """Positions of both sides between the bytes at which both end a token."""
    shared = [end for end in student_ends if end in teacher_ends]
    return [
        [
            [i for i, end in enumerate(ends) if low < end <= high]
            for low, high in zip([0, *shared], shared, strict=False)
        ]
        for ends in (student_ends, teacher_ends)
    ]


@pytest.mark.parametrize(("name", "shift"), [("paper", -1), ("trl_bayesian", -1), ("trl_observed", 0)])
def test_positional(name, shift):
    """The paper's code and TRL's `bayesian` are ours; `observed` is ours on logits one position too late."""
    vector = load(name)
    loss = positional(vector, shift)
    torch.testing.assert_close(loss, vector["loss"], **EXACT)
    loss.backward()
    torch.testing.assert_close(vector["student_logits"].grad, vector["student_gradient"], **EXACT)


def test_observed_is_off_by_one():
    """On the rows that do predict the answer's tokens, `observed` is another number."""
    vector = load("trl_observed")
    assert abs(positional(vector, -1) - vector["loss"]) > 0.005


@pytest.mark.parametrize(("strategy", "shift"), [("bayesian", -1), ("observed", 0)])
def test_extended(strategy, shift):
    """TRL's products over byte groups; where a group is one token on both sides they are our rows."""
    vector = load(f"trl_{strategy}_extended")
    samples, singles = [], 0
    for student, teacher in zip(answers(vector, "student", shift), answers(vector, "teacher", shift), strict=True):
        groups = groups_of(student[2][:, 1].tolist(), teacher[2][:, 1].tolist())
        student_GV, teacher_GU = (
            merged_rows(logits.softmax(1), ids.tolist(), of_side, strategy)
            for (logits, ids, _), of_side in zip((student, teacher), groups, strict=True)
        )
        distance_G = sorted_distance(student_GV, teacher_GU)
        samples.append(distance_G.mean())
        for g, (of_student, of_teacher) in enumerate(zip(*groups, strict=True)):
            ours_g = ours(student[0][of_student[-1:]], teacher[0][of_teacher[-1:]])
            if len(of_student) == len(of_teacher) == 1:
                singles += 1
                torch.testing.assert_close(ours_g, distance_G[g], **EXACT)
            else:
                # We compare whole distributions; a product with golds sums to less than 1.
                assert abs(ours_g - distance_G[g]) > 0.01
    assert singles >= 2
    loss = torch.stack(samples).mean()
    torch.testing.assert_close(loss, vector["loss"], **EXACT)
    loss.backward()
    torch.testing.assert_close(vector["student_logits"].grad, vector["student_gradient"], **EXACT)


def test_distance_of_running_sums_is_another_loss():
    vector = load("cdf")
    samples = []
    for (student_NV, *_), (teacher_NU, *_) in zip(
        answers(vector, "student", -1), answers(vector, "teacher", -1), strict=True
    ):
        size = min(len(student_NV), len(teacher_NU))
        samples.append(cdf_distance(student_NV[:size].softmax(1), teacher_NU[:size].softmax(1)).mean())
    torch.testing.assert_close(torch.stack(samples).mean(), vector["loss"], **EXACT)
    assert abs(positional(vector, -1) - vector["loss"]) > 0.01


def test_the_files_are_small():
    assert sum(file.stat().st_size for file in FOLDER.glob("*.npz")) < 100_000
