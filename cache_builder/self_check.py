"""The engine's self-check: the first documents of a run, scored by the engine and by an independent forward pass.

The reference is transformers in float32 on the CPU where the weights fit, else vLLM's own prompt log-probabilities
(independent of the capture, not of the engine). What is found is the run's drift; a drift beyond LIMITS stops the build
before its first shard: a wrong shift, a missing BOS or damaged weights differ by nats, rounding by hundredths of them.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.engines.base import EngineConfig, WindowScores
from cache_builder.engines.interface import Engine
from cache_builder.rows import Cutter
from cache_builder.teacher import WEIGHT_PATTERNS
from storage_specs.document import Document
from storage_specs.drift import MEASURES, STATISTICS
from storage_specs.errors import DeviceMemoryError, DriftError, EngineError
from storage_specs.windows import Window

DEFAULT_TOKENS = 512
# (median difference of the gold log-probability in nats, 99th percentile of those of sorted probabilities): four times,
# in float32 thirty times, the larger of two real models' (scripts/drift_table.py, scripts/results/drift.csv:
# Gemma-3-270M and SmolLM2-135M through vLLM and transformers; float32 3.8e-6 and 1.6e-6; bfloat16 0.023 and 8.6e-3 with
# a bfloat16 head, 0.015 and 5.6e-3 with a float32 one). float16 rounds more finely and has bfloat16's until it is run.
LIMITS = {"float32": (1e-4, 5e-5), "bfloat16": (0.1, 0.035), "float16": (0.1, 0.035)}
LARGEST_REFERENCE = 64e9  # bytes of float32 weights: larger ones take minutes to load, while the GPUs wait
SHARE_OF_MEMORY = 0.7
WEIGHT_BYTES = 2  # per parameter in the files; quantised ones are larger in float32 than this says, and rarely load


def check_engine(engine: Engine, cutter: Cutter, documents: Sequence[Document], tokens: int) -> dict[str, Any] | None:
    """The drift over the first `tokens` tokens of `documents`, or None where nothing independent can be had.

    Prints one line to stderr. Raises DriftError where the drift is beyond its limits, EngineError.
    """
    windows = list(_first_windows((window for item in documents for window in cutter.windows(item)), tokens))
    reference = _reference(engine.config) if _is_approximate(engine) else None
    if not windows or (reference is None and not hasattr(engine, "score_flat")):
        return None
    if reference is not None:
        try:
            name, expected = "transformers float32", list(reference.score(windows))
        except (EngineError, DeviceMemoryError) as error:
            print(f"self-check: no forward pass by transformers ({error})", file=sys.stderr)
            reference = None
        else:
            reference.close()
    scores = list(engine.score(windows))
    if reference is None:
        if getattr(engine, "flat_reason", "no second route") is not None:
            return None
        name, expected = "vLLM prompt_logprobs", list(engine.score_flat(windows))
    drift = {"reference": name, **drift_between(scores, expected)}
    table = "; ".join(
        f"{measure} " + " ".join(f"{key} {drift[measure][key]:.1e}" for key in STATISTICS) for measure in MEASURES
    )
    print(f"self-check of {drift['rows']} rows against {name}: {table}", file=sys.stderr)
    gold, probs = LIMITS[engine.config.dtype]
    if not (drift["gold_logprob"]["p50"] <= gold and drift["probs"]["p99"] <= probs):
        raise DriftError(
            f"the engine differs from {name} by {drift['gold_logprob']['p50']:.2g} nats in half of the gold "
            f"log-probabilities (limit {gold}) and by {drift['probs']['p99']:.2g} in 1 % of the sorted probabilities "
            f"(limit {probs}): its rows would be wrong. --self_check 0 builds without this check"
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


def _is_approximate(engine: Engine) -> bool:
    """Whether the engine is anything else than the reference itself."""
    return engine.describe()["name"] != "transformers" or engine.config.dtype != "float32"


def _reference(config: EngineConfig) -> Engine | None:
    """transformers in float32 on the CPU, not loaded yet, where it fits."""
    files = next(filter(None, (list(Path(config.model).glob(pattern)) for pattern in WEIGHT_PATTERNS)), [])
    size = sum(file.stat().st_size for file in files) * 4 / (4 if config.dtype == "float32" else WEIGHT_BYTES)
    if not files or config.arguments.get("load_format") == "dummy":
        return None
    if size > min(LARGEST_REFERENCE, SHARE_OF_MEMORY * _available_memory()):
        return None
    from cache_builder.engines.transformers import TransformersEngine

    return TransformersEngine(dataclasses.replace(config, dtype="float32", rank_edges=None, arguments={}), device="cpu")


def _available_memory() -> float:
    """Bytes; what Linux says is available, else no limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), float("inf"))
