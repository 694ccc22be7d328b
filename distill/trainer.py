"""`transformers.Trainer` on a cache: CE + ULD + mapped, exact under accumulation and ranks, resumable to the batch.

Legend: R labels, N compared rows, V student vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from distill.checkpoint import (
    RECORD,
    check_checkpoint,
    last_whole_checkpoint,
    remove_old_checkpoints,
    saving,
    write_record,
)
from distill.collator import Batch, DistillationCollator
from distill.comparison import Comparison, compare
from distill.config import DistillationConfig
from distill.dataset import CachedDocuments
from distill.fused import row_losses
from distill.head import picked_logits
from distill.merged import log_scale_of, merged_uld_loss
from distill.progress import TokenProgress
from distill.sampler import EpochBatches
from distill.teacher_rows import TeacherRows
from storage_specs.errors import CheckpointError, ConfigError, NonFiniteLossError, TeachOnceError

# What is summed over rows; the last is no loss but how far ULD may be off: the mean width of its certificate.
TERMS = ("ce", "uld", "mapped", "uld_width")
COUNTS = ("labels", "pairs", "teacher_rows", "tokens")


class CachedDistillationTrainer(Trainer):
    """Trains a causal language model on a cache: ce_weight * CE + uld_weight * ULD + mapped_weight * mapped.

    CE is divided by its labels and each teacher term by its compared rows, both counted over all micro-batches and
    ranks of a step before the first backward; with `loss_normalization="samples"` both are means of documents' means.
    Each term is logged apart, with the compared fractions. `run` says what makes this run itself (cache_id is added to
    it): checkpoints record it, and one of another run is refused.

    Takes what `transformers.Trainer` takes, without the arguments that say where data and losses come from. Raises
    TokenizerError, ConfigError, AlignmentError (nothing to compare), CheckpointError, NonFiniteLossError (naming the
    documents of the batch), and in saving StorageFullError, OutputFolderError.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: DistillationConfig,
        train_dataset: CachedDocuments,
        processing_class: PreTrainedTokenizerBase,
        *,
        data_collator: DistillationCollator | None = None,
        comparison: Comparison | None = None,
        run: dict[str, Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ) -> None:
        if args.n_gpu > 1:
            args._n_gpu = 1  # one process, one GPU: flattened batches cannot be scattered; torchrun uses them all
        collator = data_collator or DistillationCollator(processing_class, args, train_dataset.cache)
        with _setting_up():
            super().__init__(
                model=model,
                args=args,
                data_collator=collator,
                train_dataset=train_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        # The loss is divided by counts of the whole step: nothing is left for Trainer to divide by.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.comparison = comparison
        self.run = (run or {}) | {"cache_id": train_dataset.cache.manifest.cache_id}
        self.batches = self._epoch_batches()
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(_SetEpoch(self.batches))
        self.add_callback(TokenProgress(self))
        self.tokens_seen = 0
        self._sums = torch.zeros(len(TERMS))
        self._counts = torch.zeros(len(COUNTS), dtype=torch.float64)
        self._steps_summed = 0

    # ---- batches

    def _epoch_batches(self) -> EpochBatches:
        args = self.args
        return EpochBatches(
            self.train_dataset.documents_per_shard,
            documents=args.per_device_train_batch_size,
            micro_batches=args.gradient_accumulation_steps,
            ranks=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Not prepared by accelerate, which would shard and shuffle anew what `EpochBatches` has decided."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | None]:
        """All micro-batches of a step, and what CE and the teacher's terms are divided by, summed over ranks."""
        if self.state.global_step >= self.state.max_steps:  # resumed from the very last checkpoint: nothing is left
            self.control.should_training_stop = True
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.tensor(
            [
                [
                    len(batch["label_index_R"]),
                    len(batch.get("student_index_N", ())),
                    batch["teacher_rows"],
                    int(batch["attention_mask"].sum()),
                ]
                for batch in batches
            ],
            dtype=torch.float64,
        ).sum(0)
        weights = sum(
            (self._weight_sums(batch) for batch in batches), torch.zeros(2, dtype=torch.float64)
        )  # on the CPU still: no waiting for a GPU
        counts, weights = self._over_ranks(counts), self._over_ranks(weights)
        self.tokens_seen += int(counts[COUNTS.index("tokens")])
        self._counts += counts
        self._steps_summed += 1
        return batches, weights.clamp(min=1).to(device, torch.float32)

    def _over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values.to(self.args.device), "sum").cpu()

    # ---- loss

    def _row_weights(self, sample_R: torch.Tensor) -> torch.Tensor:
        """(R,) float64: 1 per row, or with `samples` 1 per document, shared by its rows."""
        if self.args.loss_normalization == "tokens":
            return torch.ones(len(sample_R), dtype=torch.float64, device=sample_R.device)
        rows_per_sample = torch.bincount(sample_R).clamp(min=1)
        return 1 / rows_per_sample[sample_R].to(torch.float64)

    def _weight_sums(self, batch: Batch) -> torch.Tensor:
        """(2,) float64: the weights of a micro-batch's labels and compared rows."""
        samples = (batch["label_sample_R"], batch.get("sample_N", batch["label_sample_R"][:0]))
        return torch.stack([self._row_weights(sample).sum() for sample in samples])

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss (all of it where `num_items_in_batch` is None)."""
        divisor = num_items_in_batch
        if divisor is None:
            divisor = self._weight_sums(inputs).clamp(min=1)
        terms = self._terms(model, inputs) / divisor.to(inputs["input_ids"].device)[[0, 1, 1, 1]]
        loss = (terms.new_tensor(self._term_weights()) * terms).sum()
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at step {self.state.global_step} "
                f"({', '.join(f'{name} {term:.4g}' for name, term in zip(TERMS, terms.tolist(), strict=True))}) in the "
                f"batch of documents {', '.join(inputs['doc_ids'])}: lower --learning_rate or set --max_grad_norm, and "
                "look at these documents; checkpoints before this step are intact"
            )
        self._sums = self._sums.to(terms.device) + terms.detach()
        # DDP and FSDP average gradients over ranks, and the divisor is of all ranks already.
        loss = loss * self.accelerator.num_processes
        return (loss, {"terms": terms.detach()}) if return_outputs else loss

    def _term_weights(self) -> list[float]:
        return [self.args.ce_weight, self.args.uld_weight, self.args.mapped_weight, 0.0]

    def _terms(self, model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
        """(4,) float32 weighted sums over rows of `TERMS`, in one pass over the logits; terms of weight 0 are 0."""
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        fed = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        logits_RV = picked_logits(model, head, fed, inputs["label_index_R"])
        if self.args.align == "merge" and self.args.kd_weight:
            return self._merged_terms(logits_RV, inputs)
        rows: dict[str, Any] = {}
        kd_weight_R = logits_RV.new_zeros(len(logits_RV), dtype=torch.float32)
        if self.args.kd_weight:
            # The teacher's rows at the compared ones of the R labels; nothing, of weight 0, at the others. No label is
            # compared twice.
            compared_N = torch.searchsorted(inputs["label_index_R"], inputs["student_index_N"])
            kd_weight_R[compared_N] = self._row_weights(inputs["sample_N"]).float()
            probs_NK, tail_N = inputs["teacher_probs_NK"], inputs["teacher_tail_N"]
            probs_RK = probs_NK.new_zeros(len(logits_RV), probs_NK.shape[1]).index_copy_(0, compared_N, probs_NK)
            tail_R = tail_N.new_ones(len(logits_RV)).index_copy_(0, compared_N, tail_N)
            rows = {"teacher": TeacherRows(probs_NK=probs_RK, tail_N=tail_R), "uld": self.args.uld_weight > 0}
            if self.args.mapped_weight:
                words_NI = inputs["words_NI"]
                words_RI = words_NI.new_full((len(logits_RV), words_NI.shape[1]), -1)
                rows["words_NI"] = words_RI.index_copy_(0, compared_N, words_NI)
        losses = row_losses(logits_RV, labels_N=inputs["label_ids_R"], **rows)
        ce = (self._row_weights(inputs["label_sample_R"]).float() * losses.ce_N).sum()
        uld_width_R = None if losses.uld_N is None else losses.upper_N - losses.lower_N
        compared = [
            ce.new_zeros(()) if loss_R is None else (kd_weight_R * loss_R).sum()
            for loss_R in (losses.uld_N, losses.mapped_N, uld_width_R)
        ]
        return torch.stack([ce, *compared])

    def _merged_terms(self, logits_RV: torch.Tensor, inputs: Batch) -> torch.Tensor:
        """As `_terms`, with groups for rows: CE's own log-probabilities are the factors of a group."""
        nats_R = row_losses(logits_RV, labels_N=inputs["label_ids_R"]).ce_N
        weight_N = self._row_weights(inputs["sample_N"]).float()
        earlier_M = torch.searchsorted(inputs["label_index_R"], inputs["earlier_index_M"])
        last_N = torch.searchsorted(inputs["label_index_R"], inputs["student_index_N"])
        uld, certificate = merged_uld_loss(
            logits_RV.index_select(0, last_N),
            log_scale_of(-nats_R[earlier_M], inputs["earlier_group_M"], len(last_N)),
            inputs["teacher_probs_NK"],
            inputs["teacher_tail_N"],
            weight_N,
            reduction="sum",
        )
        ce = (self._row_weights(inputs["label_sample_R"]).float() * nats_R).sum()
        width = (weight_N * (certificate.upper_N - certificate.lower_N)).sum()
        return torch.stack([ce, uld, ce.new_zeros(()), width])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside Trainer's own: each term, and the compared fractions, since the last line."""
        if "loss" in logs and self._steps_summed:
            terms = self._over_ranks(self._sums.to(self.args.device)).cpu() / self._steps_summed
            labels, pairs, teacher_rows, _ = self._counts.tolist()
            weights = self._term_weights()
            weights[TERMS.index("uld_width")] = self.args.uld_weight
            logs |= {name: terms[n].item() for n, name in enumerate(TERMS) if weights[n] or name == "ce"}
            if self.args.kd_weight:
                logs["compared_student"] = pairs / max(1, labels)
                logs["compared_teacher"] = pairs / max(1, teacher_rows)
            logs["tokens"] = self.tokens_seen
            self._sums, self._counts, self._steps_summed = torch.zeros_like(self._sums), 0 * self._counts, 0
        super().log(logs, start_time)

    # ---- checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As Trainer's; True resumes from the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise CheckpointError(f"no whole checkpoint in {self.args.output_dir}: train without resuming")
        if resume_from_checkpoint:
            check_checkpoint(Path(resume_from_checkpoint), self.run)
        if self.args.kd_weight and self.comparison is None:
            self.comparison = compare(self.train_dataset, self.data_collator)
        return super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, **options)

    def create_optimizer(self, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
        """Trainer's; packages that an optimizer needs are missed only here. Raises ConfigError."""
        with _setting_up():
            return super().create_optimizer(*arguments, **options)

    def create_scheduler(self, *arguments: Any, **options: Any) -> Any:
        """Trainer's. Raises ConfigError."""
        with _setting_up():
            return super().create_scheduler(*arguments, **options)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Trainer's, then the record that makes it whole; older ones are removed only after that."""
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with saving(folder):
                if self.args.should_save:  # written again after an earlier one was resumed from: not whole meanwhile
                    (folder / RECORD).unlink(missing_ok=True)
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_record(folder, {"run": self.run, "step": self.state.global_step})
            if keep:
                remove_old_checkpoints(folder.parent, keep, self.state.best_model_checkpoint)


@contextmanager
def _setting_up() -> Iterator[None]:
    """Types what Trainer raises for arguments that it, or a package it needs, cannot work with: ConfigError."""
    try:
        yield
    except TeachOnceError:
        raise
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"training arguments: {type(error).__name__}: {error}") from error


class _SetEpoch(TrainerCallback):
    """Tells the sampler its epoch from the step number, which is exact after resuming, mid-epoch or between epochs."""

    def __init__(self, batches: EpochBatches) -> None:
        self.batches = batches

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.batches.set_epoch(state.global_step // self.batches.steps)
