"""The sheet that a proof of concept is judged by: size, memory, speed and latency, beside a report's quality metrics.

A model's sheet in a report is a mapping of JSON values: `machine`, `texts`, `text_bytes`, and every figure of
`InferenceFigures`. Here they become the cells of a table, and the sentences that say how they were measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from distill.evaluation.inference_benchmark import InferenceFigures, InferenceSettings
from distill.evaluation.tasks import Task
from storage_specs.document import Document
from storage_specs.errors import ConfigError

__all__ = ["settings_of", "sheet_cells", "sheet_heads", "sheet_of"]

TEXTS, TEXT_BYTES = 8, 512
ON_CPU = (
    "beyond what the process held before the model was loaded; mapped weight files and what libraries load with a "
    "model included"
)
ON_GPU = "of the GPU, as torch allocated it; what CUDA itself takes, some hundred MB, is not in it"


def settings_of(task: Task | None, held_out: Sequence[Document], dtype: str) -> InferenceSettings:
    """What models are timed on: the beginnings of the task's first prompts, or of held-out documents.

    Raises ConfigError where there is neither.
    """
    texts = [document.text for document in held_out[:TEXTS]]
    if task is not None:
        prompts = [example.prompt for example in task.examples[:TEXTS]]
        texts = [one if isinstance(one, str) else "\n".join(turn["content"] for turn in one) for one in prompts]
    texts = [text.encode()[:TEXT_BYTES].decode(errors="ignore") for text in texts]
    if not any(texts):
        raise ConfigError("--sheet times models on texts of --cache or --task: give one of them")
    return InferenceSettings(texts=tuple(filter(None, texts)), dtype=dtype)


def sheet_of(figures: InferenceFigures, settings: InferenceSettings, machine: Mapping[str, Any]) -> dict[str, Any]:
    """One model's sheet."""
    text_bytes = sum(len(text.encode()) for text in settings.texts)
    return {"machine": dict(machine), "texts": len(settings.texts), "text_bytes": text_bytes} | asdict(figures)


def _spread(scale: float = 1, digits: int = 1) -> Callable[[Mapping[str, float]], str]:
    def text(value: Mapping[str, float]) -> str:
        median, q1, q3 = (f"{scale * value[name]:,.{digits}f}" for name in ("median", "q1", "q3"))
        return f"{median} ({q1} to {q3})"

    return text


def _megabytes(value: int) -> str:
    return f"{value / 1e6:,.1f} MB"


# (row, figure, how it is written)
CELLS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("parameters without embeddings", "parameters_without_embeddings", lambda value: f"{value:,}"),
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


def sheet_cells(sheet: Mapping[str, Any]) -> dict[str, str]:
    """{row: cell} of one model."""
    return {label: written(sheet[figure]) for label, figure, written in CELLS}


def sheet_heads(sheet: Mapping[str, Any]) -> list[str]:
    """What was measured on what and how, a sentence a line; the same for all models of a report."""
    machine = sheet["machine"]
    parts = [machine["cpu"], f"{machine['threads']} threads", machine["gpu"] or "no GPU", machine["system"]]
    parts += [f"{name} {machine[name]}" for name in ("python", "torch", "transformers")]
    return [
        f"machine: {', '.join(parts)}",
        f"inference: the same {sheet['texts']} texts ({sheet['text_bytes']:,} bytes) for all models, "
        f"{sheet['new_tokens']} tokens written behind each, greedily, by transformers' generate with its key-value "
        "cache; each model alone in a process",
        f"times of one text, tokens/s of all {sheet['texts']} in one batch; medians of {sheet['repeats']} repeats "
        "after warm-up, quartiles in brackets; tokens of two tokenizers are different amounts of text: compare bytes",
        "peak memory: " + (ON_GPU if machine["gpu"] else ON_CPU),
    ]
