"""One cell of scripts/proof.py: a training run by `CachedDistillationTrainer`, and what its student is then worth.

`Laboratory` keeps for all cells of a process what they share: decoded caches, students in memory, tokenizers, word
maps, and what the teacher and the untrained student score on the same documents.
"""

import gc
import hashlib
import math
import pickle
import platform
import tempfile
import time
import tomllib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache as cached
from pathlib import Path
from typing import Any

import proof_tasks
import torch
import transformers
from proof_documents import View, bytes_per_row, held_out_halves
from proof_grid import ARMS, Cell
from proof_stages import Stages

from distill import CachedDistillationTrainer, CachedDocuments, DistillationCollator, DistillationConfig
from distill.collator import word_map_of
from distill.scoring import Scores, score, summed, teacher_scores
from distill.word_map import WordMap
from storage_specs.document import CachedDocument, Document
from storage_specs.errors import AlignmentError, NonFiniteLossError
from storage_specs.reader import Cache, open_cache

MEASURED = (
    *("loss", "align", "mapping", "rows", "steps", "batch", "max_length", "train_documents", "tokens", "train_seconds"),
    *("train_ce", "compared_student", "seconds", "validation_bits_per_byte", "bits_per_byte"),
    *("teacher_bits_per_byte", "untrained_bits_per_byte", "test_documents", "test_bytes", "metric", "score"),
    *("teacher_score", "untrained_score", "other_scores", "bytes_per_row", "cache_id", "machine", "version", "torch"),
    *("transformers", "python", "date"),
)
EVALUATION_BATCH = 8  # windows; many processes may share the GPU


class Laboratory:
    """What the cells of one process share; everything is loaded when it is first asked for."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = cached(transformers.AutoTokenizer.from_pretrained)
        self.cache = cached(self._cache)
        self.view = cached(lambda task, answers, *seen: View(self.cache(task, answers), *seen))
        self.word_map = cached(self._word_map)
        self.weights = cached(self._weights)
        self.measured_on = cached(self._measured_on)
        self.baseline = cached(self._baseline)
        self.bytes_per_row = cached(self._bytes_per_row)

    def _cache(self, task: str, answers: str) -> Cache:
        opened = open_cache(self.stages.cache_path(task, answers))
        return View(opened, opened.manifest.k_ids)  # whose decoded shards all other views of it share

    def _word_map(self, task: str, answers: str, student: str, mapping: str) -> WordMap:
        config = DistillationConfig(output_dir="unused", loss="mapped:1", mapping=mapping)
        return word_map_of(self.cache(task, answers), self.student_tokenizer(student), config)

    def _weights(self, student: str) -> transformers.PreTrainedModel:
        return transformers.AutoModelForCausalLM.from_pretrained(self.stages.student_path(student), dtype=torch.float32)

    def student(self, name: str) -> transformers.PreTrainedModel:
        """A student of its own, untrained."""
        return deepcopy(self.weights(name)).to(self.device)

    def student_tokenizer(self, name: str) -> transformers.PreTrainedTokenizerBase:
        return self.tokenizer(self.stages.student_path(name))

    def _measured_on(self, task: str) -> tuple[Sequence[Document], Sequence[Document]]:
        """(validation, test) documents of a task, never trained on: the first choose the learning rate, the others are
        reported. Of plain text the cache's held-out ones, of tasks those of their own splits."""
        count = self.stages.training(task).test
        if task == "wikipedia":
            halves = held_out_halves(self.cache(task, "given"), count)
            if not all(halves):
                raise AlignmentError(f"the cache of {task} has fewer than 2 held-out documents: nothing to measure on")
            return halves
        return proof_tasks.documents(task, "validation", count), proof_tasks.documents(task, "test", count)

    def _baseline(self, task: str, student: str) -> "Baseline":
        def make(scratch: Path) -> None:
            (scratch / "scores").write_bytes(pickle.dumps(Baseline.of(self, task, student)))

        stages = self.stages
        training = stages.training(task)
        settings = {name: getattr(training, name) for name in ("test", "max_length", "max_new_tokens")}
        settings |= {"teacher": stages.cache_settings(task, "given"), "student": stages.student_settings(student)}
        path = stages.once(stages.folder / "baselines" / f"{task}-{student}", settings, make)
        return pickle.loads((path / "scores").read_bytes())

    def _bytes_per_row(self, task: str, answers: str, k_ids: int) -> float:
        return bytes_per_row(self.view(task, answers, k_ids))

    def decode(self, cell: Cell) -> None:
        """Read the cell's whole cache, unless it has been read."""
        view = self.view_of(cell)
        for shard in range(len(view.documents_per_shard)):
            view.read_columns(shard)

    def view_of(self, cell: Cell) -> View:
        shuffled = ARMS[cell.arm].rows == "shuffled"
        return self.view(cell.task, cell.answers, cell.k_ids, cell.fraction, shuffled)

    def scores(
        self, model: transformers.PreTrainedModel, tokenizer: Any, documents: Sequence[Document], max_length: int
    ) -> list[Scores]:
        return score(model.eval(), tokenizer, documents, max_length=max_length, batch_size=EVALUATION_BATCH)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The teacher and the untrained student on a task's test documents: figures that do not depend on the cell."""

    teacher: list[Scores]
    untrained: list[Scores]
    teacher_scores: dict[str, float]
    untrained_scores: dict[str, float]

    @classmethod
    def of(cls, laboratory: Laboratory, task: str, student: str) -> "Baseline":
        training = laboratory.stages.training(task)
        _, test = laboratory.measured_on(task)
        untrained, tokenizer = laboratory.student(student), laboratory.student_tokenizer(student)
        of_untrained = laboratory.scores(untrained, tokenizer, test, training.max_length)
        answers = proof_tasks.answer_scores(task, untrained, tokenizer, training)
        if all(isinstance(document, CachedDocument) for document in test):
            of_teacher, teacher_answers = [teacher_scores(document) for document in test], {}
        else:
            path = laboratory.stages.teacher_path(task)
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(laboratory.device)
            of_teacher = laboratory.scores(model, laboratory.tokenizer(path), test, 2 * training.max_length)
            teacher_answers = proof_tasks.answer_scores(task, model, laboratory.tokenizer(path), training)
        return cls(teacher=of_teacher, untrained=of_untrained, teacher_scores=teacher_answers, untrained_scores=answers)


