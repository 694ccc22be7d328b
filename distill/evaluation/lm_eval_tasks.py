"""Tasks of EleutherAI's lm-evaluation-harness, measured by lm-eval itself on models that are already loaded.

lm-eval is imported here alone, and only when a task is named: `pip install "teach-once[eval]"`.
"""

import contextlib
import io
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.evaluation.report import PERCENT, Metric
from storage_specs.command_line import nearest
from storage_specs.device_memory import memory_refusal
from storage_specs.errors import ConfigError, EvaluationError

__all__ = ["LmEvalTasks", "lm_eval_metrics", "tasks_text"]

RESAMPLED = 1000  # times, for the standard errors of F1 and the like; lm-eval's 100,000 take minutes for a metric
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")  # of right answers, 0 to 1 in lm-eval


class LmEvalTasks:
    """Named tasks, groups or tags, found once for all models.

    include_path: a folder of task files (YAML) beside lm-eval's own, which they may override; where it holds every
    task that is named, lm-eval's fourteen thousand are not indexed. limit: the first so many documents of each task;
    num_fewshot: examples in front, instead of the tasks' own number. Raises ConfigError: lm-eval is not installed, no
    such folder, an unknown task.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        include_path: str | Path | None = None,
        limit: int | None = None,
        num_fewshot: int | None = None,
    ) -> None:
        try:
            import lm_eval.tasks
        except ImportError as error:
            raise ConfigError(f'--lm_eval_tasks needs lm-eval: pip install "teach-once[eval]" ({error})') from None
        if include_path is not None and not Path(include_path).is_dir():
            raise ConfigError(f"--lm_eval_include_path {include_path}: no such folder")
        if not tasks or len(set(tasks)) < len(tasks):
            raise ConfigError(f"--lm_eval_tasks {','.join(tasks)}: name at least one task, and each once")
        self.tasks, self.limit, self.num_fewshot = list(tasks), limit, num_fewshot
        places = {"include_path": None if include_path is None else str(include_path)}
        with _quiet():
            self._manager = lm_eval.tasks.TaskManager(**places, include_defaults=include_path is None)
            if include_path is not None and not set(tasks) <= set(self._manager.all_subtasks):
                self._manager = lm_eval.tasks.TaskManager(**places)
        for task in tasks:
            if task not in self._manager.all_tasks:
                raise ConfigError(
                    f"--lm_eval_tasks: lm-eval has no task {task!r}{nearest(task, self._manager.all_tasks)}; tasks of "
                    "your own are read from --lm_eval_include_path"
                )

    @property
    def identity(self) -> dict[str, Any]:
        """What is measured, and by which lm-eval."""
        return {
            "version": version("lm_eval"),
            "tasks": ",".join(self.tasks),
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
        }

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8
    ) -> dict[str, dict[str, Any]]:
        """{task: {"metrics": {metric: {"value", "stderr" (None where lm-eval gives none), "higher_is_better"}},
        "documents", "num_fewshot", "version"}}; a metric behind a filter is called `metric,filter`. Groups stand beside
        their tasks. Raises ConfigError where lm-eval cannot load or run a task (its data, say)."""
        return figures_of(self.raw(model, tokenizer, batch_size=batch_size))

    def raw(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8) -> dict[str, Any]:
        """What `lm_eval.simple_evaluate` returns, its samples included."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        with _quiet():
            try:
                return lm_eval.simple_evaluate(
                    HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                    tasks=self.tasks,
                    task_manager=self._manager,
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    bootstrap_iters=RESAMPLED,
                )
            except Exception as error:  # data sets, templates and metrics have errors of their own
                if memory_refusal(error) is not None:
                    raise
                raise ConfigError(
                    f"--lm_eval_tasks {','.join(self.tasks)}: lm-eval failed: {type(error).__name__}: {error}"
                ) from error


def figures_of(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of lm-eval's results, as `LmEvalTasks.evaluate` gives them."""
    return {
        task: {
            "metrics": _metrics(values, raw["higher_is_better"].get(task, {})),
            "documents": raw["n-samples"].get(task, {}).get("effective", values.get("sample_len")),
            "num_fewshot": raw["n-shot"].get(task),
            "version": raw["versions"].get(task),
        }
        for task, values in raw["results"].items()
    }


def _metrics(values: dict[str, Any], better: dict[str, bool]) -> dict[str, dict[str, Any]]:
    found = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = values.get(f"{metric}_stderr,{chosen}")
        found[metric if chosen == "none" else key] = {
            "value": value,
            "stderr": stderr if _is_finite(stderr) else None,
            "higher_is_better": better.get(metric),
        }
    return found


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def lm_eval_metrics(figures: dict[str, dict[str, Any]]) -> dict[str, Metric]:
    """{`task/metric`: as a report holds it}: shares of right answers in percent, all else as lm-eval gives it.

    Raises EvaluationError where a figure is no finite number.
    """
    found = {}
    for task, facts in figures.items():
        for name, metric in facts["metrics"].items():
            if not _is_finite(metric["value"]):
                raise EvaluationError(f"{task}/{name} is {metric['value']!r}: a model whose weights are NaN says so")
            percent = name.partition(",")[0] in SHARES
            scale, stderr = 100 if percent else 1, metric["stderr"]
            found[f"{task}/{name}"] = Metric(
                value=float(metric["value"]) * scale,
                standard_error=None if stderr is None else stderr * scale,
                unit=PERCENT if percent else "lm-eval",
                higher_is_better=metric["higher_is_better"] is not False,
            )
    return found


def tasks_text(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """What was run, for a report: versions, documents, examples in front."""
    return "; ".join(
        f"{task} {facts['version']} ({facts['documents']} documents, {facts['num_fewshot']}-shot)"
        for task, facts in figures.items()
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's remarks are not shown, those that it prints included, and its bars only at a terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with bars, contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
