"""`transformers.Trainer` on a cache: CE and losses of the teacher's, exact under accumulation and ranks.

Legend: R labels, V student vocabulary.
"""

import sys
from collections.abc import Iterator
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
from distill.comparison import SAMPLE_DOCUMENTS, Comparison, compare
from distill.config import DistillationConfig
from distill.dataset import CachedDocuments
from distill.encoder_decoder import decoder_start_of
from distill.finite import FiniteLosses
from distill.head import picked_logits
from distill.held_out import held_out_documents, held_out_figures
from distill.look_ahead import check_look_ahead, look_ahead, look_ahead_warning
from distill.mixed_precision import keep_output_dtype
from distill.out_of_memory import SMALLER, SMALLER_EVALUATION, in_memory, micro_batch
from distill.packing import check_packing
from distill.probe import GradientProbe, HarmWatch, warning
from distill.progress import TokenProgress
from distill.quarantine import HELD_OUT, Quarantine
from distill.ranks import RankSums
from distill.sampler import EpochBatches
from distill.step_log import NO_COUNTS, StepLog, batch_counts
from distill.step_loss import UNITS, StepLoss
from distill.stopping import held_out_at_hand, stop_without_documents
from distill.stream import Stream
from distill.trainer_setup import setting_up
from storage_specs.errors import CheckpointError, TeachOnceError


