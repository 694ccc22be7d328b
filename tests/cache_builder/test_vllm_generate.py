"""Mode generate with vLLM (CPU build, about a minute): rows of sampled tokens against a brute-force forward pass.

In a process of its own, like the tests of scoring; once through the rows that the worker keeps, once through the public
fallback.
"""

import os
import pickle
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from cache_builder.engines.base import EngineConfig
from cache_builder.engines.generating import Generation, Prompt
from cache_builder.engines.vllm_sampled import SampledRows, flat_rows_of, hook_sampler, release_sampler, rows_of
from cache_builder.sampling import Sampling
from storage_specs.sketch import bin_masses, log_rank_edges
from storage_specs.vocabulary import token_bytes

K = 20
EDGES = tuple(log_rank_edges(K, 49152, 16).tolist())
ENVIRONMENT = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
GENERATE = """
import dataclasses, pickle, sys
from cache_builder.engines import make_engine
if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        config, words, cases = pickle.load(file)
    engine, made = make_engine("vllm", config), []
    for kept in (False, True):
        for sampling, prompts in cases:
            generator = engine.generator(sampling, words)
            engine.config = config if kept else dataclasses.replace(config, rank_edges=None)
            generator.kept = kept
            made.append(list(generator.generate(iter(prompts))))
    with open(sys.argv[2], "wb") as file:
        pickle.dump(made, file)
    engine.close()
"""


def prompt_of(ids: list[int], max_tokens: int) -> Prompt:
    return Prompt(ids=np.array(ids), text="", turns=None, seed=7, max_tokens=max_tokens)


def test_rows_are_the_models_own_whatever_the_sampling(smollm2_path: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_path)
    questions = ["Say hi in one word.", "Name a river in Bern.", "What is 2 + 2?"]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for text in questions
    ]
    cases = [
        (Sampling(temperature=0.0, stop_token_ids=(2,)), [prompt_of(ids, 12) for ids in prompts]),
        (
            Sampling(temperature=1.5, top_p=0.8, top_k=30, stop_token_ids=(2,)),
            [prompt_of(ids, 9) for ids in prompts * 4],
        ),
        (Sampling(temperature=0.0, stop=("e",), stop_token_ids=(2,)), [prompt_of(prompts[1], 30)]),
    ]
    config = EngineConfig(
        model=str(smollm2_path),
        dtype="float32",
        max_model_len=128,
        k=K,
        vocab_size=49152,
        rank_edges=EDGES,
        arguments={"enforce_eager": True, "max_num_seqs": "2"},
    )
    words = token_bytes(tokenizer)
    (tmp_path / "in").write_bytes(pickle.dumps((config, words, cases)))
    command = [sys.executable, "-c", GENERATE, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, env=ENVIRONMENT, check=False)
    assert done.returncode in (0, -signal.SIGABRT)
    made: list[list[Generation]] = pickle.loads((tmp_path / "out").read_bytes())
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    for (sampling, asked), answers in zip(cases * 2, made, strict=True):
        assert len(answers) == len(asked)
        for prompt, answer in zip(asked, answers, strict=True):
            assert_brute_force(model, prompt, answer)
            if not sampling.temperature:
                assert_greedy(model, prompt, answer)
            assert answer.ended == (answer.ids[-1] == 2)
            assert (answer.finish_reason == "length") == (len(answer.ids) == prompt.max_tokens and not answer.ended)
    assert len({tuple(answer.ids) for answer in made[1]}) > 3
    assert all((answer.scores.tail_bins is not None) == (case >= 3) for case in range(6) for answer in made[case])
    for one, two in zip(made[0] + made[2], made[3] + made[5], strict=True):
        assert one.ids.tolist() == two.ids.tolist()
        np.testing.assert_allclose(one.scores.probs, two.scores.probs, atol=1e-5)
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
            bins_J = bin_masses(sorted_V[None], np.array(EDGES))[0]
            np.testing.assert_allclose(scores.tail_bins[row], bins_J, atol=1e-4)


