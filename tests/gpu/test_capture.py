"""The capture on a CUDA device: the reduction against a full sort, the vllm engine against transformers.

Collected only by `bash scripts/test_gpu.sh`; the engine's test also needs vLLM for CUDA.
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

from cache_builder.engines.base import EngineConfig
from cache_builder.engines.reduction import reduce_rows
from storage_specs.sketch import bin_masses, log_rank_edges
from storage_specs.windows import Window

K, BINS = 64, 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("vocabulary", "k", "spread"),
    [(49152, 64, 3.0), (151936, 64, 3.0), (151936, 128, 0.04), (262144, 256, 4.0), (1000, 256, 1.0)],
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


SCORE = """
import pickle, sys
from cache_builder.engines.vllm import VllmEngine
if __name__ == "__main__":
    config, windows = pickle.loads(open(sys.argv[1], "rb").read())
    engine = VllmEngine(config)
    rows, flat = list(engine.score(iter(windows))), list(engine.score_flat(windows))
    open(sys.argv[2], "wb").write(pickle.dumps((engine.flat_reason, rows, flat)))
    engine.close()
"""


@pytest.mark.parametrize("chunk", [128, 8192])
def test_vllm_rows_equal_transformers(chunk: int, tmp_path: Path) -> None:
    """A tiny random Qwen3 in float32, prompts longer than a step and several to a step."""
    torch.manual_seed(0)
    shape = transformers.Qwen3Config(
        vocab_size=5000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(shape).bfloat16()
    model.save_pretrained(tmp_path / "model")
    edges = tuple(log_rank_edges(K, 5000, BINS).tolist())
    config = EngineConfig(
        model=str(tmp_path / "model"), dtype="bfloat16", max_model_len=512, k=K, vocab_size=5000, rank_edges=edges,
        arguments={"enforce_eager": True, "max_num_batched_tokens": str(chunk), "gpu_memory_utilization": "0.3"},
    )  # fmt: skip
    generator = np.random.default_rng(0)
    windows = [_window(generator.integers(0, 5000, size)) for size in (500, 300, 2, 129, 128, 511)]
    (tmp_path / "in").write_bytes(pickle.dumps((config, windows)))
    subprocess.run([sys.executable, "-c", SCORE, tmp_path / "in", tmp_path / "out"], check=True)
    flat_reason, rows, flat = pickle.loads((tmp_path / "out").read_bytes())
    assert flat_reason is None
    wide = model.float().cuda()
    for window, ours, public in zip(windows, rows, flat, strict=True):
        np.testing.assert_allclose(ours.probs, public.probs, rtol=0, atol=2e-3)  # of two runs of a bfloat16 model
        with torch.inference_mode():
            logprobs_LV = wide(torch.from_numpy(window.ids).cuda()[None]).logits[0, :-1].double().log_softmax(-1)
        sorted_LV = logprobs_LV.exp().sort(descending=True).values.cpu().numpy()
        assert np.abs(ours.probs - sorted_LV[:, :K]).mean() < 1e-3
        assert np.abs(ours.tail_bins - bin_masses(sorted_LV, np.array(edges))).mean() < 2e-3
        gold_L = logprobs_LV.cpu().numpy()[np.arange(len(window.target_ids)), window.target_ids]
        assert np.abs(ours.gold_logprob - gold_L).mean() < 0.1
        np.testing.assert_allclose(ours.tail_bins.sum(1), ours.tail_mass, rtol=0, atol=1e-6)


def _window(ids_L: np.ndarray) -> Window:
    index_R = np.arange(len(ids_L) - 1)
    nothing_R = np.zeros_like(index_R)
    return Window(
        ids=ids_L.astype(np.int64), logits_index=index_R, target_ids=ids_L[1:].astype(np.int64), segment=nothing_R,
        token_start=index_R, byte_start=index_R, byte_end=index_R + 1, is_end=nothing_R.astype(bool),
        row_in_segment=index_R, first_row=0,
    )  # fmt: skip
