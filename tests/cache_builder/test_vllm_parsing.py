"""The vllm engine without vLLM: flat log-probs and sampled rows are parsed, and what cannot be is refused."""

import sys
import types
from typing import Any

import numpy as np
import pytest
from vllm_windows import window_of

from cache_builder.engines import make_engine
from cache_builder.engines.base import EngineConfig
from cache_builder.engines.vllm import RESERVED, parse_flat
from cache_builder.engines.vllm_sampled import SampledRows, rows_of
from cache_builder.main import main
from storage_specs.errors import ConfigError, EngineError


def test_arguments_that_the_builder_decides_are_reserved() -> None:
    config = EngineConfig(
        model="m", dtype="float32", max_model_len=8, k=2, vocab_size=9, arguments={"max_logprobs": "5"}
    )
    assert "max_logprobs" in RESERVED
    with pytest.raises(ConfigError, match="max_logprobs is not passed to vLLM"):
        make_engine("vllm", config)


def test_a_missing_or_old_vllm_is_an_engine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model="m", dtype="float32", max_model_len=8, k=2, vocab_size=9)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match=r"pip install \.\[teacher\]"):
        make_engine("vllm", config)
    old = types.ModuleType("vllm")
    old.__version__ = "0.9.2.dev1+cpu"
    monkeypatch.setitem(sys.modules, "vllm", old)
    with pytest.raises(EngineError, match=r"vLLM 0\.9\.2.* is too old"):
        make_engine("vllm", config)


def test_vllm_flags_without_vllm_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache_builder.engines.vllm.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="unknown option 'documents_per_shards'; did you mean 'documents_per_shard'"):
        main(["build", "--teacher", "x", "--corpus", "y", "--output", "z", "--documents-per-shards", "3"])


def flat_of(entries: list[list[tuple[int, float]]]) -> Any:
    """What vLLM's FlatLogprobs holds for positions 0, 1, ..."""
    starts = np.cumsum([0, *map(len, entries)])[:-1].tolist()
    joined = [entry for position in entries for entry in position]
    return types.SimpleNamespace(
        start_indices=starts, token_ids=[token for token, _ in joined], logprobs=[value for _, value in joined]
    )


def test_flat_logprobs_are_parsed_by_position_and_their_shape_is_checked() -> None:
    config = EngineConfig(model="m", dtype="float32", max_model_len=8, k=2, vocab_size=9)
    a, b, c = float(np.log(0.5)), float(np.log(0.25)), float(np.log(0.125))
    entries = [[], [(5, c), (7, b), (3, a)], [(7, a), (7, a), (1, b)], [(2, b), (2, b), (1, b)]]
    window = window_of([4, 5, 7, 2])
    scores = parse_flat(flat_of(entries), window, config)
    np.testing.assert_allclose(scores.gold_logprob, [c, a, b])
    np.testing.assert_allclose(scores.probs, [[0.5, 0.25], [0.5, 0.25], [0.25, 0.25]])
    assert scores.token_ids.tolist() == [[3, 7], [7, 1], [1, 2]]
    np.testing.assert_allclose(scores.tail_mass, [0.25, 0.25, 0.5])
    assert parse_flat(flat_of(entries), window_of([4, 5, 7, 2], every=2), config).token_ids.tolist() == [[3, 7], [1, 2]]
    for wrong in (entries[:3], [*entries, entries[1]], [[], entries[1], entries[2], entries[3][:2]]):
        with pytest.raises(EngineError, match="expected 3 for each token after the first"):
            parse_flat(flat_of(wrong), window, config)
    with pytest.raises(EngineError, match="not that of the prompt's own token"):
        parse_flat(flat_of(entries), window_of([4, 5, 6, 2]), config)


def test_rows_that_are_laid_out_otherwise_are_refused() -> None:
    ids, values = np.array([[3, 1, 2]]), np.array([[-1.0, -0.5, -1.5]])
    good = rows_of(SampledRows([(ids, values), (ids, values)]), 2)
    assert (good[0].shape, good[1].dtype) == ((2, 3), np.float32)
    wide = rows_of(SampledRows([(np.array([[3, 1, 2, 9]]), np.zeros((1, 4)))]), 2)
    assert wide[0].tolist() == [[3, 1, 2]]
    with pytest.raises(ValueError, match="expected 4 wide"):
        rows_of(SampledRows([(ids, values)]), 3)