def assert_greedy(model: Any, prompt: Prompt, answer: Generation) -> None:
    log_probs_GV = log_probs(model, prompt, answer)
    gap_G = log_probs_GV.max(axis=1) - log_probs_GV[np.arange(len(answer.ids)), answer.ids]
    assert (gap_G < 1e-3).all()


def test_rows_that_are_laid_out_otherwise_are_refused() -> None:
    flat = types.SimpleNamespace(token_ids=[3, 1, 2, 3, 2, 1], logprobs=[-1.0, -0.5, -1.5] * 2)
    ids, values = flat_rows_of(flat, np.array([3, 3]), 2)
    assert (ids.tolist(), values.dtype) == ([[3, 1, 2], [3, 2, 1]], np.float32)
    for wrong in ([3], [3, 1]):
        with pytest.raises(ValueError, match="rows for"):
            flat_rows_of(flat, np.array(wrong), 2)


def test_a_worker_gives_the_rows_of_a_request_once_and_drops_what_comes_late() -> None:
    """Two requests, the second of which reads its prompt in the first step; names end where vLLM adds its own."""
    rows, generator = SampledRows(2, (2, 5)), torch.Generator().manual_seed(0)
    logits_SBV = torch.randn(4, 2, 5, generator=generator)
    for step, logits_BV in enumerate(logits_SBV):
        sampled_B = torch.tensor([step, 4 - step])
        rows.keep(["a#-12ab", "b#"], logits_BV, sampled_B, torch.tensor([True, step > 0]))
    answer, other = rows.take(["a", "b"])
    values_GW, ids_GK = rows_of(answer, np.array([0, 1, 2]), 2, 1)
    sorted_GV = logits_SBV[:3, 0].log_softmax(-1).sort(descending=True)
    np.testing.assert_allclose(values_GW[:, 1:3], sorted_GV.values[:, :2], atol=1e-6)
    np.testing.assert_allclose(values_GW[:, 3], 1 - sorted_GV.values[:, :2].exp().sum(1), atol=1e-6)
    np.testing.assert_allclose(values_GW[:, 0], logits_SBV[:3, 0].log_softmax(-1).diagonal(), atol=1e-6)
    assert ids_GK.tolist() == sorted_GV.indices[:, :2].tolist()
    assert rows_of(other, np.array([3, 2, 1]), 2, 1)[0].shape == (3, 4)
    for wrong in ([0, 1, 2, 3, 4], [1, 1]):
        with pytest.raises(ValueError, match="which are not"):
            rows_of(answer, np.array(wrong), 2, 1)
    rows.keep(["a#-12ab"], logits_SBV[0, :1], torch.tensor([0]), torch.tensor([True]))
    assert rows.take(["c"])[0][0] == 0
    assert not rows.open


class Sampler:
    """As the V2 runner's: takes logits, and may change them in place."""

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
        sampled_B1 = logits.argmax(dim=1, keepdim=True)
        logits.zero_()
        return types.SimpleNamespace(sampled_token_ids=sampled_B1, num_sampled=torch.ones(len(logits)))


def test_the_v2_sampler_is_seen_and_let_go() -> None:
    runner = types.SimpleNamespace(sampler=Sampler(), prompt_logprobs_worker=None)
    batch = types.SimpleNamespace(req_ids=["a#", "b#"])
    logits_BV = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # hooked anew, it is hooked once
        rows = SampledRows(3, None)
        hook_sampler(runner, rows)
    output = runner.sampler(logits_BV.clone(), batch)
    (answer,) = rows.take(["b"])
    values_GW, _ = rows_of(answer, output.sampled_token_ids[1].numpy(), 3, 0)
    expected_V = logits_BV[1].log_softmax(-1)
    np.testing.assert_allclose(values_GW[0], expected_V.max().repeat(1).tolist() + expected_V.topk(3).values.tolist())
    release_sampler(runner)
    assert type(runner.sampler) is Sampler
    with pytest.raises(TypeError, match="expected self, logits, input_batch"):
        hook_sampler(types.SimpleNamespace(sampler=len, prompt_logprobs_worker=None), rows)
