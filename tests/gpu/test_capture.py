"""The capture on a CUDA device: the reduction against a full sort, its memory, the vllm engine against transformers.

Collected only by `bash scripts/test_gpu.sh`; the engine's test also needs vLLM for CUDA. One engine start, about a
minute on an H100:  bash scripts/test_gpu.sh tests/gpu/test_capture.py
"""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from naive_reduction import assert_rows_equal_a_full_sort

from cache_builder.engines.base import EngineConfig, WindowScores
from cache_builder.engines.generating import Prompt
from cache_builder.engines.reduction import reduce_rows
from cache_builder.engines.vllm_capture import BLOCK_BYTES, Capture
from cache_builder.sampling import Sampling
from storage_specs.sketch import bin_masses, log_rank_edges
from storage_specs.windows import Window

K, BINS, VOCABULARY = 64, 16, 5000
EDGES = tuple(log_rank_edges(K, VOCABULARY, BINS).tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("vocabulary", "k", "spread"), [(151936, 64, 3.0), (151936, 128, 0.04), (262144, 256, 4.0), (1000, 256, 1.0)]
)
def test_rows_equal_a_full_sort(vocabulary: int, k: int, spread: float, dtype: torch.dtype) -> None:
    """Log-probabilities and ids as sorted, every bin within 1e-4, and all bins together the tail.

    Of 16-bit logits many tie, and a step of the histogram that holds an edge is split as if they did not: 2.2e-4 seen
    on an H100. The engine's own logits are float32 unless it is told otherwise.
    """
    generator = torch.Generator("cuda").manual_seed(k)
    padded_BV = spread * torch.randn(64, vocabulary + 64, device="cuda", generator=generator)
    logits_BV = padded_BV.to(dtype)[:, :vocabulary]
    target_B = torch.randint(0, vocabulary, (64,), device="cuda", generator=generator)
    edges = log_rank_edges(k, vocabulary, BINS)
    rows = reduce_rows(logits_BV, target_B, k, tuple(edges.tolist()))
    tolerance = 1e-4 if dtype == torch.float32 else 4e-4
    assert_rows_equal_a_full_sort(*rows, logits_BV, target_B, k, edges, tolerance)


def test_memory_is_bounded_at_the_largest_vocabulary() -> None:
    """A step of 8,192 tokens, k = 256 of 262,144 words with a sketch: one block of logits, and the rows."""
    vocabulary, k, tokens, width = 262_144, 256, 8192, 64
    capture = Capture(k, tuple(log_rank_edges(k, vocabulary, BINS).tolist()), vocabulary, keeps=True)
    head_VD = torch.randn(vocabulary, width, device="cuda")
    hidden_ND = torch.randn(tokens, width, device="cuda")
    target_N = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    values_NW, ids_NK = capture.rows(lambda hidden: hidden @ head_VD.T, hidden_ND, target_N)
    rows = values_NW.nbytes + ids_NK.nbytes
    workspace = 64 << 20  # cuBLAS
    assert torch.cuda.max_memory_allocated() - before <= BLOCK_BYTES["cuda"] + 2 * rows + workspace


ENGINE = """
import pickle, sys
from cache_builder.engines import gpu_count, make_generator
from cache_builder.engines.vllm import VllmEngine
if __name__ == "__main__":
    assert gpu_count()  # as a build does before: a process forked after this could not use CUDA
    config, windows, cases = pickle.loads(open(sys.argv[1], "rb").read())
    engine = VllmEngine(config)
    rows, flat = list(engine.score(iter(windows))), list(engine.score_flat(windows))
    made, kept = [], []
    for sampling, prompts in cases:
        generator = make_generator("vllm", engine, sampling, [])
        made.append(list(generator.generate(iter(prompts))))
        kept.append(generator.kept)
    open(sys.argv[2], "wb").write(pickle.dumps((engine.flat_reason, rows, flat, kept, made)))
    engine.close()
"""


