"""The self-check: what it measures, what it stops, and that its drift reaches records and manifest."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_teacher import write_corpus

from cache_builder.build_config import BuildConfig
from cache_builder.builder import build
from cache_builder.engines.base import WindowScores
from cache_builder.engines.transformers import TransformersEngine
from cache_builder.preparation import prepare
from cache_builder.self_check import drift_between
from cache_builder.shard_worker import ShardWorker
from storage_specs.drift import drift_problem, worst_drift
from storage_specs.errors import DriftError
from storage_specs.windows import Window


def scores_of(gold: list[float], probs: list[list[float]]) -> WindowScores:
    rows = np.array(probs, np.float32)
    return WindowScores(
        gold_logprob=np.array(gold, np.float32),
        probs=rows,
        token_ids=np.zeros(rows.shape, np.int64),
        tail_mass=1 - rows.sum(1),
    )


def test_drift_is_the_difference_row_by_row() -> None:
    drift = drift_between([scores_of([-1.0, -2.0], [[0.5], [0.25]])], [scores_of([-1.5, -2.0], [[0.25], [0.25]])])
    assert drift["rows"] == 2
    assert drift["gold_logprob"]["max"] == pytest.approx(0.5)
    assert drift["gold_logprob"]["p50"] == pytest.approx(0.25)
    assert drift["probs"]["max"] == pytest.approx(0.25)
    assert drift["logprobs"]["max"] == pytest.approx(np.log(2))
    whole = {"reference": "a", **drift}
    assert drift_problem(whole) is None
    assert drift_problem(whole | {"rows": "2"}) is not None
    smaller = whole | {"reference": "b", "probs": {"p50": 1.0, "p99": 0.0, "max": 0.0}}
    worst = worst_drift([whole, None, smaller, whole])
    assert (worst["reference"], worst["rows"]) == ("a; b", 4)
    assert worst["probs"] == {"p50": 1.0, "p99": drift["probs"]["p99"], "max": drift["probs"]["max"]}
    assert worst_drift([None]) is None


@pytest.fixture
def config(tmp_path: Path, teacher: Path) -> BuildConfig:
    return BuildConfig(
        teacher=str(teacher),
        corpus=str(write_corpus(tmp_path / "corpus.jsonl", ["Bern is a city. " * 4, "The river Aare."])),
        output=tmp_path / "cache",
        engine="transformers",
        dtype="bfloat16",
    )


def test_a_rounded_engine_states_its_drift(config: BuildConfig) -> None:
    drift = build(config).manifest.drift
    assert drift["reference"] == "transformers float32"
    assert drift["rows"] > 20
    assert 0 < drift["gold_logprob"]["p50"] < 0.1


def test_float32_transformers_is_the_reference_itself(config: BuildConfig) -> None:
    assert build(dataclasses.replace(config, dtype="float32")).manifest.drift is None


def test_wrong_rows_stop_the_build_unless_it_is_told_not_to_look(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shift by one, the classic mistake, in the engine but not in its reference."""
    right = TransformersEngine.score

    def shifted(self: TransformersEngine, windows: Iterable[Window]) -> Iterator[WindowScores]:
        for scores in right(self, windows):
            if self.config.dtype == "float32":
                yield scores
            else:
                yield dataclasses.replace(scores, gold_logprob=np.roll(scores.gold_logprob, 1))

    monkeypatch.setattr(TransformersEngine, "score", shifted)
    with pytest.raises(DriftError, match="its rows would be wrong"):
        build(config)
    assert build(dataclasses.replace(config, self_check=0)).manifest.drift is None


def test_of_several_workers_the_first_checks_once(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    monkeypatch.setattr("cache_builder.shard_worker.check_engine", lambda *arguments: looked.append(arguments[-1]))
    recipe = prepare(config).recipe
    for number, expected in ((0, [recipe.self_check]), (1, [])):
        worker = ShardWorker(recipe.of_worker(number))
        for _ in range(2):
            worker.drift((0, []))
        assert looked == expected
        looked.clear()
