"""The engine's self-check: the first documents of a run, scored by the engine and by an independent forward pass.

In mode generate it is the first completions: their rows against a forward pass over prompt and completion.
The reference is transformers in float32 on the CPU where the weights fit, else vLLM's own prompt log-probabilities
(independent of the capture, not of the engine). What is found is the run's drift; a drift beyond LIMITS stops the build
before its first shard: a wrong shift, a missing BOS or damaged weights differ by nats, rounding by hundredths of them.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.engines.base import EngineConfig, WindowScores
from cache_builder.engines.generating import Generator, Prompt
from cache_builder.engines.interface import Engine
from cache_builder.rows import Cutter
from cache_builder.teacher import WEIGHT_PATTERNS
from storage_specs.document import Document
from storage_specs.drift import MEASURES, STATISTICS
from storage_specs.errors import DriftError
from storage_specs.windows import Window

DEFAULT_TOKENS = 512
# (median difference of the gold log-probability in nats, 99th percentile of those of sorted probabilities): four times,
# in float32 thirty times, the larger of two real models' (scripts/drift_table.py, scripts/results/drift.csv:
# Gemma-3-270M and SmolLM2-135M through vLLM and transformers; float32 3.8e-6 and 1.6e-6; bfloat16 0.023 and 8.6e-3 with
# a bfloat16 head, 0.015 and 5.6e-3 with a float32 one; float16, which Gemma's activations overflow, 3.0e-3 and 1.1e-3).
LIMITS = {"float32": (1e-4, 5e-5), "bfloat16": (0.1, 0.035), "float16": (0.012, 4.5e-3)}
# Of few rows the median may be any row's difference, and the 99th percentile is the largest: in that table at most 0.76
# nats and 0.12 in bfloat16, 0.062 and 0.013 in float16.
FEW_ROWS, WIDER = 64, 8
LARGEST_REFERENCE = 64e9  # bytes of float32 weights: larger ones take minutes to load, while the GPUs wait
SHARE_OF_MEMORY = 0.7
QUANTISED_BYTES = 0.5  # per weight in the files, at worst
GENERATED = 64  # tokens of each completion that a check generates, so that it sees several prompts


def check_engine(engine: Engine, cutter: Cutter, documents: Sequence[Document], tokens: int) -> dict[str, Any] | None:
    """The drift over the first `tokens` tokens of `documents`, or None where nothing independent can be had.

    Prints one line to stderr. Raises DriftError where the drift is beyond its limits, EngineError.
    """
    windows = list(_first_windows((window for item in documents for window in cutter.windows(item)), tokens))
    compared = _expected(engine, windows, lambda: list(engine.score(windows)))
    return compared and _checked(engine, *compared)


def check_generator(
    engine: Engine, generator: Generator, prompts: Iterable[Prompt], tokens: int
) -> dict[str, Any] | None:
    """The same of completions: their rows against a forward pass over prompt and completion.

    tokens: of prompts and completions together, each of these GENERATED at most. Raises DriftError, EngineError.
    """
    asked = list(_first_prompts(prompts, min(tokens, engine.config.capacity), tokens))
    if not asked or not (_is_approximate(engine) or hasattr(engine, "score_flat")):
        return None
    made = list(generator.generate(iter(asked)))
    windows = [_window_behind(prompt.ids, generation.ids) for prompt, generation in zip(asked, made, strict=True)]
    compared = _expected(engine, windows, lambda: [generation.scores for generation in made])
    return compared and _checked(engine, *compared)


def _expected(
    engine: Engine, windows: Sequence[Window], score: Callable[[], list[WindowScores]]
) -> tuple[str, list[WindowScores], list[WindowScores]] | None:
    """Name and rows of an independent forward pass over `windows`, between them what `score` gives; None without one.

    The engine loads its weights after the reference has given up its own.
    """
    reference = _reference(engine.config) if _is_approximate(engine) else None
    if not windows or (reference is None and not hasattr(engine, "score_flat")):
        return None
    expected: list[WindowScores] = []
    if reference is not None:
        try:
            expected = list(reference.score(windows))
        except Exception as error:  # quantised weights fail in the ways of the libraries that they need
            said = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"self-check: no forward pass by transformers ({said:.300})", file=sys.stderr)
        reference.close()
    scores = score()
    if expected:
        return "transformers float32", scores, expected
    if getattr(engine, "flat_reason", "no second route") is not None:
        return None
    return "vLLM prompt_logprobs", scores, list(engine.score_flat(windows))


def _checked(
    engine: Engine, name: str, scores: Sequence[WindowScores], expected: Sequence[WindowScores]
) -> dict[str, Any]:
    drift = {"reference": name, **drift_between(scores, expected)}
    table = "; ".join(
        f"{measure} " + " ".join(f"{key} {drift[measure][key]:.1e}" for key in STATISTICS) for measure in MEASURES
    )
    print(f"self-check of {drift['rows']} rows against {name}: {table}", file=sys.stderr)
    gold, probs = (limit * (WIDER if drift["rows"] < FEW_ROWS else 1) for limit in LIMITS[engine.config.dtype])
    if not (drift["gold_logprob"]["p50"] <= gold and drift["probs"]["p99"] <= probs):
        raise DriftError(
            f"the engine differs from {name} by {drift['gold_logprob']['p50']:.2g} nats in half of the gold "
            f"log-probabilities (limit {gold:g}) and by {drift['probs']['p99']:.2g} in 1 % of the sorted probabilities "
            f"(limit {probs:g}): its rows would be wrong. --self_check 0 builds without this check"
        )
    return drift


def drift_between(scores: Sequence[WindowScores], expected: Sequence[WindowScores]) -> dict[str, Any]:
    """`rows` and MEASURES of two engines' rows of the same windows."""
    pairs = list(zip(scores, expected, strict=True))
    tiny = np.finfo(np.float32).tiny
    differences = {
        "gold_logprob": [np.abs(ours.gold_logprob - theirs.gold_logprob) for ours, theirs in pairs],
        "logprobs": [
            np.abs(np.log(np.maximum(ours.probs, tiny)) - np.log(np.maximum(theirs.probs, tiny))).ravel()
            for ours, theirs in pairs
        ],
        "probs": [np.abs(ours.probs - theirs.probs).ravel() for ours, theirs in pairs],
    }
    values = {name: np.concatenate(parts).astype(np.float64) for name, parts in differences.items()}
    return {
        "rows": len(values["gold_logprob"]),
        **{
            name: {
                "p50": float(np.percentile(value, 50)),
                "p99": float(np.percentile(value, 99)),
                "max": float(value.max()),
            }
            for name, value in values.items()
        },
    }


