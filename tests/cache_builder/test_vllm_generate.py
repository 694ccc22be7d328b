"""Mode generate with vLLM (CPU build, about a minute): rows of sampled tokens against a brute-force forward pass.

In a process of its own, like the tests of scoring; once through the kept arrays, once through the public fallback.
"""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from cache_builder.engines.base import EngineConfig
from cache_builder.engines.generating import Generation, Prompt
from cache_builder.engines.vllm_sampled import SampledRows, rows_of
from cache_builder.sampling import Sampling
from storage_specs.vocabulary import token_bytes

K = 20
ENVIRONMENT = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
GENERATE = """
import pickle, sys
from cache_builder.engines import make_engine, vllm_generate
if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        config, words, cases = pickle.load(file)
    engine, made = make_engine("vllm", config), []
    for keep in (False, True):
        problem = None if keep else "the test wants the public way"
        original = vllm_generate.keep_sampled_rows
        vllm_generate.keep_sampled_rows = original if keep else lambda: problem
        for sampling, prompts in cases:
            made.append(list(engine.generator(sampling, words).generate(iter(prompts))))
        vllm_generate.keep_sampled_rows = original
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


def assert_greedy(model: Any, prompt: Prompt, answer: Generation) -> None:
    log_probs_GV = log_probs(model, prompt, answer)
    gap_G = log_probs_GV.max(axis=1) - log_probs_GV[np.arange(len(answer.ids)), answer.ids]
    assert (gap_G < 1e-3).all()


def test_rows_that_are_laid_out_otherwise_are_refused() -> None:
    ids, values = np.array([[3, 1, 2]]), np.array([[-1.0, -0.5, -1.5]])
    good = rows_of(SampledRows([(ids, values), (ids, values)]), 2)
    assert (good[0].shape, good[1].dtype) == ((2, 3), np.float32)
    wide = rows_of(SampledRows([(np.array([[3, 1, 2, 9]]), np.zeros((1, 4)))]), 2)
    assert wide[0].tolist() == [[3, 1, 2]]
    with pytest.raises(ValueError, match="expected 4 wide"):
        rows_of(SampledRows([(ids, values)]), 3)
