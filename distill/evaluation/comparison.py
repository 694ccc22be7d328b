"""Two reports over the same subjects, metric by metric: how far each fell, and whether by more than chance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.checkpoint import differences
from distill.evaluation.report import PERCENT, Report, paired_error
from storage_specs.errors import EvaluationError

__all__ = ["Change", "as_text", "compared", "unlike"]

CERTAIN = 2.0  # standard errors


@dataclass(frozen=True, kw_only=True)
class Change:
    """One metric of one model. drop, error: how far it fell and the standard error of that, or None.

    In points where the unit is percent, else in percent of the value before; negative where it got better.
    """

    model: str
    metric: str
    before: float
    after: float
    drop: float
    error: float | None
    failed: bool

    @property
    def verdict(self) -> str:
        certain = self.error is not None and abs(self.drop) > CERTAIN * self.error
        noise = "" if certain else ", within the noise" if self.error is not None else ", noise not known"
        if self.failed:
            return f"FELL{noise}"
        return ("better" if self.drop < 0 else "same" if self.drop == 0 else "worse, but allowed") + noise


def compared(baseline: Report, report: Report, max_drop: float) -> list[Change]:
    """A change for every model and metric of both. Models go by their names; a teacher's own figures count as well.

    Raises EvaluationError: another cache, task or setting, other models or metrics.
    """
    _check_same("measured", *({"subjects": sorted(one.subjects)} for one in (baseline, report)))
    for subject in baseline.subjects:
        _check_same(subject, baseline.subjects[subject], report.subjects[subject])
    _check_names("models", baseline.models, report.models)
    changes = []
    for name, before in baseline.models.items():
        after = report.models[name]
        _check_same(f"model {name}", {"parameters": before.parameters}, {"parameters": after.parameters})
        _check_names(f"metrics of {name}", before.metrics, after.metrics)
        for metric, old in before.metrics.items():
            new = after.metrics[metric]
            meant = [{"unit": one.unit, "higher is better": one.higher_is_better} for one in (old, new)]
            _check_same(f"{metric} of {name}", *meant)
            scale = 1.0 if old.unit == PERCENT or not old.value else 100 / abs(old.value)
            drop = ((old.value - new.value) if old.higher_is_better else (new.value - old.value)) * scale
            drop = 0.0 if old.value == new.value else drop
            error = paired_error(old, new)
            changes.append(
                Change(
                    model=name,
                    metric=metric,
                    before=old.value,
                    after=new.value,
                    drop=drop,
                    error=None if error is None else error * scale,
                    failed=drop > max_drop,
                )
            )
    if not changes:
        raise EvaluationError("the two reports have no metric: there is nothing to compare")
    return changes


def unlike(baseline: Report, report: Report) -> str | None:
    """What makes a small change say less than it seems to; None where nothing is known to."""
    if baseline.dtype == report.dtype:
        return None
    before, now = (one.dtype or "a dtype that it does not tell" for one in (baseline, report))
    return f"weights were in {before}, now in {now}: small changes may come from rounding alone; give --dtype"


def as_text(changes: Sequence[Change], max_drop: float) -> str:
    """For a terminal and a log."""
    rows = [["model", "metric", "before", "after", "drop", "verdict"]]
    for change in changes:
        error = "" if change.error is None else f" ± {change.error:.2f}"
        figures = [f"{change.before:.4f}", f"{change.after:.4f}", f"{change.drop:+.2f}{error}"]
        rows.append([change.model, change.metric, *figures, change.verdict])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    failed = sum(change.failed for change in changes)
    return "\n".join([*lines, f"{failed} of {len(changes)} fell by more than {max_drop:g}"])


def _check_same(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    different = differences(before, now, most=80)
    if different:
        raise EvaluationError(f"the baseline is of something else: {what}: {different}: evaluate both alike")


def _check_names(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if set(before) != set(now):
        raise EvaluationError(
            f"the baseline has other {what}: {', '.join(before) or 'none'}, now {', '.join(now) or 'none'}: give "
            "models the same names (--model NAME=...) and ask for the same metrics"
        )
