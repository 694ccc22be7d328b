"""`distill evaluate`: models beside each other on a cache's held-out text, on a task, or on both; it can be resumed."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.dataset import CachedDocuments
from distill.evaluation.answering import Answer, Answering, answers
from distill.evaluation.bits_per_byte import TEACHER, bits_per_byte, held_out_of
from distill.evaluation.inference_benchmark import machine, measure_apart
from distill.evaluation.lm_eval_tasks import LmEvalTasks, lm_eval_metrics, tasks_text
from distill.evaluation.metrics import chosen_metrics, task_metrics
from distill.evaluation.partial import AnswerFile, kept_figures, kept_scores
from distill.evaluation.report import Metric, ModelReport, Report, write_report
from distill.evaluation.sheet import settings_of, sheet_of
from distill.evaluation.tasks import Task
from distill.exclusions import Exclusions
from distill.scoring import Scores, score
from distill.students import evaluated_digest, load_model, load_tokenizer, model_folder, parameter_count
from storage_specs.device_memory import memory_for
from storage_specs.document import CachedDocument
from storage_specs.errors import CacheMismatchError, ConfigError
from storage_specs.model_identity import weights_digest
from storage_specs.reader import Cache

__all__ = ["Evaluation", "evaluate"]

BITS_PER_BYTE = "bits_per_byte"
SMALLER = (
    "with --output_file what is finished is kept, and the same command goes on: try a smaller --batch_size, or begin "
    "again with --dtype bfloat16, or a smaller --max_length or --max_new_tokens"
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to measure of which models: {name: hub name or folder}; of a cache, a task, lm-eval.

    teacher: a live one beside the models, whose bits per byte are the cache's, of which it must be the teacher.
    sheet: what each costs on this machine, too. max_documents: held-out documents, max_examples: of the task, the
    first so many; excluded: held-out documents that are left out; metrics: names, () = what suits the task; dtype: of
    the weights in memory, None = bfloat16 on a GPU that has it, else float32; how: lengths, batches and templates.
    """

    models: Mapping[str, str]
    cache: Cache | None = None
    task: Task | None = None
    teacher: str | None = None
    lm_eval: LmEvalTasks | None = None
    sheet: bool = False
    metrics: tuple[str, ...] = ()
    max_documents: int | None = None
    excluded: Exclusions | None = None
    max_examples: int | None = None
    dtype: str | None = None
    how: Answering = field(default_factory=Answering)

    def __post_init__(self) -> None:
        if self.cache is None and self.task is None and self.lm_eval is None:
            raise ConfigError("nothing to evaluate on: give --cache, --task or --lm_eval_tasks, or several of them")
        if (self.cache is not None or self.teacher is not None) and TEACHER in self.models:
            raise ConfigError(
                f"a model is named {TEACHER!r}, as the cache's own teacher: choose another name, or name a live "
                "teacher by --teacher"
            )
        for name, least in (("max_length", 1), ("batch_size", 1), ("max_new_tokens", 1)):
            if getattr(self.how, name) < least:
                raise ConfigError(f"{name} is {getattr(self.how, name)}: must be at least {least}")
        for name in self.models:
            if not name or name.startswith(".") or "/" in name:
                raise ConfigError(f"a model cannot be named {name!r}: its files are named so")


