"""What `distill evaluate` found, as a value and as JSON: per model its metrics, each with what it was averaged over.

    {"format": "distill-evaluation", "version": 1, "dtype": "float32",
     "subjects": {"cache": {"cache_id", "documents", "bytes", ...}, "task": {"name", "digest", "examples", ...}},
     "models": {name: {"model", "digest", "parameters", "metrics": {metric: {"value", "standard_error", "unit",
                       "higher_is_better", "scores", "weights"}}, "sheet": {...} or null, "notes": [...]}}}

`subjects` says what was measured, and by which settings: reports are compared only where these are the same.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill.text_files import write_text
from storage_specs.errors import EvaluationError

__all__ = ["PERCENT", "Metric", "ModelReport", "Report", "paired_error", "read_report", "write_report"]

FORMAT, VERSION = "distill-evaluation", 1
PERCENT = "%"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A weighted mean over examples. scores, weights: one per example, in the task's (or cache's) order.

    unit: "%", "bits/byte", "nats" ...; weights None = all alike; scores None = known only as a whole (lm-eval), and
    then `value` and `standard_error` are what was reported.
    """

    value: float
    standard_error: float | None
    unit: str
    higher_is_better: bool
    scores: tuple[float, ...] | None = None
    weights: tuple[float, ...] | None = None

    @classmethod
    def of(
        cls, scores: Sequence[float], *, unit: str, higher_is_better: bool, weights: Sequence[float] | None = None
    ) -> "Metric":
        """The mean of scores and its standard error (of a ratio, where there are weights). At least one score."""
        each = [1.0] * len(scores) if weights is None else list(weights)
        value = math.fsum(s * w for s, w in zip(scores, each, strict=True)) / math.fsum(each)
        return cls(
            value=value,
            standard_error=_error_of_mean([s - value for s in scores], each),
            unit=unit,
            higher_is_better=higher_is_better,
            scores=tuple(scores),
            weights=None if weights is None else tuple(weights),
        )


def _error_of_mean(deviations: Sequence[float], weights: Sequence[float]) -> float | None:
    """Of a weighted mean: sqrt(n / (n - 1) sum (w d)^2) / sum w, the ratio estimator's; None for one example."""
    count = len(deviations)
    if count < 2:
        return None
    squares = math.fsum((w * d) ** 2 for w, d in zip(weights, deviations, strict=True))
    return math.sqrt(count / (count - 1) * squares) / math.fsum(weights)


def paired_error(before: Metric, after: Metric) -> float | None:
    """The standard error of `after.value - before.value`; None where one is not known.

    Of paired examples where both have the same ones, which is much smaller than that of two independent means.
    """
    if before.scores and after.scores and len(before.scores) == len(after.scores) and before.weights == after.weights:
        shift = after.value - before.value
        deviations = [b - a - shift for a, b in zip(before.scores, after.scores, strict=True)]
        return _error_of_mean(deviations, before.weights or [1.0] * len(deviations))
    if before.standard_error is None or after.standard_error is None:
        return None
    return math.hypot(before.standard_error, after.standard_error)


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """One model. model: hub name or folder; digest: of its files; sheet: what it costs on a machine, if measured;
    notes: what a reader of its figures should know.

    model, digest and parameters are None for a teacher that only a cache knows.
    """

    model: str | None
    digest: str | None
    parameters: int | None
    metrics: Mapping[str, Metric]
    sheet: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """All models over the same subjects: {"cache" | "task" | "lm_eval": what it was, and the settings}.

    dtype: of all models' weights in memory; None where an earlier version did not tell.
    """

    subjects: Mapping[str, Mapping[str, Any]]
    models: Mapping[str, ModelReport] = field(default_factory=dict)
    dtype: str | None = None

    def metric_names(self) -> list[str]:
        """Of all models, in order of appearance."""
        return list(dict.fromkeys(name for model in self.models.values() for name in model.metrics))


def write_report(path: Path, report: Report) -> None:
    """Write a report as JSON, whole or not at all. Raises StorageFullError, OutputFolderError."""
    write_text(path, json.dumps({"format": FORMAT, "version": VERSION} | asdict(report), ensure_ascii=False) + "\n")


def read_report(path: Path) -> Report:
    """Raises EvaluationError: missing, not a report, of another version, or not as this module writes it."""
    try:
        values = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise EvaluationError(f"the report {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path} is not JSON ({error}): name a file that distill evaluate wrote") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise EvaluationError(f"{path} is not a report of distill evaluate: its format is not {FORMAT!r}")
    if values.get("version") != VERSION:
        raise EvaluationError(
            f"{path} is a report of version {values.get('version')!r}, this program reads {VERSION}: evaluate again"
        )
    try:
        models = {name: _model_from(model) for name, model in values["models"].items()}
        subjects = {name: dict(facts) for name, facts in values["subjects"].items()}
        return Report(subjects=subjects, models=models, dtype=values.get("dtype"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EvaluationError(f"{path} is a damaged report ({error!r}): evaluate again") from None


def _model_from(values: dict[str, Any]) -> ModelReport:
    metrics = {name: _metric_from(metric) for name, metric in values["metrics"].items()}
    return ModelReport(**(values | {"metrics": metrics, "notes": tuple(values["notes"])}))


def _metric_from(values: dict[str, Any]) -> Metric:
    lists = {name: values[name] and tuple(map(float, values[name])) for name in ("scores", "weights")}
    metric = Metric(**(values | lists))
    numbers = [metric.value, *(metric.scores or ()), *(metric.weights or ())]
    numbers += [] if metric.standard_error is None else [metric.standard_error]
    if not all(isinstance(number, float) and math.isfinite(number) for number in numbers):
        raise ValueError("a figure that is no number")
    if not isinstance(metric.unit, str) or not isinstance(metric.higher_is_better, bool):
        raise TypeError(f"unit {metric.unit!r}, higher_is_better {metric.higher_is_better!r}")
    return metric
