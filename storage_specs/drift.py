"""The engine's measured drift: how far the rows that were scored lie from an independent forward pass.

A builder measures it on the first documents of every run and puts it into the records of the shards that this run
writes; the manifest has the worst over all shards. A drift is a JSON object: `reference` (what the engine was compared
with), `rows` (how many were), and for each of MEASURES the `p50`, `p99` and `max` of absolute differences:

    gold_logprob  log-probability of the token that followed, nats
    logprobs      sorted log-probabilities of the top k, nats
    probs         sorted probabilities of the top k
"""

from collections.abc import Iterable
from typing import Any

MEASURES = ("gold_logprob", "logprobs", "probs")
STATISTICS = ("p50", "p99", "max")


def drift_problem(drift: Any) -> str | None:
    """What is wrong with a drift, or None; a cache without one (None) is fine."""
    if drift is None:
        return None
    good = (
        isinstance(drift, dict)
        and set(drift) == {"reference", "rows", *MEASURES}
        and isinstance(drift["reference"], str)
        and type(drift["rows"]) is int
        and all(isinstance(drift[name], dict) and set(drift[name]) == set(STATISTICS) for name in MEASURES)
        and all(
            type(drift[name][key]) in (int, float) and drift[name][key] >= 0 for name in MEASURES for key in STATISTICS
        )
    )
    return None if good else f"drift is {drift!r:.200}"


def worst_drift(drifts: Iterable[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The largest of every statistic over several runs, each of which counts once; None where none measured any."""
    runs = {repr(drift): drift for drift in drifts if drift is not None}.values()
    if not runs:
        return None
    return {
        "reference": "; ".join(sorted({run["reference"] for run in runs})),
        "rows": sum(run["rows"] for run in runs),
        **{name: {key: max(run[name][key] for run in runs) for key in STATISTICS} for name in MEASURES},
    }
