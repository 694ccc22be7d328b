"""The sheet that a proof of concept is judged by: quality, size, memory, speed and latency of models side by side.

One table, a column for each model and a row for each figure, as JSON, Markdown and one HTML page without outside
references. What was not measured is said so, cell by cell.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from distill.inference_benchmark import InferenceFigures, InferenceSettings
from distill.report_format import STYLE

__all__ = ["as_html", "as_markdown", "sheet_facts"]

NOT_MEASURED = "not measured"


def sheet_facts(
    quality: Mapping[str, Mapping[str, Any]],
    inference: Mapping[str, InferenceFigures],
    settings: InferenceSettings,
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """The sheet as JSON. quality: {model: {metric: a number, or {"value", "stderr"}}}, in the order of the columns;
    inference: of those models that were run here; machine: what they ran on."""
    return {
        "machine": dict(machine),
        "measured_on": {
            "texts": len(settings.texts),
            "text_bytes": sum(len(text.encode()) for text in settings.texts),
            "new_tokens": settings.new_tokens,
            "repeats": settings.repeats,
        },
        "models": {
            name: {
                "quality": {
                    metric: value if isinstance(value, Mapping) else {"value": value, "stderr": None}
                    for metric, value in metrics.items()
                },
                "inference": asdict(inference[name]) if name in inference else None,
            }
            for name, metrics in quality.items()
        },
    }


def _spread(scale: float = 1, digits: int = 1) -> Callable[[dict[str, float]], str]:
    def text(value: dict[str, float]) -> str:
        median, q1, q3 = (f"{scale * value[name]:,.{digits}f}" for name in ("median", "q1", "q3"))
        return f"{median} ({q1} to {q3})"

    return text


def _millions(value: int) -> str:
    return f"{value / 1e6:,.1f} M"


def _megabytes(value: int) -> str:
    return f"{value / 1e6:,.0f} MB"


# (row, figure of InferenceFigures, how it is written)
INFERENCE: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("parameters", "parameters", _millions),
    ("parameters without embeddings", "parameters_without_embeddings", _millions),
    ("weights on disk", "weights_bytes", _megabytes),
    ("peak memory", "peak_bytes", _megabytes),
    ("weights in memory", "dtype", str),
    ("text per token, bytes", "bytes_per_token", lambda value: f"{value:.2f}"),
    ("time to the first token, ms", "first_token_ms", _spread()),
    ("time per token, ms", "token_ms", _spread(digits=2)),
    ("prefill, tokens/s", "prefill_tokens", _spread(digits=0)),
    ("prefill, kB of text/s", "prefill_bytes", _spread(1e-3)),
    ("decode, tokens/s", "decode_tokens", _spread()),
    ("decode, bytes of text/s", "decode_bytes", _spread(digits=0)),
)


def table(facts: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(column names, rows) of the sheet."""
    models = facts["models"]
    metrics = dict.fromkeys(metric for model in models.values() for metric in model["quality"])
    rows = [[metric, *(_quality(model["quality"].get(metric)) for model in models.values())] for metric in metrics]
    for label, figure, written in INFERENCE:
        cells = [model["inference"] for model in models.values()]
        rows.append([label, *(NOT_MEASURED if cell is None else written(cell[figure]) for cell in cells)])
    return ["", *models], rows


def notes(facts: Mapping[str, Any]) -> list[str]:
    """What the figures were measured on and how, a sentence a line."""
    machine, how = facts["machine"], facts["measured_on"]
    machine_line = ", ".join(
        [machine["cpu"], f"{machine['threads']} threads", machine["gpu"] or "no GPU", machine["system"]]
        + [f"{name} {machine[name]}" for name in ("python", "torch", "transformers")]
    )
    return [
        f"Machine: {machine_line}.",
        f"Inference: the same {how['texts']} texts ({how['text_bytes']:,} bytes) for all models, {how['new_tokens']} "
        "tokens written behind each, greedily, by transformers' generate with its key-value cache; each model alone in "
        "a process.",
        f"Times of one text; tokens/s of all {how['texts']} in one batch; medians of {how['repeats']} repeats after "
        "warm-up, quartiles in brackets. Tokens of different tokenizers are different amounts of text: compare bytes.",
        "Peak memory: beyond what the process held before the model was loaded; parameters: tied ones once.",
    ]


def as_markdown(facts: Mapping[str, Any], title: str) -> str:
    """For a wiki or a terminal."""
    names, rows = table(facts)
    lines = [[_piped(cell) for cell in line] for line in (names, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([f"# {title}", "", line(lines[0]), line(rule), *map(line, lines[1:]), "", *notes(facts), ""])


def as_html(facts: Mapping[str, Any], title: str) -> str:
    """One whole page."""
    names, rows = table(facts)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "\n".join(
        f"<tr><th>{escape(label)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for label, *cells in rows
    )
    return "\n".join(
        [
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>",
            f"<h1>{escape(title)}</h1><table><tr>{head}</tr>{body}</table>",
            *(f"<p>{escape(note)}</p>" for note in notes(facts)),
            "",
        ]
    )


def _quality(value: Mapping[str, Any] | None) -> str:
    if value is None or value["value"] is None:
        return NOT_MEASURED
    stderr = "" if value.get("stderr") is None else f" ± {value['stderr']:.4f}"
    return f"{value['value']:.4f}{stderr}"


def _piped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
