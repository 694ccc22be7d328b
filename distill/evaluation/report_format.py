"""A report as one table: for a terminal, as Markdown, as one HTML page without any outside reference."""

from html import escape

from distill.evaluation.report import Metric, Report
from distill.report_format import STYLE, html_table

__all__ = ["as_html", "as_markdown", "as_text", "cells"]


def cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """(column names, a row for every model): its metrics with standard errors, then what its sheet says."""
    metrics = report.metric_names()
    sheet = list(dict.fromkeys(name for model in report.models.values() for name in model.sheet or {}))
    units = {name: model.metrics[name].unit for model in report.models.values() for name in model.metrics}
    parameters = any(model.parameters for model in report.models.values())
    columns = ["model", *(["parameters"] if parameters else []), *(f"{m} ({units[m]})" for m in metrics), *sheet]
    rows = []
    for name, model in report.models.items():
        size = [f"{model.parameters:,}" if model.parameters else ""] if parameters else []
        measured = [_figure(model.metrics.get(metric)) for metric in metrics]
        rows.append([name, *size, *measured, *(_cell((model.sheet or {}).get(column)) for column in sheet)])
    return columns, rows


def heads(report: Report) -> list[str]:
    """A line for every subject, what was measured, and for every note."""
    return [
        f"{subject}: " + ", ".join(f"{name} {_cell(value)}" for name, value in facts.items() if value is not None)
        for subject, facts in report.subjects.items()
    ] + [f"{name}: {note}" for name, model in report.models.items() for note in model.notes]


def as_text(report: Report) -> str:
    """For a terminal."""
    columns, rows = cells(report)
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if n == 0 else cell.rjust(width) for n, (cell, width) in enumerate(pairs))
        for pairs in (zip(row, widths, strict=True) for row in (columns, *rows))
    ]
    return "\n".join([*heads(report), *lines])


def as_markdown(report: Report) -> str:
    """A table for a README or a chat."""
    columns, rows = cells(report)
    table = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([*lines, "", *(f"- {head}" for head in heads(report))]) + "\n"


def as_html(report: Report, title: str) -> str:
    """One whole page."""
    columns, rows = cells(report)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(head)}</p>" for head in heads(report)),
        html_table("Models", columns, [[escape(cell) for cell in row] for row in rows]),
    ]
    return "\n".join(parts) + "\n"


def _figure(metric: Metric | None) -> str:
    if metric is None:
        return ""
    digits = 4 if abs(metric.value) < 10 else 2
    error = "" if metric.standard_error is None else f" ± {metric.standard_error:.{digits}f}"
    return f"{metric.value:.{digits}f}{error}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
