"""`distill train`: everything that can be wrong is checked before a model is loaded; the same command resumes."""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import HfArgumentParser, TrainerCallback, set_seed

from distill.checkpoint import begin, last_whole_checkpoint, saving, write_record
from distill.collator import DistillationCollator
from distill.comparison import SAMPLE_DOCUMENTS, compare
from distill.config import DistillationConfig
from distill.dataset import CachedDocuments
from distill.encoder_decoder import decoder_start_of
from distill.exclusions import Exclusions, read_exclusions
from distill.students import load_config, load_model, load_tokenizer, student_digest, with_adapters
from distill.trainer import CachedDistillationTrainer
from storage_specs.command_line import Parser
from storage_specs.errors import CacheMismatchError, ConfigError
from storage_specs.manifest import Manifest
from storage_specs.reader import open_cache

DTYPES = ("float32", "bfloat16", "float16", "auto")
# Training arguments that say where, how fast and how talkatively a run goes, not what it learns; all others make it
# itself, and a checkpoint of a run that differs in one is not resumed from. The batch size counts as a product.
NOT_THE_RUN = re.compile(
    "output_dir|log_.*|logging_.*|disable_tqdm|report_to|run_name|project|trackio_.*|debug|skip_memory_metrics|"
    "save_.*|enable_jit_checkpoint|resume_from_checkpoint|restore_callback_states_from_checkpoint|push_to_hub|hub_.*|"
    "eval_.*|per_device_eval_batch_size|prediction_loss_only|include_.*|batch_eval_metrics|load_best_model_at_end|"
    "metric_for_best_model|greater_is_better|do_.*|dataloader_(?!drop_last).*|on_corrupt|accept_repaired|"
    "gradient_checkpointing.*|torch_empty_cache_steps|max_eval_documents|probe_steps|look_ahead_steps|use_cpu|"
    "local_rank|ddp_.*|average_tokens_across_devices|per_device_train_batch_size|gradient_accumulation_steps"
)


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One training run. `expected` names what the cache must be: any of cache_id, teacher_name,
    teacher_tokenizer_digest and corpus_digest. corpus, cache_dir, cache_bytes: see `open_cache`. exclude_documents:
    a list of documents that are neither trained on nor held out (`distill.exclusions`). dtype: of the weights in memory
    (`bf16=True` of the config is mixed precision instead).
    """

    model_name_or_path: str
    cache: str | Path
    config: DistillationConfig
    corpus: str | Path | None = None
    cache_dir: str | Path | None = None
    cache_bytes: int | None = None
    exclude_documents: str | Path | None = None
    dtype: str = "float32"
    expected: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}: must be one of {', '.join(DTYPES)}")


def train(run: TrainingRun) -> dict[str, Any]:
    """Train a student into `config.output_dir`, resuming what an interrupted run of the same flags left there.

    Returns the record of the finished run. Raises what can be mended as TeachOnceError, and KeyboardInterrupt after a
    checkpoint was saved on Ctrl-C.
    """
    config, output_dir = run.config, Path(run.config.output_dir)
    cache = open_cache(
        run.cache,
        config.mixture.needs_ids,
        corpus=run.corpus,
        cache_dir=run.cache_dir,
        cache_bytes=run.cache_bytes,
    )
    check_cache(cache.manifest, run.expected or {}, run.cache)
    listed = run.exclude_documents
    excluded = None if listed is None else Exclusions(cache, read_exclusions(listed), listed)
    documents = CachedDocuments(cache, excluded=excluded)
    if not len(documents):
        left = "no documents to train on" if excluded is None else f"no document left to train on ({excluded})"
        raise ConfigError(f"cache {run.cache} has {left}: cache more, or exclude fewer")
    identity = _identity(run, documents)
    replaced = documents.cache.manifest.replaces if config.accept_repaired else ()
    if excluded is not None:
        say(config, str(excluded))
    if not begin(output_dir, identity, replaced):
        say(config, f"{output_dir} holds the finished model of this very run: nothing to do")
        return {"run": identity, "finished": True}
    tokenizer = load_tokenizer(run.model_name_or_path)
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    decoder_start = decoder_start_of(load_config(run.model_name_or_path))
    collator = DistillationCollator(tokenizer, config, documents.cache, decoder_start)
    comparison = (
        compare(documents.sample(SAMPLE_DOCUMENTS, config.on_corrupt == "quarantine"), collator)
        if config.mixture.of_teacher
        else None
    )
    if comparison is not None:
        say(config, str(comparison))
    model = load_model(run.model_name_or_path, run.dtype)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.max_length > limit:
        raise ConfigError(
            f"max_length is {config.max_length}, but {run.model_name_or_path} reads at most {limit} tokens"
        )
    set_seed(config.seed)  # Trainer would do it too late for new adapters: ranks, and runs, must draw the same
    model = with_adapters(model, config)
    stop = _StopOnInterrupt()
    trainer = CachedDistillationTrainer(
        model,
        config,
        documents,
        tokenizer,
        data_collator=collator,
        comparison=comparison,
        run=identity,
        callbacks=[stop],
    )
    say(config, f"{len(documents)} documents, {trainer.batches.steps} steps of {trainer.batches.global_size} per epoch")
    asked = config.resume_from_checkpoint
    checkpoint = True if str(asked).lower() == "true" else asked or last_whole_checkpoint(output_dir)
    if checkpoint:
        say(config, f"resuming from {'the last whole checkpoint' if checkpoint is True else checkpoint}")
    if config.should_save:
        write_record(output_dir, {"run": identity, "finished": False})
    with stop.listening():
        trainer.train(checkpoint)
    if stop.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
    with saving(output_dir):
        trainer.save_model()
        trainer.save_state()
    record = {"run": identity, "finished": True, "steps": trainer.state.global_step}
    if comparison is not None:
        record["comparison"] = asdict(comparison)
    for name, dataset in (("quarantined", documents), ("quarantined_held_out", trainer.eval_dataset)):
        if dataset is not None and dataset.quarantine is not None and (lost := dataset.quarantine.summary()):
            record[name] = lost
            counts = f"{len(lost['shards'])} shards with {lost['documents']} documents, {lost['rows']} rows"
            say(config, f"left out as broken: {counts} ({lost['file']})")
    if config.should_save:
        write_record(output_dir, record)
    say(config, f"finished: {output_dir}")
    return record


def make_config(values: dict[str, Any]) -> DistillationConfig:
    """Flags and config-file values, as strings or typed, to a `DistillationConfig`. Raises ConfigError."""
    arguments: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        arguments.append(f"--{name}")
        if isinstance(value, dict):
            value = json.dumps(value)
        if value is not True:
            arguments += [str(item) for item in (value if isinstance(value, list) else [value])]
    parser = HfArgumentParser(DistillationConfig, allow_abbrev=False)
    parser.error = lambda message: Parser(prog="distill train").error(message)  # no usage of 150 flags, no exit
    (config,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    return config


def check_cache(manifest: Manifest, expected: dict[str, str], place: str | Path) -> None:
    """Raises CacheMismatchError where the cache is not the one that the flags name."""
    found = {
        "cache_id": manifest.cache_id,
        "teacher_name": manifest.teacher.get("name"),
        "teacher_tokenizer_digest": manifest.tokenizer.get("digest"),
        "corpus_digest": manifest.corpus.get("digest"),
    }
    for name, value in expected.items():
        if found[name] != value:
            raise CacheMismatchError(
                f"cache {place}: its {name} is {found[name]!r}, but --{name} names {value!r}: use the cache that was "
                f"built with it, or correct --{name}"
            )


def say(config: DistillationConfig, line: str) -> None:
    """Tell the user, once per run whatever the number of ranks."""
    if config.process_index == 0:
        print(line, file=sys.stderr, flush=True)


def _identity(run: TrainingRun, documents: CachedDocuments) -> dict[str, Any]:
    config = json.loads(json.dumps(run.config.to_dict(), default=str))  # as a record gives it back
    documents_per_step = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
    return {
        **documents.identity,
        "student": str(run.model_name_or_path),
        "student_digest": student_digest(run.model_name_or_path),
        "dtype": run.dtype,
        **{name: value for name, value in config.items() if not NOT_THE_RUN.fullmatch(name)},
        "documents_per_step": documents_per_step * run.config.world_size,
    }


class _StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends the run after its step, with a checkpoint; the second at once."""

    def __init__(self) -> None:
        self.interrupted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        previous = signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Past sys.stderr: Ctrl-C may come in the middle of one of its own writes, which must not be entered again.
        with suppress(OSError):
            os.write(2, b"\ninterrupted: saving a checkpoint after this step; Ctrl-C again to stop at once\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True
