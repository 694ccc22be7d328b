"""The loss of one micro-batch: every term's weighted sum over rows, in one pass over the logits.

Legend: R labels, N compared rows, M tokens before the last of their group, K ranks, I mapped ranks, V student words.
"""

from typing import Any

import torch

from distill.collator import Batch
from distill.config import DistillationConfig
from distill.fused import row_losses
from distill.merged import log_scale_of, merged_uld_loss
from distill.teacher_rows import TeacherRows

# What is summed over rows; the last is no loss but how far ULD may be off: the mean width of its certificate.
TERMS = ("ce", "uld", "mapped", "uld_width")


class StepLoss:
    """The terms of a configuration, as weighted sums over a batch of `DistillationCollator`."""

    def __init__(self, config: DistillationConfig) -> None:
        self.config = config

    @property
    def term_weights(self) -> list[float]:
        """The weight of each of `TERMS` in the loss."""
        return [self.config.ce_weight, self.config.uld_weight, self.config.mapped_weight, 0.0]

    @property
    def log_weights(self) -> list[float]:
        """Terms whose weight here is 0 are not logged; CE always is."""
        return [1.0, self.config.uld_weight, self.config.mapped_weight, self.config.uld_weight]

    def weight_sums(self, batch: Batch) -> torch.Tensor:
        """(2,) float64: the weights of a micro-batch's labels and compared rows."""
        samples = (batch["label_sample_R"], batch.get("sample_N", batch["label_sample_R"][:0]))
        return torch.stack([self._row_weights(sample).sum() for sample in samples])

    def terms(self, logits_RV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(4,) float32 weighted sums over rows of `TERMS`; logits at the batch's labels. Terms of weight 0 are 0."""
        if self.config.align == "merge" and self.config.kd_weight:
            return self._merged_terms(logits_RV, batch)
        rows: dict[str, Any] = {}
        kd_weight_R = logits_RV.new_zeros(len(logits_RV), dtype=torch.float32)
        if self.config.kd_weight:
            # The teacher's rows at the compared ones of the R labels; nothing, of weight 0, at the others. No label is
            # compared twice.
            compared_N = torch.searchsorted(batch["label_index_R"], batch["student_index_N"])
            kd_weight_R[compared_N] = self._row_weights(batch["sample_N"]).float()
            probs_NK, tail_N = batch["teacher_probs_NK"], batch["teacher_tail_N"]
            probs_RK = probs_NK.new_zeros(len(logits_RV), probs_NK.shape[1]).index_copy_(0, compared_N, probs_NK)
            tail_R = tail_N.new_ones(len(logits_RV)).index_copy_(0, compared_N, tail_N)
            rows = {"teacher": TeacherRows(probs_NK=probs_RK, tail_N=tail_R), "uld": self.config.uld_weight > 0}
            if self.config.mapped_weight:
                words_NI = batch["words_NI"]
                words_RI = words_NI.new_full((len(logits_RV), words_NI.shape[1]), -1)
                rows["words_NI"] = words_RI.index_copy_(0, compared_N, words_NI)
        losses = row_losses(logits_RV, labels_N=batch["label_ids_R"], **rows)
        ce = (self._row_weights(batch["label_sample_R"]).float() * losses.ce_N).sum()
        uld_width_R = None if losses.uld_N is None else losses.upper_N - losses.lower_N
        compared = [
            ce.new_zeros(()) if loss_R is None else (kd_weight_R * loss_R).sum()
            for loss_R in (losses.uld_N, losses.mapped_N, uld_width_R)
        ]
        return torch.stack([ce, *compared])

    def _row_weights(self, sample_R: torch.Tensor) -> torch.Tensor:
        """(R,) float64: 1 per row, or with `samples` 1 per document, shared by its rows."""
        if self.config.loss_normalization == "tokens":
            return torch.ones(len(sample_R), dtype=torch.float64, device=sample_R.device)
        rows_per_sample = torch.bincount(sample_R).clamp(min=1)
        return 1 / rows_per_sample[sample_R].to(torch.float64)

    def _merged_terms(self, logits_RV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """As `terms`, with groups for rows: CE's own log-probabilities are the factors of a group."""
        nats_R = row_losses(logits_RV, labels_N=batch["label_ids_R"]).ce_N
        weight_N = self._row_weights(batch["sample_N"]).float()
        earlier_M = torch.searchsorted(batch["label_index_R"], batch["earlier_index_M"])
        last_N = torch.searchsorted(batch["label_index_R"], batch["student_index_N"])
        uld, certificate = merged_uld_loss(
            logits_RV.index_select(0, last_N),
            log_scale_of(-nats_R[earlier_M], batch["earlier_group_M"], len(last_N)),
            batch["teacher_probs_NK"],
            batch["teacher_tail_N"],
            weight_N,
            reduction="sum",
        )
        ce = (self._row_weights(batch["label_sample_R"]).float() * nats_R).sum()
        width = (weight_N * (certificate.upper_N - certificate.lower_N)).sum()
        return torch.stack([ce, uld, ce.new_zeros(()), width])
