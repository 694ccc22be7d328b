"""Rows from logits: plain torch against a naive float64 sort, and the Triton kernels under the interpreter.

Legend: B rows, V vocabulary, K top-k ranks, J tail bins.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from naive_reduction import assert_rows_equal_a_full_sort

from cache_builder.engines.base import EngineConfig, ordered_scores
from cache_builder.engines.reduction import reduce_rows, top_k
from cache_builder.engines.reduction_memory import bytes_per_row
from cache_builder.engines.vllm_capture import BLOCK_BYTES, Capture
from storage_specs.errors import ConfigError
from storage_specs.sketch import log_rank_edges

ROOT = Path(__file__).parents[2]
K = 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vocabulary", "k"), [(70, 64), (1000, 1), (5000, 64), (20_000, 256), (64, 64)])
def test_torch_rows_equal_a_full_sort(vocabulary: int, k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits_BV = (3 * torch.randn(6, vocabulary, generator=generator)).to(dtype)
    target_B = torch.randint(0, vocabulary, (6,), generator=generator)
    edges = log_rank_edges(k, vocabulary, 16) if k < vocabulary else None
    rows = reduce_rows(logits_BV, target_B, k, None if edges is None else tuple(edges.tolist()))
    assert_rows_equal_a_full_sort(*rows, logits_BV, target_B, k, edges, bin_tolerance=1e-6)


@pytest.mark.parametrize("vocabulary", [64, 65, 128, 1000, 20_000])
@pytest.mark.parametrize("levels", [2, 30, 10**6])
def test_top_k_is_the_sorted_top_k_with_the_lowest_ids_among_equals(vocabulary: int, levels: int) -> None:
    logits_BV = torch.randint(0, levels, (40, vocabulary), generator=torch.Generator().manual_seed(levels)).float()
    values_BK, ids_BK = top_k(logits_BV, K)
    for row in range(40):
        expected = sorted(range(vocabulary), key=lambda token: (-logits_BV[row, token].item(), token))[:K]
        found = sorted(zip((-values_BK[row]).tolist(), ids_BK[row].tolist(), strict=True))
        assert [token for _, token in found] == expected
        assert [-value for value, _ in found] == logits_BV[row, expected].tolist()


def test_triton_rows_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted/reduction.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "21 passed" in done.stdout


def test_bins_add_up_to_the_tail_whatever_they_were_rounded_to() -> None:
    logprobs_RK = np.log(np.array([[0.5, 0.2], [0.5, 0.2], [0.6, 0.4]], np.float32))
    bins_RJ = np.array([[0.1, 0.1997, -1e-9], [0, 0, 0], [1e-8, 0, 0]], np.float32)
    scores = ordered_scores(np.zeros(3), logprobs_RK, np.zeros((3, 2), np.int32), bins_RJ)
    np.testing.assert_allclose(scores.tail_bins.sum(1), scores.tail_mass, atol=1e-7)
    np.testing.assert_allclose(scores.tail_bins[0], [0.1001, 0.1999, 0], atol=1e-5)
    assert scores.tail_bins[1].tolist() == pytest.approx([0.3, 0, 0])
    assert scores.token_ids.dtype == np.int64


@pytest.mark.parametrize("edges", [(4,), (5, 9), (4, 8), (4, 6, 6, 9), (4, 7, 6, 9)])
def test_rank_edges_are_checked(edges: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="must ascend from k, 4, to 9"):
        EngineConfig(model="m", dtype="float32", max_model_len=8, k=4, vocab_size=9, rank_edges=edges)


@pytest.mark.parametrize(("vocabulary", "k", "bins"), [(262_144, 256, 16), (262_144, 1024, 0), (1_000_000, 64, 16)])
def test_blocks_of_logits_are_bounded_whatever_the_vocabulary(vocabulary: int, k: int, bins: int) -> None:
    """All that a step of 8,192 tokens keeps beside them is its rows: 17 MB at k = 256."""
    edges = tuple(log_rank_edges(k, vocabulary, bins).tolist()) if bins else None
    capture = Capture(k, edges, vocabulary, keeps=True)
    block = capture.block("cuda")
    assert block >= 128
    assert block * bytes_per_row(vocabulary, k, bins) <= BLOCK_BYTES["cuda"] <= 640 << 20
    assert Capture(k, edges, 2**31, keeps=True).block("cuda") == 1


@pytest.mark.parametrize(("max_num_tokens", "most"), [(8192, 2557), (100, 100)])
def test_the_largest_block_of_a_step_warms_up(max_num_tokens: int, most: int) -> None:
    capture, head_VD, blocks = Capture(K, None, 5000, keeps=True), torch.randn(5000, 8), list[int]()
    capture.block = lambda device: 2557 if device == "cpu" else 0

    def compute_logits(hidden_ND: torch.Tensor) -> torch.Tensor:
        blocks.append(len(hidden_ND))
        return hidden_ND @ head_VD.T

    runner = SimpleNamespace(
        device=torch.device("cpu"), max_num_tokens=max_num_tokens, model=SimpleNamespace(compute_logits=compute_logits),
        model_config=SimpleNamespace(dtype=torch.float32, get_hidden_size=lambda: 8),
    )  # fmt: skip
    capture.warm_up(runner)
    capture.rows(compute_logits, torch.zeros(max_num_tokens, 8), torch.zeros(max_num_tokens, dtype=torch.int64))
    assert blocks[0] == max(blocks) == most