def evaluate(evaluation: Evaluation, output_file: Path | None = None) -> Report:
    """Measure; with `output_file` the report is written there, and what is finished is kept beside it on the way.

    FILE.partial holds what an interrupted call leaves and the same call takes up; FILE.predictions the answers in the
    end. Raises AlignmentError (nothing is scored by all), ConfigError, EvaluationError, StorageFullError, and
    DeviceMemoryError.
    """
    task = evaluation.task and evaluation.task.first(evaluation.max_examples)
    metric_names = chosen_metrics(task, evaluation.metrics) if task else []
    held_out: list[CachedDocument] = []
    held_out_is: dict[str, str | None] = {}
    if evaluation.cache is not None:
        documents = CachedDocuments(evaluation.cache, held_out=True, excluded=evaluation.excluded)
        held_out, held_out_is = held_out_of(documents, evaluation.max_documents), documents.identity
    partial = None if output_file is None else output_file.with_name(f"{output_file.name}.partial")
    if evaluation.teacher is not None and evaluation.cache is not None:
        _check_teacher(evaluation.teacher, evaluation.cache)
    dtype = evaluation.dtype or usual_dtype()
    inference = settings_of(task, held_out, dtype) if evaluation.sheet else None
    paths = {**evaluation.models, **({} if evaluation.teacher is None else {TEACHER: evaluation.teacher})}
    models: dict[str, ModelReport] = {}
    scores: dict[str, list[Scores]] = {}
    lm_eval: dict[str, dict[str, Any]] = {}
    for name, path in paths.items():
        student = _Student(path, dtype)
        metrics: dict[str, Metric] = {}
        notes: tuple[str, ...] = ()
        with memory_for(_at_a_time(name, evaluation), SMALLER):
            if evaluation.cache is not None and name != TEACHER:
                scores[name] = _scores(student, name, held_out, held_out_is, evaluation.how, partial)
            if task is not None:
                found = _answers(student, name, task, evaluation.how, partial)
                metrics = task_metrics(task, {one.id: one.text for one in found}, metric_names)
                notes = _notes(found)
            if evaluation.lm_eval is not None:
                lm_eval = _lm_eval_figures(student, name, evaluation.lm_eval, evaluation.how.batch_size, partial)
                metrics |= lm_eval_metrics(lm_eval)
        models[name] = ModelReport(
            model=path, digest=student.digest, parameters=student.parameters, metrics=metrics, notes=notes
        )
        student.release()
    if inference is not None:  # at last, when no other model is in memory
        about = machine()
        for name, path in paths.items():
            with memory_for(f"model {name}, {len(inference.texts)} texts at a time", SMALLER):
                sheet = sheet_of(measure_apart(path, inference), inference, about)
            models[name] = replace(models[name], sheet=sheet)
    report = Report(subjects=_subjects(evaluation, task, lm_eval), models=models, dtype=dtype)
    if evaluation.cache is not None:
        report = _with_bits_per_byte(report, held_out_is, held_out, scores)
    if output_file is not None and partial is not None:
        write_report(output_file, report)
        _keep_answers(partial, output_file.with_name(f"{output_file.name}.predictions"))
    return report


def usual_dtype() -> str:
    """In which models are run where nothing else is asked for: as they are deployed on a GPU, exact elsewhere."""
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def _check_teacher(path: str, cache: Cache) -> None:
    """Raises CacheMismatchError for a live teacher with other weights than the one that the cache was built with."""
    recorded = cache.manifest.teacher.get("weights_digest")
    folder = model_folder(path)
    if recorded is not None and (found := weights_digest(folder)) != recorded:
        raise CacheMismatchError(
            f"--teacher {path}: its weights have digest {found}, but cache {cache.path} was built with {recorded} "
            f"({cache.manifest.teacher.get('name')}): name the teacher of the cache, or take it for a --model"
        )


class _Student:
    """A model that is loaded only if something is left to ask it."""

    def __init__(self, path: str, dtype: str) -> None:
        self.path, self.dtype = path, dtype
        self.digest = evaluated_digest(path)
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._loaded is None:
            tokenizer, model = load_tokenizer(self.path), load_model(self.path, self.dtype)
            self._loaded = model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer
        return self._loaded

    def release(self) -> None:
        """Its memory is free for the next one, in whatever process."""
        self._loaded = None
        torch.cuda.empty_cache()  # does nothing where no GPU was used

    @property
    def parameters(self) -> int:
        return parameter_count(self.path) if self._loaded is None else self._loaded[0].num_parameters()


