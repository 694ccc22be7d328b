"""The vllm engine, for real (CPU build; about a minute): scoring on both models, and sampling, against brute force.

Run alone: `python -m pytest tests/cache_builder/test_vllm_engine.py`. vLLM lives in one process of its own, so that its
threads, signal handlers and warnings do not reach the other tests; starting it takes most of the time.
"""

import os
import pickle
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from vllm_windows import window_of

from cache_builder.engines.base import EngineConfig, WindowScores
from cache_builder.engines.generating import Generation, Prompt
from cache_builder.sampling import Sampling
from storage_specs.sketch import bin_masses, log_rank_edges
from storage_specs.vocabulary import token_bytes

K = 64
TEXTS = [
    "The river Aare flows through Bern.\n日本語, 😀!",
    "Water boils at 100 °C at sea level; on Mont Blanc at 85 °C.",
]
QUESTIONS = ["Say hi in one word.", "Name a river in Bern.", "What is 2 + 2?"]
MODELS = ("smollm2_path", "gemma_path")
ENVIRONMENT = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
REFUSED = {
    (
        "--gpu_memory_utilisation",
        "0.5",
    ): "unknown option 'gpu_memory_utilisation'; did you mean 'gpu_memory_utilization'",
    ("--enable-prefix-caching",): "enable_prefix_caching is not passed to vLLM: it is decided by the builder (off",
    ("--max-num-seqs", "many"): "vLLM does not take --max-num-seqs many",
}
# argv: files in and out. Refused commands, then windows of each model scored, then prompts of the first one answered:
# once by the public way, which knows no tail bins, once with the rows that the worker keeps.
CHILD = """
import dataclasses, pickle, sys
from cache_builder.engines import make_engine, make_generator
from cache_builder.main import main
from storage_specs.errors import ConfigError
if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        command, refused, runs, words, cases = pickle.load(file)
    answers, scored, made = [], [], []
    for flags in refused:
        try:
            main([*command, *flags])
        except ConfigError as error:
            answers.append(str(error))
    for config, windows in runs:
        engine = make_engine("vllm", config)
        rows = list(engine.score(iter(windows)))
        scored.append((engine.describe(), engine.flat_reason, rows, list(engine.score_flat(windows))))
        if not made:
            for kept in (False, True):
                engine.config = config if kept else dataclasses.replace(config, rank_edges=None)
                for sampling, prompts in cases:
                    generator = make_generator("vllm", engine, sampling, words)
                    generator.kept = kept
                    made.append(list(generator.generate(iter(prompts))))
        engine.close()
    with open(sys.argv[2], "wb") as file:
        pickle.dump((answers, scored, made), file)
"""


class Found(NamedTuple):
    """What the process was asked, and what it answered."""

    windows: dict[str, list[Any]]
    cases: list[tuple[Sampling, list[Prompt]]]
    words: list[bytes | None]
    refusals: list[str]
    scored: dict[str, tuple[dict[str, Any], str | None, list[WindowScores], list[WindowScores]]]
    made: list[list[Generation]]


