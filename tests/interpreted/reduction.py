"""The reduction's Triton kernels under Triton's interpreter, on the CPU, against a full float64 sort.

Run by tests/cache_builder/test_reduction.py in a process of its own, because TRITON_INTERPRET=1 must be set before
triton is first imported:  TRITON_INTERPRET=1 python -m pytest tests/interpreted/reduction.py
"""

import pytest
import torch
from naive_reduction import assert_rows_equal_a_full_sort
from torch.utils._python_dispatch import TorchDispatchMode

from cache_builder.engines import reduction_triton
from cache_builder.engines.reduction_memory import bytes_per_row
from cache_builder.engines.reduction_triton import reduce_rows_triton
from storage_specs.sketch import log_rank_edges

BINS = 8


def check(logits_BV, k, bins=BINS, bin_tolerance=1e-4):
    vocabulary = logits_BV.shape[1]
    target_B = torch.randint(0, vocabulary, (len(logits_BV),), generator=torch.Generator().manual_seed(1))
    edges = log_rank_edges(k, vocabulary, bins) if bins else None
    rows = reduce_rows_triton(logits_BV, target_B, k, None if edges is None else tuple(edges.tolist()))
    assert_rows_equal_a_full_sort(*rows, logits_BV, target_B, k, edges, bin_tolerance)


def normal(rows, vocabulary, spread, seed=0):
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("vocabulary", "k", "spread"), [(3000, 64, 3.0), (5000, 16, 0.02), (300, 100, 1.0)])
def test_rows_equal_a_full_sort(vocabulary, k, spread, dtype):
    check(normal(3, vocabulary, spread).to(dtype), k)


def test_without_bins_and_with_every_rank_kept():
    check(normal(2, 1000, 3.0), 8, bins=0)
    check(normal(2, 64, 1.0), 64, bins=0)


def test_rows_of_any_stride():
    check(normal(3, 3100, 3.0)[:, :3000], 16)
    check(normal(6, 3000, 3.0)[::2], 16)


def test_the_number_of_rows_compiles_no_kernel_anew(monkeypatch):
    """Triton does so where a pointer is a multiple of 16 bytes in one call and not in another, or an integer is 1."""
    seen = {name: set() for name in vars(reduction_triton) if name.endswith("_kernel") and not name.startswith("_")}

    class Watched:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(reduction_triton, name)

        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                seen[self.name].add(
                    tuple(one.data_ptr() % 16 if isinstance(one, torch.Tensor) else one for one in arguments)
                )
                self.kernel[grid](*arguments, **constants)

            return launch

    for name in seen:
        monkeypatch.setattr(reduction_triton, name, Watched(name))
    reduction_triton._on_device.cache_clear()
    for rows in range(1, 6):
        check(normal(rows, 1024, 3.0), 16)
    assert [len(calls) for calls in seen.values()] == [1, 1, 1, 1]
    assert reduction_triton._on_device.cache_info().misses == 1


@pytest.mark.parametrize("levels", [1, 2, 40])
def test_equal_values_are_taken_by_ascending_id(levels):
    logits_BV = torch.randint(0, levels, (3, 1500), generator=torch.Generator().manual_seed(levels)).float() / 8
    check(logits_BV, 16, bin_tolerance=1e-3 if levels == 40 else 1e-4)


def test_sorted_words_overflow_the_short_list():
    """All of the top lies in the same few groups, so that the groups' threshold lets far too many through."""
    check(normal(2, 4000, 3.0).sort(dim=1, descending=True).values, 32)
    check(normal(2, 4000, 3.0).sort(dim=1).values, 32)


def test_words_that_can_never_come():
    logits_BV = normal(2, 2000, 3.0)
    logits_BV[:, 500:900] = -torch.inf
    check(logits_BV, 16)
    logits_BV[:, 40:] = -torch.inf
    check(logits_BV, 16)


def test_a_certain_row():
    logits_BV = normal(2, 2000, 1.0)
    logits_BV[0, 7] = 60.0
    check(logits_BV, 16)


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that are made empty."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.bytes += out.nbytes if "empty" in func.__name__ else 0
        return out


@pytest.mark.parametrize(("vocabulary", "k", "bins"), [(3000, 64, 8), (2000, 16, 0), (300, 100, 4)])
def test_the_buffers_are_as_large_as_the_block_was_chosen_for(vocabulary, k, bins):
    logits_BV = normal(4, vocabulary, 3.0)
    edges = log_rank_edges(k, vocabulary, bins).tolist() if bins else None
    with Allocations() as made:
        reduce_rows_triton(logits_BV, torch.zeros(4, dtype=torch.int64), k, edges and tuple(edges))
    assert made.bytes + logits_BV.nbytes == 4 * bytes_per_row(vocabulary, k, bins)
