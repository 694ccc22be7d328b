"""The loss of one micro-batch: every term's weighted sum over rows, in one pass over the logits.

CE, ULD, `mapped` and KL come out of the fused pass; `likelihood` is made of its cross entropies, JSD and `hybrid` of
them and of one gather each. `merge` compares groups, whose last rows are taken out of the logits once.

Legend: R labels, N compared rows, M tokens of groups or chunks, G chunks, K ranks, I mapped ranks, V student words.
"""

from collections.abc import Sequence

import torch

from distill.collator import Batch
from distill.config import DistillationConfig
from distill.fused import RowLosses, row_losses
from distill.hybrid import rest_words, sorted_rest
from distill.likelihood import chunk_logprobs, likelihood_loss
from distill.listed_words import listed_logprobs
from distill.merged import log_scale_of, merged_uld_loss
from distill.same_tokenizer import jsd_rows
from distill.teacher_rows import TeacherRows

# What a term is a mean over.
UNITS = ("labels", "pairs", "chunks")
# Losses in the fused pass that read the teacher's words.
_WORDS = ("mapped", "hybrid", "kl")
# How far a loss may be from that over whole vocabularies, the mean width of its certificate: no loss, but logged.
WIDTHS = {"uld": "uld_width", "hybrid": "hybrid_width"}


