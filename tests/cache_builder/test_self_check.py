"""The self-check: what it measures, what it stops, and that its drift reaches records and manifest."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tiny_teacher import write_corpus

from cache_builder.build_config import BuildConfig
from cache_builder.builder import build
from cache_builder.engines.base import WindowScores
from cache_builder.engines.generating import Generation, Prompt
from cache_builder.engines.transformers import TransformersEngine
from cache_builder.engines.transformers_generate import TransformersGenerator
from cache_builder.preparation import prepare
from cache_builder.self_check import FEW_ROWS, GENERATED, _checked, _first_prompts, drift_between
from cache_builder.shard_worker import ShardWorker
from storage_specs.drift import drift_problem, worst_drift
from storage_specs.errors import DriftError, EngineError
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


def test_a_few_rows_may_scatter_more_than_many() -> None:
    engine = SimpleNamespace(config=SimpleNamespace(dtype="bfloat16"))
    for rows, passes in ((1, True), (FEW_ROWS - 1, True), (FEW_ROWS, False)):
        ours, theirs = (scores_of([gold] * rows, [[0.5]] * rows) for gold in (-1.0, -1.3))
        if passes:
            assert _checked(engine, "another", [ours], [theirs])["rows"] == rows
        else:
            with pytest.raises(DriftError, match=r"by 0\.3 nats in half of the gold log-probabilities \(limit 0\.1\)"):
                _checked(engine, "another", [ours], [theirs])


@pytest.fixture
def generating(config: BuildConfig, tmp_path: Path) -> BuildConfig:
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "The river {n}"}}\n' for n in range(3)))
    return dataclasses.replace(config, corpus=str(tmp_path / "prompts.jsonl"), mode="generate", max_tokens=12)


def test_completions_are_checked_too(generating: BuildConfig) -> None:
    drift = build(generating).manifest.drift
    assert drift["reference"] == "transformers float32"
    assert 0 < drift["rows"] <= 36
    assert 0 < drift["gold_logprob"]["p50"] < 0.1
    exact = dataclasses.replace(generating, dtype="float32", output=f"{generating.output}-2")
    assert build(exact).manifest.drift is None


def test_wrong_rows_of_completions_stop_the_build(generating: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the sampled distribution, say, instead of the model's own."""
    right = TransformersGenerator._generate

    def sharpened(self: TransformersGenerator, prompt: Prompt) -> Generation:
        made = right(self, prompt)
        wrong = dataclasses.replace(made.scores, gold_logprob=made.scores.gold_logprob / 2)
        return dataclasses.replace(made, scores=wrong)

    monkeypatch.setattr(TransformersGenerator, "_generate", sharpened)
    with pytest.raises(DriftError, match="its rows would be wrong"):
        build(generating)
    assert build(dataclasses.replace(generating, self_check=0)).manifest.drift is None


def test_completions_to_check_are_few_and_fit() -> None:
    prompts = [
        Prompt(ids=np.arange(length), text="", turns=None, seed=0, max_tokens=room)
        for length, room in ((10, 200), (98, 200), (120, 200), (20, 5), (30, 200), (5, 200))
    ]
    asked = [(len(prompt.ids), prompt.max_tokens) for prompt in _first_prompts(prompts, 100, 250)]
    assert asked == [(10, GENERATED), (98, 2), (20, 5), (30, 21)]


def test_a_reference_that_cannot_be_loaded_does_not_stop_the_build(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of a kind for which transformers wants another library."""
    right = transformers.AutoModelForCausalLM.from_pretrained

    def load(folder: str, dtype: object, **options: object) -> object:
        if dtype == torch.float32:
            raise ImportError("Loading an AWQ quantized model requires\ngptqmodel")
        return right(folder, dtype=dtype, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    assert build(config).manifest.drift is None
    assert "no forward pass by transformers (EngineError: teacher" in capsys.readouterr().err
    with pytest.raises(EngineError, match="transformers cannot load it: Loading an AWQ"):
        build(dataclasses.replace(config, dtype="float32", output=f"{config.output}-2"))


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
