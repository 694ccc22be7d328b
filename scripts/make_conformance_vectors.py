"""What others compute under the name ULD, as small files: tests/conformance/*.npz, each with its provenance.

    pip install trl==1.16.0 && python scripts/make_conformance_vectors.py

paper            Nicolas-BZRD/llm-recipes 0bfcb37c, models/distillation_model.py, DistillationLoss: answers start at
                 the logits of the last masked label, i-th row with i-th row up to the shorter answer, softmax,
                 both sorted, zero-padded, L1, mean over rows, then over samples. Restated below, not copied.
trl_*            `ULDLoss` of the installed trl itself: {bayesian, observed}, with byte groups (extended) and without.
cdf              the L1 distance of running sums of the sorted rows, on the paper's rows.

A file has student_logits (B, S, V), teacher_logits (B, T, U), labels and ids (B, S) and (B, T), byte offsets
(B, S, 2) and (B, T, 2), loss, student_gradient (B, S, V), provenance; logits float32, loss and gradient of float64.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "tests" / "conformance"
IGNORED = -100
# Token ends in bytes of the answers, per sample: some tokens end together, some do not; then the first answer position.
STUDENT_ENDS, STUDENT_STARTS = ((2, 3, 6, 8, 9), (1, 4, 5, 7)), (3, 2)
TEACHER_ENDS, TEACHER_STARTS = ((2, 5, 6, 9), (1, 2, 4, 5, 7)), (2, 3)
STUDENT_SHAPE, TEACHER_SHAPE = (2, 9, 23), (2, 8, 31)


def one_side(shape: tuple[int, int, int], ends: tuple, starts: tuple, seed: int) -> tuple[np.ndarray, ...]:
    """logits, labels, ids, offsets of a batch."""
    generator = np.random.default_rng(seed)
    logits = (2.5 * generator.standard_normal(shape)).astype(np.float32)
    ids = generator.integers(0, shape[2], shape[:2])
    labels, offsets = np.full_like(ids, IGNORED), np.zeros((*shape[:2], 2), np.int64)
    for b, (answer_ends, start) in enumerate(zip(ends, starts, strict=True)):
        answer = slice(start, start + len(answer_ends))
        labels[b, answer] = ids[b, answer]
        offsets[b, answer] = np.stack([(0, *answer_ends[:-1]), answer_ends], 1)
    return logits, labels, ids, offsets


def rows_of(logits: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Per sample the distributions that predict its answer."""
    answers = []
    for logits_SV, labels_S in zip(logits, labels, strict=True):
        places = (labels_S != IGNORED).nonzero()[:, 0]
        answers.append(logits_SV[places - 1].softmax(1))
    return answers


def positional(distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def loss(student, teacher, student_labels, teacher_labels, *_) -> torch.Tensor:
        samples = []
        for q, p in zip(rows_of(student, student_labels), rows_of(teacher, teacher_labels), strict=True):
            size = min(len(q), len(p))
            width = max(q.shape[1], p.shape[1])
            both = [
                torch.nn.functional.pad(x[:size].sort(dim=1, descending=True).values, (0, width - x.shape[1]))
                for x in (q, p)
            ]
            samples.append(distance(*both).mean())
        return torch.stack(samples).mean()

    return loss


def trl_loss(extended: bool, strategy: str) -> Callable[..., torch.Tensor]:
    with warnings.catch_warnings():
        # "experimental", and which versions of vLLM it likes.
        warnings.simplefilter("ignore")
        from trl.experimental.gold.gold_trainer import ULDLoss

    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=extended,
        uld_token_merge_strategy=strategy,
    )
    return ULDLoss(config)


def main() -> None:
    from importlib.metadata import version

    trl = f"trl {version('trl')}, trl.experimental.gold.gold_trainer.ULDLoss, distillation part alone, no EOS skipped, "
    paper = "Nicolas-BZRD/llm-recipes 0bfcb37c models/distillation_model.py DistillationLoss, restated"
    makers = {
        "paper": (positional(lambda q, p: (q - p).abs().sum(1)), paper),
        "cdf": (
            positional(lambda q, p: (q.cumsum(1) - p.cumsum(1)).abs().sum(1)),
            "L1 of the running sums of sorted probabilities (as in Soup), on the rows of the paper's code",
        ),
    }
    for strategy in ("bayesian", "observed"):
        for extended in (False, True):
            name = f"trl_{strategy}" + ("_extended" if extended else "")
            makers[name] = trl_loss(extended, strategy), f"{trl}{strategy=}, {extended=}"
    student = one_side(STUDENT_SHAPE, STUDENT_ENDS, STUDENT_STARTS, seed=1)
    teacher = one_side(TEACHER_SHAPE, TEACHER_ENDS, TEACHER_STARTS, seed=2)
    inputs = {}
    for side, arrays in (("student", student), ("teacher", teacher)):
        inputs |= {
            f"{side}_{field}": a for field, a in zip(("logits", "labels", "ids", "offsets"), arrays, strict=True)
        }
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    FOLDER.mkdir(exist_ok=True)
    for name, (function, provenance) in makers.items():
        logits = tensors["student_logits"].double().requires_grad_()
        loss = function(
            logits,
            tensors["teacher_logits"].double(),
            *(tensors[f"{side}_{field}"] for field in ("labels", "ids", "offsets") for side in ("student", "teacher")),
        )
        loss.backward()
        found = {"loss": loss.detach().numpy(), "student_gradient": logits.grad.numpy()}
        np.savez_compressed(FOLDER / f"{name}.npz", **inputs, **found, provenance=np.array(provenance))
        print(f"{name:24s} {loss.item():.6f}  {provenance}")


if __name__ == "__main__":
    main()
