"""A report as one table: for a terminal, as Markdown, as one HTML page without any outside reference."""

from html import escape

from distill.evaluation.report import Metric, Report
from distill.evaluation.sheet import sheet_cells, sheet_heads
from distill.report_format import STYLE, html_table

__all__ = ["as_html", "as_markdown", "as_text", "cells"]


def cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """(column names, rows): a row for every model, its metrics with standard errors; with a sheet, whose figures are
    many, a column for every model."""
    metrics = report.metric_names()
    sheets = {name: sheet_cells(model.sheet) for name, model in report.models.items() if model.sheet is not None}
    sheet = list(dict.fromkeys(label for one in sheets.values() for label in one))
    units = {name: model.metrics[name].unit for model in report.models.values() for name in model.metrics}
    parameters = any(model.parameters for model in report.models.values())
    columns = ["model", *(["parameters"] if parameters else []), *(f"{m} ({units[m]})" for m in metrics), *sheet]
    rows = []
    for name, model in report.models.items():
        size = [f"{model.parameters:,}" if model.parameters else ""] if parameters else []
        measured = [_figure(model.metrics.get(metric)) for metric in metrics]
        rows.append([name, *size, *measured, *(sheets.get(name, {}).get(label, "") for label in sheet)])
    if sheets:
        columns, *rows = map(list, zip(columns, *rows, strict=True))
    return columns, rows


def heads(report: Report) -> list[str]:
    """A line for every subject, what was measured, for what all models have in common, and for every note."""
    return [
        f"{subject}: " + ", ".join(f"{name} {_cell(value)}" for name, value in facts.items() if value is not None)
        for subject, facts in report.subjects.items()
    ] + [
        *([] if report.dtype is None else [f"models: weights in {report.dtype}"]),
        *(f"{name}: {note}" for name, model in report.models.items() for note in model.notes),
        *next((sheet_heads(model.sheet) for model in report.models.values() if model.sheet is not None), []),
    ]


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