def test_vllm_rows_equal_transformers(tmp_path: Path) -> None:
    """A tiny random Qwen3 in bfloat16, prompts longer than a step and several to a step; then its own completions.

    The same seeds give the same completions whatever runs beside them; a greedy one is the model's own choice.
    """
    torch.manual_seed(0)
    shape = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=512, initializer_range=0.3, eos_token_id=None,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(shape).bfloat16()
    model.save_pretrained(tmp_path / "model")
    config = EngineConfig(
        model=str(tmp_path / "model"), dtype="bfloat16", max_model_len=512, k=K, vocab_size=VOCABULARY,
        rank_edges=EDGES,
        arguments={
            "enforce_eager": True, "max_num_batched_tokens": "128", "max_num_seqs": "16",
            "gpu_memory_utilization": "0.1", "kv_cache_memory_bytes": str(1 << 30),  # whatever else the GPU holds
        },
    )  # fmt: skip
    generator = np.random.default_rng(0)
    windows = [_window(generator.integers(0, VOCABULARY, size)) for size in (500, 300, 2, 129, 128, 511)]
    prompts = [
        Prompt(ids=generator.integers(0, VOCABULARY, 40 + number), text="", turns=None, seed=number, max_tokens=30)
        for number in range(40)
    ]
    greedy, drawn = Sampling(temperature=0.0, max_tokens=30), Sampling(temperature=1.5, top_p=0.9, max_tokens=30)
    cases = [(greedy, prompts), (drawn, prompts), (drawn, prompts[::-1])]
    (tmp_path / "in").write_bytes(pickle.dumps((config, windows, cases)))
    subprocess.run([sys.executable, "-c", ENGINE, tmp_path / "in", tmp_path / "out"], check=True)
    flat_reason, rows, flat, kept, made = pickle.loads((tmp_path / "out").read_bytes())
    assert flat_reason is None
    assert kept == [True, True, True]
    wide = model.float().cuda()
    for window, ours, public in zip(windows, rows, flat, strict=True):
        np.testing.assert_allclose(ours.probs, public.probs, rtol=0, atol=2e-3)  # of two runs of a bfloat16 model
        _assert_near(wide, window.ids, 0, ours)
    for (sampling, asked), answers in zip(cases, made, strict=True):
        for prompt, answer in zip(asked, answers, strict=True):
            _assert_near(wide, np.concatenate([prompt.ids, answer.ids]), len(prompt.ids) - 1, answer.scores)
            if not sampling.temperature:
                assert np.mean(answer.scores.token_ids[:, 0] == answer.ids) > 0.9  # ties, and rounding between passes
    again = [answer.ids.tolist() for answer in made[2]][::-1]
    assert np.mean([one.ids.tolist() == two for one, two in zip(made[1], again, strict=True)]) > 0.5


def _assert_near(model: torch.nn.Module, ids_L: np.ndarray, first: int, scores: WindowScores) -> None:
    """Rows from position `first` on, within what bfloat16 costs."""
    with torch.inference_mode():
        logits_LV = model(torch.from_numpy(ids_L).cuda()[None]).logits[0, first:-1]
    logprobs_LV = logits_LV.double().log_softmax(-1)
    sorted_LV = logprobs_LV.exp().sort(descending=True).values.cpu().numpy()
    assert np.abs(scores.probs - sorted_LV[:, :K]).mean() < 1e-3
    assert np.abs(scores.tail_bins - bin_masses(sorted_LV, np.array(EDGES))).mean() < 2e-3
    gold_L = logprobs_LV.cpu().numpy()[np.arange(len(logprobs_LV)), ids_L[first + 1 :]]
    assert np.abs(scores.gold_logprob - gold_L).mean() < 0.1
    np.testing.assert_allclose(scores.tail_bins.sum(1), scores.tail_mass, rtol=0, atol=1e-6)


def _window(ids_L: np.ndarray) -> Window:
    index_R = np.arange(len(ids_L) - 1)
    nothing_R = np.zeros_like(index_R)
    return Window(
        ids=ids_L.astype(np.int64), logits_index=index_R, target_ids=ids_L[1:].astype(np.int64), segment=nothing_R,
        token_start=index_R, byte_start=index_R, byte_end=index_R + 1, is_end=nothing_R.astype(bool),
        row_in_segment=index_R, first_row=0,
    )  # fmt: skip
