"""What a run tells of its steps: each term apart and the compared fractions, summed between two lines of the log."""

from collections.abc import Callable, Sequence

import torch

from distill.collator import Batch

COUNTS = ("labels", "pairs", "teacher_rows", "tokens")


def batch_counts(batch: Batch) -> torch.Tensor:
    """(4,) float64: `COUNTS` of one micro-batch, on the CPU."""
    counts = [
        len(batch["label_index_R"]),
        len(batch.get("student_index_N", ())),
        batch["teacher_rows"],
        int(batch["attention_mask"].sum()),
    ]
    return torch.tensor(counts, dtype=torch.float64)


class StepLog:
    """Sums since the last line, and the tokens since the process started. terms: how many are summed."""

    def __init__(self, terms: int) -> None:
        self.tokens_seen = 0
        self._sums = torch.zeros(terms)
        self._counts = torch.zeros(len(COUNTS), dtype=torch.float64)
        self.steps = 0

    def add_counts(self, counts: torch.Tensor) -> None:
        """`COUNTS` of a whole step, of all ranks."""
        self.tokens_seen += int(counts[COUNTS.index("tokens")])
        self._counts += counts
        self.steps += 1

    def add_terms(self, terms: torch.Tensor) -> None:
        """Terms of one micro-batch of this rank, divided as the loss is; stays on their device."""
        self._sums = self._sums.to(terms.device) + terms.detach()

    def line(
        self,
        names: Sequence[str],
        over_ranks: Callable[[torch.Tensor], torch.Tensor],
        with_teacher: bool,
    ) -> dict[str, float]:
        """Means per step of the named terms, then starts anew. Every rank must ask at the same step."""
        terms = over_ranks(self._sums).cpu() / self.steps
        labels, pairs, teacher_rows, _ = self._counts.tolist()
        line = dict(zip(names, terms.tolist(), strict=True))
        if with_teacher:
            line["compared_student"] = pairs / max(1, labels)
            line["compared_teacher"] = pairs / max(1, teacher_rows)
        self._sums, self._counts, self.steps = torch.zeros_like(self._sums), 0 * self._counts, 0
        return line | {"tokens": self.tokens_seen}