def _first_windows(windows: Iterator[Window], tokens: int) -> Iterator[Window]:
    """Windows of at most `tokens` tokens together, the last one cut short; each has at least one row."""
    for window in windows:
        length = min(len(window.ids), tokens)
        rows_R = window.logits_index < length - 1
        if rows_R.any():
            values = {
                item.name: getattr(window, item.name)[rows_R]
                for item in dataclasses.fields(window)
                if item.name not in ("ids", "first_row")
            }
            yield dataclasses.replace(window, ids=window.ids[:length], **values)
        tokens -= length
        if tokens < 2:
            return


def _first_prompts(prompts: Iterable[Prompt], capacity: int, tokens: int) -> Iterator[Prompt]:
    """Prompts that leave room for a completion, which they ask for no more of than fits; `tokens` in all."""
    for prompt in prompts:
        room = min(prompt.max_tokens, GENERATED, capacity - len(prompt.ids), tokens - len(prompt.ids))
        if room > 0:
            yield dataclasses.replace(prompt, max_tokens=room)
            tokens -= len(prompt.ids) + room
        if tokens < 2:
            return


def _window_behind(prompt_L: np.ndarray, completion_G: np.ndarray) -> Window:
    """A completion as a window that scores it. Engines look at ids, logits_index and target_ids only."""
    index_G = np.arange(len(prompt_L) - 1, len(prompt_L) + len(completion_G) - 1)
    return Window(
        ids=np.concatenate([prompt_L, completion_G]),
        logits_index=index_G,
        target_ids=completion_G,
        **dict.fromkeys(("segment", "token_start", "byte_start", "byte_end", "row_in_segment"), np.zeros_like(index_G)),
        is_end=np.zeros(len(index_G), dtype=bool),
        first_row=0,
    )


def _is_approximate(engine: Engine) -> bool:
    """Whether the engine is anything else than the reference itself."""
    return engine.describe()["name"] != "transformers" or engine.config.dtype != "float32"


def _reference(config: EngineConfig) -> Engine | None:
    """transformers in float32 on the CPU, not loaded yet, where it fits."""
    files = next(filter(None, (list(Path(config.model).glob(pattern)) for pattern in WEIGHT_PATTERNS)), [])
    per_weight = QUANTISED_BYTES if _is_quantised(config) else 4 if config.dtype == "float32" else 2
    size = sum(file.stat().st_size for file in files) * 4 / per_weight
    if not files or config.arguments.get("load_format") == "dummy":
        return None
    if size > min(LARGEST_REFERENCE, SHARE_OF_MEMORY * _available_memory()):
        return None
    from cache_builder.engines.transformers import TransformersEngine

    return TransformersEngine(dataclasses.replace(config, dtype="float32", rank_edges=None, arguments={}), device="cpu")


def _is_quantised(config: EngineConfig) -> bool:
    try:
        return "quantization_config" in json.loads((Path(config.model) / "config.json").read_bytes())
    except (OSError, ValueError):
        return False


def _available_memory() -> float:
    """Bytes; what Linux says is available, else no limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), float("inf"))