def train_once(laboratory: Laboratory, cell: Cell) -> tuple[transformers.PreTrainedModel, dict[str, Any]]:
    """The trained student of a cell, and what its training says (no measurements of its worth)."""
    arm, training = ARMS[cell.arm], cell.training
    view = laboratory.view_of(cell)
    tokenizer = laboratory.student_tokenizer(cell.student)
    with tempfile.TemporaryDirectory() as scratch:
        config = DistillationConfig(
            output_dir=scratch,
            loss=arm.loss,
            align=arm.align,
            mapping=arm.mapping,
            seed=cell.seed,
            learning_rate=cell.learning_rate,
            max_steps=training.steps,
            per_device_train_batch_size=training.batch,
            max_length=training.max_length,
            packing=True,  # the same loss and gradients over half of the padding
            warmup_steps=max(1, training.steps // 20),
            lr_scheduler_type="cosine",
            bf16=True,
            use_cpu=laboratory.device == "cpu",
            logging_steps=max(1, training.steps // 4),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        words = None
        if config.mixture.needs_ids:
            words = laboratory.word_map(cell.task, cell.answers, cell.student, arm.mapping)
        documents = CachedDocuments(view)
        collator = DistillationCollator(tokenizer, config, view, word_map=words)
        model = laboratory.student(cell.student)
        trainer = CachedDistillationTrainer(model, config, documents, tokenizer, data_collator=collator)
        began = time.perf_counter()
        trainer.train()
        if laboratory.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        last = next(line for line in reversed(trainer.state.log_history) if "ce" in line)
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return trained, {
        "train_documents": len(documents),
        "tokens": last["tokens"],
        "train_seconds": seconds,
        "train_ce": last["ce"],
        "compared_student": last.get("compared_student", math.nan),
    }


def measure(laboratory: Laboratory, cell: Cell) -> dict[str, Any]:
    """One row of the CSV: everything but what names the cell. Its seconds do not count what other cells share."""
    training = cell.training
    tokenizer = laboratory.student_tokenizer(cell.student)
    validation, test = laboratory.measured_on(cell.task)
    baseline = laboratory.baseline(cell.task, cell.student)
    laboratory.decode(cell)
    began = time.perf_counter()
    found = {
        **asdict(ARMS[cell.arm]),
        **{"steps": training.steps, "batch": training.batch, "max_length": training.max_length},
        "bytes_per_row": laboratory.bytes_per_row(cell.task, cell.answers, cell.k_ids),
        "cache_id": laboratory.cache(cell.task, cell.answers).manifest.cache_id[:12],
        "machine": machine(laboratory.device),
        "version": code_version(),
        **{"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
    }
    try:
        model, trained = train_once(laboratory, cell)
        of_validation, of_test = (
            laboratory.scores(model, tokenizer, documents, training.max_length) for documents in (validation, test)
        )
    except NonFiniteLossError:  # a rate too high: never the best, and that is known now
        found |= dict.fromkeys(("validation_bits_per_byte", "bits_per_byte"), math.inf)
        return {name: found.get(name, math.nan) for name in MEASURED} | {"seconds": time.perf_counter() - began}
    on_validation = summed({"student": of_validation})
    scores = {
        "bits_per_byte": of_test,
        "teacher_bits_per_byte": baseline.teacher,
        "untrained_bits_per_byte": baseline.untrained,
    }
    on_test = summed(scores)
    answers = proof_tasks.answer_scores(cell.task, model, tokenizer, training)
    del model
    gc.collect()  # a Trainer and its model hold each other; on a GPU that others share it matters
    torch.cuda.empty_cache()
    metric = next(iter(answers), "")
    found |= trained | {
        "seconds": time.perf_counter() - began,
        "validation_bits_per_byte": _bits(on_validation.nats["student"], on_validation.bytes),
        **{name: _bits(nats, on_test.bytes) for name, nats in on_test.nats.items()},
        "test_documents": on_test.documents,
        "test_bytes": on_test.bytes,
        "metric": metric,
        "score": answers.get(metric, math.nan),
        "teacher_score": baseline.teacher_scores.get(metric, math.nan),
        "untrained_score": baseline.untrained_scores.get(metric, math.nan),
        "other_scores": " ".join(f"{name}={value:.4f}" for name, value in answers.items() if name != metric),
    }
    return {name: found[name] for name in MEASURED}


def machine(device: str) -> str:
    """What it ran on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


@cached
def code_version() -> str:
    """The package's version and a digest of the code that measures: a copy without git tells what it was, too."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    rooms = [file for room in ("storage_specs", "distill") for file in (root / room).rglob("*.py")]
    for file in sorted([*rooms, *(root / "scripts").glob("proof_*.py")]):
        digest.update(file.read_bytes())
    number = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf8"))["project"]["version"]
    return f"{number}+{digest.hexdigest()[:8]}"


def _bits(nats: float, size: int) -> float:
    return nats / math.log(2) / size