class StepLoss:
    """The terms of a configuration, as weighted sums over a batch of `DistillationCollator`.

    names: CE (always computed), the mixture's other losses, then widths of certificates. rank_edges: (J + 1,) of a
    cache with a sketch.
    """

    def __init__(self, config: DistillationConfig, rank_edges: Sequence[int] | None = None) -> None:
        self.config = config
        self.mixture = config.mixture
        self.losses = ("ce", *self.mixture.of_teacher)
        self.names = (*self.losses, *(WIDTHS[name] for name in self.losses if name in WIDTHS))
        self.rank_edges = None if rank_edges is None else torch.tensor(list(rank_edges))

    @property
    def term_weights(self) -> list[float]:
        """The weight of each of `names` in the loss."""
        return [self.mixture[name] for name in self.names]

    @property
    def units(self) -> list[int]:
        """Which of `UNITS` each of `names` is divided by."""
        of_name = {"ce": "labels", "likelihood": "chunks"}
        return [UNITS.index(of_name.get(name, "pairs")) for name in self.names]

    def weight_sums(self, batch: Batch) -> torch.Tensor:
        """(3,) float64: the weights of a micro-batch's labels, compared rows and chunks."""
        nothing = batch["label_sample_R"][:0]
        samples = [batch.get(name, nothing) for name in ("label_sample_R", "sample_N", "chunk_sample_G")]
        return torch.stack([self._row_weights(sample).sum() for sample in samples])

    def terms(self, logits_RV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(len(names),) float32 weighted sums over rows; logits at the batch's labels."""
        merged = self.config.align == "merge"
        rows = {} if merged else self._rows_at_labels(batch)
        losses = row_losses(logits_RV, labels_N=batch["label_ids_R"], **rows)
        sums = {"ce": (self._row_weights(batch["label_sample_R"]).float() * losses.ce_N).sum()}
        if self.mixture["likelihood"]:
            sums["likelihood"] = self._likelihood(losses.ce_N, batch)
        if merged and self.mixture["uld"]:
            sums |= self._merged(logits_RV, losses.ce_N, batch)
        elif rows:
            compared_N, weight_N = self._at_labels(batch, batch["student_index_N"]), self._weights(batch, "sample_N")
            for name, loss_R in self._compared(logits_RV, losses, rows, batch).items():
                sums[name] = (weight_N * loss_R[compared_N]).sum()
        return torch.stack([sums[name] for name in self.names])

    def _rows_at_labels(self, batch: Batch) -> dict[str, object]:
        """The teacher's rows at the compared ones of the R labels; nothing, of weight 0, at the others. No label is
        compared twice."""
        if not set(self.losses) - {"ce", "likelihood"}:
            return {}
        compared_N, labels = self._at_labels(batch, batch["student_index_N"]), len(batch["label_index_R"])

        def spread(name: str, fill: float) -> torch.Tensor | None:
            if name not in batch:
                return None
            column = batch[name]
            return column.new_full((labels, *column.shape[1:]), fill).index_copy_(0, compared_N, column)

        teacher = TeacherRows(
            probs_NK=spread("teacher_probs_NK", 0),
            tail_N=spread("teacher_tail_N", 1),
            bins_NJ=spread("teacher_bins_NJ", 0),
        )
        rows: dict[str, object] = {"teacher": teacher, "uld": self.mixture["uld"] > 0}
        if rows["uld"] and self.rank_edges is not None:
            rows["rank_edges"] = self.rank_edges
        if self.mixture.needs_ids:
            rows["words_NI"] = spread("words_NI", -1)
        return rows

    def _compared(
        self, logits_RV: torch.Tensor, losses: RowLosses, rows: dict[str, object], batch: Batch
    ) -> dict[str, torch.Tensor]:
        """(R,) of every loss that compares rows, and of the widths of certificates."""
        values = {name: losses.mapped_N for name in _WORDS if self.mixture[name]}
        if self.mixture["uld"]:
            values |= {"uld": losses.uld_N, "uld_width": losses.upper_N - losses.lower_N}
        teacher, words_RI, known = rows["teacher"], rows.get("words_NI"), (batch["label_ids_R"], losses.ce_N)
        if self.mixture["jsd"]:
            log_q_RI = listed_logprobs(logits_RV, words_RI.clamp(min=0), *known)
            values["jsd"] = jsd_rows(log_q_RI, teacher.probs_NK, words_RI, self.config.jsd_beta)
        if self.mixture["hybrid"]:
            listed_RX = rest_words(logits_RV, words_RI, teacher.probs_NK.shape[1])
            log_q_RX = listed_logprobs(logits_RV, listed_RX, *known)
            rest_R, width_R = sorted_rest(log_q_RX, listed_RX, words_RI, teacher.probs_NK, teacher.tail_N)
            values |= {"hybrid": losses.mapped_N + rest_R, "hybrid_width": width_R}
        return values

    def _likelihood(self, nats_R: torch.Tensor, batch: Batch) -> torch.Tensor:
        logprob_M = -nats_R[self._at_labels(batch, batch["chunk_index_M"])]
        return likelihood_loss(
            chunk_logprobs(logprob_M, batch["chunk_M"], len(batch["chunk_gold_G"])),
            batch["chunk_gold_G"],
            self._weights(batch, "chunk_sample_G"),
            "sum",
            temperature=self.config.likelihood_temperature,
        )

    def _merged(self, logits_RV: torch.Tensor, nats_R: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """ULD with groups for rows: CE's own log-probabilities are the factors of a group."""
        last_N, weight_N = self._at_labels(batch, batch["student_index_N"]), self._weights(batch, "sample_N")
        earlier_logprob_M = -nats_R[self._at_labels(batch, batch["earlier_index_M"])]
        uld, certificate = merged_uld_loss(
            logits_RV.index_select(0, last_N),
            log_scale_of(earlier_logprob_M, batch["earlier_group_M"], len(last_N)),
            batch["teacher_probs_NK"],
            batch["teacher_tail_N"],
            weight_N,
            reduction="sum",
        )
        return {"uld": uld, "uld_width": (weight_N * (certificate.upper_N - certificate.lower_N)).sum()}

    @staticmethod
    def _at_labels(batch: Batch, index_N: torch.Tensor) -> torch.Tensor:
        """Which of the R labels stand at these positions."""
        return torch.searchsorted(batch["label_index_R"], index_N)

    def _weights(self, batch: Batch, name: str) -> torch.Tensor:
        return self._row_weights(batch[name]).float()

    def _row_weights(self, sample_R: torch.Tensor) -> torch.Tensor:
        """(R,) float64: 1 per row, or with `samples` 1 per document, shared by its rows."""
        if self.config.loss_normalization == "tokens":
            return torch.ones(len(sample_R), dtype=torch.float64, device=sample_R.device)
        rows_per_sample = torch.bincount(sample_R).clamp(min=1)
        return 1 / rows_per_sample[sample_R].to(torch.float64)
