"""The vllm engine, for real (CPU build; about a minute: the first request compiles), and its parsing of flat log-probs.

Run alone: `python -m pytest tests/cache_builder/test_vllm_engine.py`. vLLM lives in processes of its own here, so that
its threads, signal handlers and warnings do not reach the other tests.
"""

import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from cache_builder.engines import make_engine
from cache_builder.engines.base import EngineConfig, WindowScores
from cache_builder.engines.vllm import RESERVED, parse_flat
from cache_builder.main import main
from storage_specs.errors import ConfigError, EngineError
from storage_specs.sketch import bin_masses, log_rank_edges

K = 64
TEXTS = [
    "The river Aare flows through Bern.\n日本語, 😀!",
    "Water boils at 100 °C at sea level; on Mont Blanc at 85 °C.",
]
ENVIRONMENT = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
SCORE = """
import pickle, sys
from cache_builder.engines import make_engine
if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        config, windows = pickle.load(file)
    engine = make_engine("vllm", config)
    with open(sys.argv[2], "wb") as file:
        rows = list(engine.score(iter(windows)))
        pickle.dump((engine.describe(), engine.flat_reason, rows, list(engine.score_flat(windows))), file)
    engine.close()
"""


def window_of(ids: list[int], every: int = 1) -> Any:
    """All tokens after the first as rows, or every n-th of them; engines look at nothing but these three."""
    index_R = np.arange(0, len(ids) - 1, every)
    ids_L = np.array(ids, dtype=np.int64)
    return types.SimpleNamespace(ids=ids_L, logits_index=index_R, target_ids=ids_L[index_R + 1])


@pytest.mark.parametrize("model", ["smollm2_path", "gemma_path"])
def test_every_row_equals_the_brute_force_forward(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Both in float32: probabilities within 1e-4, gold log-probabilities and tail mass within 5e-4."""
    folder = request.getfixturevalue(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    bos = [2] if model == "gemma_path" else []
    sequences = [
        [*bos, *tokenizer(text, add_special_tokens=False)["input_ids"], teacher.config.eos_token_id] for text in TEXTS
    ]
    windows = [window_of(sequences[0]), window_of(sequences[1], every=3), window_of(sequences[1][:2])]
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        max_model_len=64,
        k=K,
        vocab_size=teacher.config.vocab_size,
        rank_edges=tuple(log_rank_edges(K, teacher.config.vocab_size, 16).tolist()),
        arguments={"enforce_eager": True, "max_num_batched_tokens": "16"},
    )
    (tmp_path / "in").write_bytes(pickle.dumps((config, windows)))
    command = [sys.executable, "-c", SCORE, tmp_path / "in", tmp_path / "out"]
    subprocess.run(command, env=ENVIRONMENT, check=True)
    description, flat_reason, scored, flat = pickle.loads((tmp_path / "out").read_bytes())
    assert flat_reason is None
    assert (description["name"], description["dtype"], description["arguments"]) == ("vllm", "float32", {})
    assert len(scored) == len(windows)
    for window, scores, public in zip(windows, scored, flat, strict=True):
        np.testing.assert_allclose(scores.probs, public.probs, rtol=0, atol=1e-4)
        np.testing.assert_allclose(scores.gold_logprob, public.gold_logprob, rtol=0, atol=5e-4)
        assert public.tail_bins is None
        with torch.inference_mode():
            log_probs_LV = teacher(torch.from_numpy(window.ids)[None]).logits[0].double().log_softmax(-1).numpy()
        assert_agrees(scores, window, log_probs_LV)


def assert_agrees(scores: WindowScores, window: Any, log_probs_LV: np.ndarray) -> None:
    edges = log_rank_edges(K, log_probs_LV.shape[1], 16)
    assert scores.probs.shape == scores.token_ids.shape == (len(window.logits_index), K)
    for row, index in enumerate(window.logits_index):
        sorted_V = np.sort(np.exp(log_probs_LV[index]))[::-1]
        np.testing.assert_allclose(scores.probs[row], sorted_V[:K], rtol=0, atol=1e-4)
        np.testing.assert_allclose(scores.tail_mass[row], sorted_V[K:].sum(), rtol=0, atol=5e-4)
        np.testing.assert_allclose(scores.tail_bins[row], bin_masses(sorted_V[None], edges)[0], rtol=0, atol=1e-4)
        np.testing.assert_allclose(
            np.exp(log_probs_LV[index][scores.token_ids[row]]), scores.probs[row], rtol=0, atol=1e-4
        )
        gold = log_probs_LV[index, window.ids[index + 1]]
        np.testing.assert_allclose(scores.gold_logprob[row], gold, rtol=0, atol=5e-4)


REFUSED = {
    (
        "--gpu_memory_utilisation",
        "0.5",
    ): "unknown option 'gpu_memory_utilisation'; did you mean 'gpu_memory_utilization'",
    ("--enable-prefix-caching",): "enable_prefix_caching is not passed to vLLM: it is decided by the builder (off",
    ("--max-num-seqs", "many"): "vLLM does not take --max-num-seqs many",
}
TRY_ALL = """
import sys
from cache_builder.main import main
from storage_specs.errors import ConfigError
for flags in map(str.split, sys.stdin):
    try:
        main(sys.argv[1:] + flags)
    except ConfigError as error:
        print("refused:", error)
"""


def test_wrong_arguments_are_refused_before_the_output_folder_is_touched(smollm2_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    command = ["build", "--teacher", smollm2_path, "--corpus", tmp_path / "a.txt", "--output", tmp_path / "cache"]
    done = subprocess.run(
        [sys.executable, "-c", TRY_ALL, *command, "--engine", "vllm"],
        input="\n".join(map(" ".join, REFUSED)),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    assert len(answers) == len(REFUSED)
    for answer, message in zip(answers, REFUSED.values(), strict=True):
        assert message in answer
    assert not (tmp_path / "cache").exists()


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