@cache
def loaded(folder: Path) -> tuple[Any, Any]:
    """(tokenizer, float32 model) of the brute force."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def windows_of(folder: Path) -> list[Any]:
    tokenizer, teacher = loaded(folder)
    bos = [2] if teacher.config.model_type == "gemma3_text" else []
    one, two = ([*bos, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in TEXTS)
    end = teacher.config.eos_token_id
    return [window_of([*one, end]), window_of([*two, end], every=3), window_of([*two, end][:2])]


def config_of(folder: Path) -> EngineConfig:
    vocab_size = loaded(folder)[1].config.vocab_size
    return EngineConfig(
        model=str(folder),
        dtype="float32",
        max_model_len=128,
        k=K,
        vocab_size=vocab_size,
        rank_edges=tuple(log_rank_edges(K, vocab_size, 16).tolist()),
        arguments={"enforce_eager": True, "max_num_batched_tokens": "16", "max_num_seqs": "2"},
    )


def cases_of(folder: Path) -> list[tuple[Sampling, list[Prompt]]]:
    tokenizer, _ = loaded(folder)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for text in QUESTIONS
    ]
    return [
        (Sampling(temperature=0.0, stop_token_ids=(2,)), [prompt_of(ids, 12) for ids in prompts]),
        (
            Sampling(temperature=1.5, top_p=0.8, top_k=30, stop_token_ids=(2,)),
            [prompt_of(ids, 9) for ids in prompts * 4],
        ),
        (Sampling(temperature=0.0, stop=("e",), stop_token_ids=(2,)), [prompt_of(prompts[1], 30)]),
    ]


def prompt_of(ids: list[int], max_tokens: int) -> Prompt:
    return Prompt(ids=np.array(ids), text="", turns=None, seed=7, max_tokens=max_tokens)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("vllm")
    models = {name: request.getfixturevalue(name) for name in MODELS}
    windows = {name: windows_of(model) for name, model in models.items()}
    first = models[MODELS[0]]
    cases, words = cases_of(first), token_bytes(loaded(first)[0])
    (folder / "a.txt").write_text("hello")
    values = {"teacher": first, "corpus": folder / "a.txt", "output": folder / "cache", "engine": "vllm"}
    command = ["build", *(f"--{name}={value}" for name, value in values.items())]
    runs = [(config_of(model), windows[name]) for name, model in models.items()]
    (folder / "in").write_bytes(pickle.dumps((command, list(REFUSED), runs, words, cases)))
    child = [sys.executable, "-c", CHILD, str(folder / "in"), str(folder / "out")]
    done = subprocess.run(child, env=ENVIRONMENT, check=False)
    assert done.returncode in (0, -signal.SIGABRT)
    assert not (folder / "cache").exists()
    refusals, scored, made = pickle.loads((folder / "out").read_bytes())
    return Found(windows, cases, words, refusals, dict(zip(models, scored, strict=True)), made)


def test_wrong_arguments_are_refused_before_the_output_folder_is_touched(found: Found) -> None:
    assert len(found.refusals) == len(REFUSED)
    for answer, message in zip(found.refusals, REFUSED.values(), strict=True):
        assert message in answer


@pytest.mark.parametrize("model", MODELS)
def test_every_row_equals_the_brute_force_forward(model: str, found: Found, request: pytest.FixtureRequest) -> None:
    """Both in float32: probabilities within 1e-4, gold log-probabilities and tail mass within 5e-4."""
    _, teacher = loaded(request.getfixturevalue(model))
    description, flat_reason, scored, flat = found.scored[model]
    assert flat_reason is None
    assert (description["name"], description["dtype"], description["arguments"]) == ("vllm", "float32", {})
    for window, scores, public in zip(found.windows[model], scored, flat, strict=True):
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


def test_generated_rows_are_the_models_own_whatever_the_sampling(found: Found, smollm2_path: Path) -> None:
    cases, made, words = found.cases, found.made, found.words
    _, model = loaded(smollm2_path)
    for (sampling, asked), answers in zip(cases * 2, made, strict=True):
        assert len(answers) == len(asked)
        for prompt, answer in zip(asked, answers, strict=True):
            assert_brute_force(model, prompt, answer)
            if not sampling.temperature:
                assert_greedy(model, prompt, answer)
            assert answer.ended == (answer.ids[-1] == 2)
            assert (answer.finish_reason == "length") == (len(answer.ids) == prompt.max_tokens and not answer.ended)
    assert all((answer.scores.tail_bins is not None) == (case >= 3) for case in range(6) for answer in made[case])
    assert len({tuple(answer.ids) for answer in made[1]}) > 3
    for one, two in zip(made[0] + made[2], made[3] + made[5], strict=True):
        assert one.ids.tolist() == two.ids.tolist()
        # vLLM's own probabilities, and ours: its sum over the words is 2e-5 off on a CPU without AVX-512.
        np.testing.assert_allclose(
            *(scores.probs / scores.probs[:, :1] for scores in (one.scores, two.scores)), atol=1e-5
        )
        np.testing.assert_allclose(one.scores.probs, two.scores.probs, atol=1e-4)
    (stopped,) = made[2]
    assert (stopped.finish_reason, stopped.stop_reason, stopped.ended) == ("stop", "e", False)
    text = b"".join(words[token] or b"" for token in stopped.ids)
    assert b"e" in (words[stopped.ids[-1]] or b"")
    assert text.count(b"e") == (words[stopped.ids[-1]] or b"").count(b"e")


def log_probs(model: Any, prompt: Prompt, answer: Generation) -> np.ndarray:
    with torch.inference_mode():
        logits_LV = model(torch.tensor([[*prompt.ids, *answer.ids]])).logits[0]
    return logits_LV[len(prompt.ids) - 1 : -1].double().log_softmax(-1).numpy()


def assert_brute_force(model: Any, prompt: Prompt, answer: Generation) -> None:
    log_probs_GV = log_probs(model, prompt, answer)
    scores = answer.scores
    assert scores.probs.shape == scores.token_ids.shape == (len(answer.ids), K)
    for row, token in enumerate(answer.ids):
        sorted_V = np.sort(np.exp(log_probs_GV[row]))[::-1]
        np.testing.assert_allclose(scores.probs[row], sorted_V[:K], atol=1e-4)
        np.testing.assert_allclose(scores.tail_mass[row], sorted_V[K:].sum(), atol=5e-4)
        np.testing.assert_allclose(scores.gold_logprob[row], log_probs_GV[row, token], atol=1e-3)
        if scores.tail_bins is not None:
            bins_J = bin_masses(sorted_V[None], log_rank_edges(K, len(sorted_V), 16))[0]
            np.testing.assert_allclose(scores.tail_bins[row], bins_J, atol=1e-4)


def assert_greedy(model: Any, prompt: Prompt, answer: Generation) -> None:
    log_probs_GV = log_probs(model, prompt, answer)
    gap_G = log_probs_GV.max(axis=1) - log_probs_GV[np.arange(len(answer.ids)), answer.ids]
    assert (gap_G < 1e-3).all()