class CachedDistillationTrainer(Trainer):
    """Trains a causal or encoder-decoder language model on a cache: the weighted sum of the losses of `args.loss`.

    CE is divided by its labels, each teacher's loss by its compared rows or chunks, all counted over all micro-batches
    and ranks of a step before the first backward; with `loss_normalization="samples"` all are means of documents'
    means. Each term is logged apart, with the compared fractions; `probe_steps` adds gradients (`distill.probe`),
    `look_ahead_steps` what CE alone would do (`distill.look_ahead`). `evaluate` measures bits per byte of the held-out
    documents (`eval_dataset`, by default the cache's). `run` says what makes this run itself (cache_id and excluded
    documents are added): checkpoints record it, and one of another run is refused.

    Takes what `transformers.Trainer` takes, without the arguments that say where data and losses come from. Raises
    TokenizerError, ConfigError, AlignmentError (nothing to compare), CheckpointError, NonFiniteLossError and
    DeviceMemoryError (naming the documents of the batch), and in saving StorageFullError, OutputFolderError.
    """

    def __init__(
        self,
        model: PreTrainedModel,  # or a peft.PeftModel of one
        args: DistillationConfig,
        train_dataset: CachedDocuments,
        processing_class: PreTrainedTokenizerBase,
        *,
        eval_dataset: CachedDocuments | None = None,
        data_collator: DistillationCollator | None = None,
        comparison: Comparison | None = None,
        run: dict[str, Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ) -> None:
        if args.n_gpu > 1:
            args._n_gpu = 1  # one process, one GPU: flattened batches cannot be scattered; torchrun uses them all
        collator = data_collator or DistillationCollator(
            processing_class, args, train_dataset.cache, decoder_start_of(model.config)
        )
        if eval_dataset is None and (args.eval_strategy != "no" or args.probe_steps):
            eval_dataset = held_out_documents(train_dataset.cache, train_dataset.excluded)
        with setting_up():
            super().__init__(
                model=model,
                args=args,
                data_collator=collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        if args.look_ahead_steps:
            check_look_ahead(args, self.accelerator)
        self.is_looking_ahead = False
        # The loss is divided by counts of the whole step: nothing is left for Trainer to divide by.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.comparison = comparison
        self.run = (run or {}) | train_dataset.identity
        self.batches = self._epoch_batches()
        self.stream = Stream(
            train_dataset,
            self.batches,
            collator,
            pinned=args.dataloader_pin_memory and args.device.type == "cuda",
            threads=max(1, args.dataloader_num_workers),
        )
        if args.on_corrupt == "quarantine":
            if eval_dataset is not None:
                eval_dataset.quarantine = Quarantine(Path(args.output_dir), HELD_OUT)
            train_dataset.quarantine = Quarantine(Path(args.output_dir))
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.step_loss = StepLoss(args, collator.rank_edges)
        self.step_log = StepLog(len(self.step_loss.names))
        self.harm_watch = HarmWatch()
        self.over_ranks = RankSums(self.accelerator.num_processes)
        self.finite = FiniteLosses()
        self._packing_checked = False
        self.add_callback(TokenProgress(self.step_log))

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
            drop_last=args.dataloader_drop_last,
            lengths=self.train_dataset.text_bytes if args.train_sampling_strategy == "group_by_length" else None,
        )

    def get_train_dataloader(self) -> DataLoader:
        """One epoch; `train` asks it for its length, and takes its batches from `stream`."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # draws nothing from the one that dropout uses
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | None]:
        """All micro-batches of a step, and (2,) float64 on the CPU: what CE and the teacher's terms are divided by,
        summed over ranks. Where one rank's batches cannot be had, all stop, with a checkpoint."""
        if self.state.global_step >= self.state.max_steps:  # resumed from the very last checkpoint: nothing is left
            self.control.should_training_stop = True
            return [], None
        stream = self.stream.at(self.state.global_step, self.state.max_steps)
        weights, counts, batches, failure = torch.zeros(len(UNITS), dtype=torch.float64), NO_COUNTS, [], None
        waited_before = stream.waited
        try:
            batches, _ = super().get_batch_samples(stream, num_batches, device)
            weights = sum((self.step_loss.weight_sums(batch) for batch in batches), weights)
            counts = sum((batch_counts(batch) for batch in batches), counts)
        except TeachOnceError as error:
            failure = error
        self.step_log.add_wait(stream.waited - waited_before)
        failed = torch.tensor([failure is not None], dtype=torch.float64)
        sums = self.over_ranks(torch.cat([weights, counts, failed]))
        weights, counts, failed = sums.split([len(weights), len(counts), 1])
        if failed:
            stop_without_documents(self, failure)
        self.step_log.add_counts(counts)
        if self.args.probe_steps and self.state.global_step % self.args.probe_steps == 0 and batches:
            self._probe(batches[0])
        return batches, weights.clamp(min=1)

    def _prepare_input(self, data: Any) -> Any:
        """Trainer's; tensors in pinned memory are sent to the GPU without waiting for it."""
        if isinstance(data, torch.Tensor) and data.is_pinned():
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    # ---- loss

    def training_step(self, model: torch.nn.Module, inputs: Batch, *arguments: Any, **options: Any) -> torch.Tensor:
        """Trainer's. Raises DeviceMemoryError; in a look-ahead what torch raises, until everything is put back."""
        if self.is_looking_ahead:
            return super().training_step(model, inputs, *arguments, **options)
        with in_memory(self, micro_batch(inputs, self.state.global_step), SMALLER):
            return super().training_step(model, inputs, *arguments, **options)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss (all of it where `num_items_in_batch` is None)."""
        terms = self._terms(model, inputs, num_items_in_batch)
        loss = (self._sent(self.step_loss.term_weights) * terms).sum()
        if not self.is_looking_ahead:
            self.finite.watch(loss, terms, self.step_loss.names, inputs["doc_ids"], self.state.global_step)
            self.step_log.add_terms(terms)
        # DDP and FSDP average gradients over ranks, and the divisor is of all ranks already.
        loss = loss * self.accelerator.num_processes
        return (loss, {"terms": terms.detach()}) if return_outputs else loss

    def _terms(self, model: torch.nn.Module, inputs: Batch, divisor: torch.Tensor | None = None) -> torch.Tensor:
        """(terms,) float32: the sums of `StepLoss.names`, divided by their units' weights (None: the batch's own)."""
        if divisor is None:
            divisor = self.step_loss.weight_sums(inputs).clamp(min=1).cpu()
        if self.args.packing and not self._packing_checked:
            check_packing(model, self.args.device)
            self._packing_checked = True
        logits_RV = picked_logits(model, inputs, inputs["label_index_R"])
        return self.step_loss.terms(logits_RV, inputs) * self._sent(1 / divisor[self.step_loss.units])

    def _sent(self, values: Any) -> torch.Tensor:
        """A few numbers as float32 on the training device, without waiting for it."""
        sent = torch.as_tensor(values, dtype=torch.float32)
        return self._prepare_input(sent.pin_memory() if self.args.device.type == "cuda" else sent)

    # ---- what a run tells

    def _probe(self, batch: Batch) -> None:
        """Log the gradients of this step's first micro-batch, and warn where the teacher's losses harm."""
        losses = self.step_loss.losses
        probe = GradientProbe(
            list(self.model.parameters()),
            lambda inputs: self._terms(self.model_wrapped, self._prepare_inputs(inputs))[: len(losses)],
            losses,
            [self.args.mixture[name] for name in losses],
        )
        accelerator, number = self.accelerator, self.state.global_step // self.args.probe_steps
        first = (number * accelerator.num_processes + accelerator.process_index) * self.args.per_device_train_batch_size
        numbers = {(first + n) % len(self.eval_dataset) for n in range(self.args.per_device_train_batch_size)}
        with held_out_at_hand(self):
            held_out = self.data_collator(self.eval_dataset.readable(sorted(numbers)))
        found = probe.measure(batch, held_out)
        self.log(found)
        harm = None if self.args.look_ahead_steps else self.harm_watch.add(found)
        self._warn(harm and warning(harm, self.args.loss, self.args.learning_rate))

    def _warn(self, line: str | None) -> None:
        if line and self.is_world_process_zero():
            print(line, file=sys.stderr, flush=True)

    def evaluate(
        self,
        eval_dataset: CachedDocuments | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Bits per byte of the student and of the teacher on held-out documents, as `distill evaluate` measures them.

        Raises AlignmentError where there are none, or no bytes that both score.
        """
        documents = eval_dataset or self.eval_dataset or held_out_documents(self.train_dataset.cache)
        at_a_time = f"held-out documents, {self.args.per_device_eval_batch_size} x {self.args.max_length} tokens"
        with in_memory(self, at_a_time, SMALLER_EVALUATION), held_out_at_hand(self):
            found = held_out_figures(self.model, self.processing_class, documents, self.args, self.accelerator)
            if self.args.look_ahead_steps and self.args.mixture.of_teacher and self.is_in_train:
                found |= look_ahead(self, documents)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self._warn(look_ahead_warning(self.state.log_history, self.args.mixture))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside Trainer's own: each term, the compared fractions, the waiting for data, since the last line."""
        self.finite.check()
        if "loss" in logs and self.step_log.steps:
            logs |= self.step_log.line(self.step_loss.names, self.over_ranks, bool(self.args.mixture.of_teacher))
        super().log(logs, start_time)

    # ---- checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As Trainer's; True resumes from the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise CheckpointError(f"no whole checkpoint in {self.args.output_dir}: train without resuming")
        if resume_from_checkpoint:
            replaced = self.train_dataset.cache.manifest.replaces if self.args.accept_repaired else ()
            check_checkpoint(Path(resume_from_checkpoint), self.run, replaced)
        if self.args.mixture.of_teacher and self.comparison is None:
            sample = self.train_dataset.sample(SAMPLE_DOCUMENTS, self.args.on_corrupt == "quarantine")
            self.comparison = compare(sample, self.data_collator)
        try:
            with in_memory(self, "the optimizer, or what is beside the model", SMALLER, whole=False):
                output = super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, **options)
        finally:
            self.stream.close()
        self.finite.check()
        return output

    def _prepare_for_training(self, *arguments: Any, **options: Any) -> Any:
        prepared = super()._prepare_for_training(*arguments, **options)
        keep_output_dtype(self.accelerator.unwrap_model(self.model_wrapped))
        return prepared

    def create_optimizer(self, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
        """Trainer's; packages that an optimizer needs are missed only here. Raises ConfigError."""
        with setting_up():
            return super().create_optimizer(*arguments, **options)

    def create_scheduler(self, *arguments: Any, **options: Any) -> Any:
        """Trainer's. Raises ConfigError."""
        with setting_up():
            return super().create_scheduler(*arguments, **options)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Trainer's, then the record that makes it whole; older ones are removed only after that."""
        self.finite.check()
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

    def save_last_step(self) -> None:
        """A checkpoint of the last whole step, if there was one and it is not saved yet."""
        step = self.state.global_step
        if step and self.last_saved_step() != step:
            self._save_checkpoint(self.model_wrapped, None)

    def last_saved_step(self) -> int | None:
        """The step of the newest whole checkpoint."""
        newest = last_whole_checkpoint(Path(self.args.output_dir))
        return None if newest is None else int(newest.name.rpartition("-")[2])