def _scores(
    student: _Student,
    name: str,
    held_out: Sequence[CachedDocument],
    held_out_is: Mapping[str, str | None],
    how: Answering,
    partial: Path | None,
) -> list[Scores]:
    rendering = {key: getattr(how, key) for key in ("max_length", "chat_template", "chat_template_kwargs")}
    whose = {"digest": student.digest, "dtype": student.dtype, **rendering, "documents": len(held_out)}
    return kept_scores(
        partial and partial / f"{name}.npz",
        whose | held_out_is,
        lambda: score(*student.loaded(), held_out, **rendering, batch_size=how.batch_size, label=name),
    )


def _answers(student: _Student, name: str, task: Task, how: Answering, partial: Path | None) -> list[Answer]:
    """One per example; only those that are not there yet are asked for, of any batch size."""
    whose = {"digest": student.digest, "dtype": student.dtype, "task": task.digest} | _settings(how)
    file = AnswerFile(partial and partial / f"{name}.jsonl", whose)
    rest = [example for example in task.examples if example.id not in file.answers]
    if rest:
        for batch in answers(*student.loaded(), rest, how, name):
            file.add(batch)
    found = [file.answers[example.id] for example in task.examples]
    return found


def _lm_eval_figures(
    student: _Student, name: str, tasks: LmEvalTasks, batch_size: int, partial: Path | None
) -> dict[str, dict[str, Any]]:
    return kept_figures(
        partial and partial / f"{name}.lm_eval.json",
        {"digest": student.digest, "dtype": student.dtype, **tasks.identity},
        lambda: tasks.evaluate(*student.loaded(), batch_size=batch_size),
    )


def _at_a_time(name: str, evaluation: Evaluation) -> str:
    """What of a model takes memory, for a message."""
    how = evaluation.how
    return f"model {name}, {how.batch_size} prompts or windows of at most {how.max_length} tokens at a time"


def _notes(found: Sequence[Answer]) -> tuple[str, ...]:
    """What makes answers say less than they seem to."""
    empty, cut = sum(not one.text for one in found), sum(one.prompt_cut > 0 for one in found)
    notes = []
    if empty:
        notes.append(f"{empty} of {len(found)} answers are empty and score 0")
    if cut:
        notes.append(f"{cut} of {len(found)} prompts were longer than the model reads: their beginning was left out")
    return tuple(notes)


def _settings(how: Answering) -> dict[str, Any]:
    """What answers depend on: not the batch size, which may be lowered where memory is too small."""
    return {name: value for name, value in asdict(how).items() if name != "batch_size"} | {"stop": list(how.stop)}


def _subjects(
    evaluation: Evaluation, task: Task | None, lm_eval: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    subjects: dict[str, dict[str, Any]] = {}
    if task is not None:
        about = {"name": task.name, "digest": task.digest, "examples": len(task.examples)}
        subjects["task"] = about | _settings(evaluation.how)
    if evaluation.lm_eval is not None:
        subjects["lm_eval"] = evaluation.lm_eval.identity | {"tasks": tasks_text(lm_eval)}
    return subjects


def _with_bits_per_byte(
    report: Report,
    held_out_is: Mapping[str, str | None],
    held_out: Sequence[CachedDocument],
    scores: Mapping[str, Sequence[Scores]],
) -> Report:
    """The report with the cache in front of its subjects, the metric of every model, and the cache's teacher."""
    found, counts = bits_per_byte(held_out, scores)
    silent = ModelReport(model=None, digest=None, parameters=None, metrics={})
    models = {
        name: replace(model, metrics={BITS_PER_BYTE: found[name], **model.metrics})
        for name, model in {**report.models, TEACHER: report.models.get(TEACHER, silent)}.items()
    }
    return replace(report, subjects={"cache": {**held_out_is, **counts}, **report.subjects}, models=models)


def _keep_answers(partial: Path, final: Path) -> None:
    """The answers in their last place; nothing unfinished is left."""
    files = sorted(partial.glob("*.jsonl"))
    if files:
        final.mkdir(exist_ok=True)
    for file in files:
        file.replace(final / file.name)
    shutil.rmtree(partial)
