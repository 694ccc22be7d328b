"""What a run tells of its steps: each term apart and the compared fractions, summed between two lines of the log."""

import time
from collections.abc import Callable, Sequence

import torch

from distill.collator import Batch

COUNTS = ("labels", "pairs", "teacher_rows", "tokens")
NO_COUNTS = torch.zeros(len(COUNTS), dtype=torch.float64)


def batch_counts(batch: Batch) -> torch.Tensor:
    """(4,) float64: `COUNTS` of one micro-batch, on the CPU."""
    counts = [
        len(batch["label_index_R"]),
        len(batch.get("student_index_N", ())),
        batch["teacher_rows"],
        batch["tokens"],
    ]
    return torch.tensor(counts, dtype=torch.float64)


class StepLog:
    """Sums since the last line, and the tokens since the process started. terms: how many are summed."""

    def __init__(self, terms: int) -> None:
        self.tokens_seen = 0
        self._sums = torch.zeros(terms)
        self._counts = NO_COUNTS.clone()
        self.steps = 0
        self._waited = 0.0
        self._since: float | None = None  # the first batch that was asked for, or the last line

    def add_wait(self, seconds: float) -> None:
        """Time that a step stood still because its batches were not ready, on this rank."""
        if self._since is None:
            self._since = time.perf_counter() - seconds
        self._waited += seconds

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
        """Means per step of the named terms, the compared fractions, and `data_wait`: the share of the time since the
        last line in which this rank waited for data. Then starts anew. Every rank must ask at the same step.
        """
        terms = over_ranks(self._sums).cpu() / self.steps
        labels, pairs, teacher_rows, _ = self._counts.tolist()
        line = dict(zip(names, terms.tolist(), strict=True))
        if with_teacher:
            line["compared_student"] = pairs / max(1, labels)
            line["compared_teacher"] = pairs / max(1, teacher_rows)
        now = time.perf_counter()
        line["data_wait"] = 0.0 if self._since is None else self._waited / (now - self._since)
        self._sums, self._counts, self.steps = torch.zeros_like(self._sums), 0 * self._counts, 0
        self._waited, self._since = 0.0, now
        return line | {"tokens": self.tokens_seen}
