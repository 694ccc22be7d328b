"""Triton kernels of `reduction.reduce_rows`: one read of the logits for the top-k, one more for a sketch's tail bins.

One program per row of logits:

    scan    reads the row once: log-sum-exp, the maximum of every group of words, the smallest finite value
    select  takes the K groups with the largest maxima (a value outside them is smaller than K group maxima, so it
            cannot be among the top K) and sorts the exact top K out of them
    histogram, bins   only for a sketch: read the row again, into a histogram of 1,024 steps; sum words and masses from
            the K-th value down to every rank edge

The histogram counts in shared memory, by PTX of its own: 2.9 ms beyond the top-k of 8,192 rows of 151,936 words on an
H100 (scripts/results/reduction.csv); an edition of two reads with `tl.histogram` of Triton 3.6 took 22.

Import this module only where triton is installed. Legend: B rows, V words, G groups of words, K ranks, C candidates (a
power of two above K), J tail bins, S steps of the histogram, W = 1 + K + J; GP, JP: rounded up to a power of two.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from cache_builder.engines.reduction_memory import HISTOGRAM_STEPS, group_size

# ruff: noqa: SIM108 (the compiler wants statements, not expressions)

STEPS = HISTOGRAM_STEPS  # as declared in `_clear`
LONGEST_TAIL = 24.0  # nats below the K-th value that the histogram spans; what lies deeper has no mass


@triton.jit
def _sort_key(values):
    """int32 in the order of `values`: within 16 bits for bfloat16 and float16, all 32 for float32."""
    if values.dtype.primitive_bitwidth == 16:
        bits = values.to(tl.int16, bitcast=True).to(tl.int32)
        return bits ^ ((bits >> 31) & 0x7FFF)
    else:
        bits = values.to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _kth_largest(keys, wanted, BITS: tl.constexpr):
    """The largest t with count(keys >= t) >= wanted, bit by bit from the top."""
    threshold = tl.where(tl.sum((keys >= 0).to(tl.int32)) >= wanted, 0, -(2 ** (BITS - 1))).to(tl.int32)
    for step in range(1, BITS):
        trial = threshold + (tl.full((), 1, tl.int32) << (BITS - 1 - step))
        threshold = tl.where(tl.sum((keys >= trial).to(tl.int32)) >= wanted, trial, threshold)
    return threshold


@triton.jit
def _candidates(source, groups, start, wanted, V, GROUP: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr):
    """Words and sort keys of CHUNK of the chosen groups, by ascending word, and which of them exist."""
    slot = start + tl.arange(0, CHUNK)
    group = tl.load(groups + slot, mask=slot < wanted, other=0)
    word_2d = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    real = tl.reshape((slot < wanted)[:, None] & (word_2d < V), (CHUNK * GROUP,))
    word = tl.reshape(word_2d, (CHUNK * GROUP,))
    values = tl.load(source + word, mask=real, other=float("-inf"))
    return word, tl.where(real, _sort_key(values), -(2 ** (BITS - 1))), real


@triton.jit
def _collect(
    source, groups, scratch, wanted, threshold, V,
    K: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Words above the threshold into scratch[:C], the first K words equal to it into scratch[C:]; how many above."""
    above_count = tl.zeros((), tl.int32)
    equal_count = tl.zeros((), tl.int32)
    for start in range(0, wanted, CHUNK):
        word, keys, real = _candidates(source, groups, start, wanted, V, GROUP, CHUNK, BITS)
        above = real & (keys > threshold)
        equal = real & (keys == threshold)
        # Both running counts in one scan: a chunk has fewer than 2^15 words.
        places = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
        above_place = above_count + (places & 0xFFFF) - 1
        equal_place = equal_count + (places >> 16) - 1
        tl.store(scratch + above_place, word, mask=above & (above_place < C))
        tl.store(scratch + C + equal_place, word, mask=equal & (equal_place < K))
        above_count += tl.sum(above.to(tl.int32))
        equal_count += tl.sum(equal.to(tl.int32))
    return above_count


@triton.jit
def _kth_candidate(source, groups, wanted, V, K, GROUP: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr):
    """The key of the K-th largest candidate, bit by bit with the candidates read again for each (rarely needed)."""
    threshold = tl.full((), -(2 ** (BITS - 1)), tl.int32)
    for step in range(BITS):
        if step == 0:
            trial = tl.zeros((), tl.int32)
        else:
            trial = threshold + (tl.full((), 1, tl.int32) << (BITS - 1 - step))
        count = tl.zeros((), tl.int32)
        for start in range(0, wanted, CHUNK):
            _, keys, real = _candidates(source, groups, start, wanted, V, GROUP, CHUNK, BITS)
            count += tl.sum((real & (keys >= trial)).to(tl.int32))
        threshold = tl.where(count >= K, trial, threshold)
    return threshold


@triton.jit
def scan_kernel(
    logits_BV, row_stride, group_max_BG, largest_B, log_sum_B, smallest_B, V, G,
    GROUP: tl.constexpr, TILE_GROUPS: tl.constexpr, SKETCH: tl.constexpr,
):  # fmt: skip
    """log-sum-exp, group maxima, smallest finite value. Slots of a tile keep their own running maximum and sum.

    The log-sum-exp is the largest value, which is exact, and the logarithm of a sum beside it: rounded as one number of
    20 or 30 it would move all probabilities by 1e-6.
    """
    row = tl.program_id(0).to(tl.int64)
    source = logits_BV + row * row_stride
    slot = tl.arange(0, TILE_GROUPS)
    inside = slot[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    running_max = tl.full((TILE_GROUPS,), float("-inf"), tl.float32)
    running_sum = tl.zeros((TILE_GROUPS,), tl.float32)
    running_min = tl.full((TILE_GROUPS,), float("inf"), tl.float32)
    for start in range(0, G, TILE_GROUPS):
        word = start * GROUP + inside
        values = tl.load(source + word, mask=word < V, other=float("-inf")).to(tl.float32)
        tile_max = tl.max(values, axis=1)
        stored = tile_max.to(group_max_BG.dtype.element_ty)
        tl.store(group_max_BG + row * G + start + slot, stored, mask=start + slot < G)
        if SKETCH:
            finite = tl.where(values == float("-inf"), float("inf"), values)
            running_min = tl.minimum(running_min, tl.min(finite, axis=1))
        new_max = tl.maximum(running_max, tile_max)
        # -inf - -inf is NaN: a slot that has seen nothing finite subtracts 0 instead.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        running_sum = running_sum * tl.exp(running_max - shift) + tl.sum(tl.exp(values - shift[:, None]), axis=1)
        running_max = new_max
    row_max = tl.max(running_max, axis=0)
    tl.store(largest_B + row, row_max)
    tl.store(log_sum_B + row, tl.log(tl.sum(running_sum * tl.exp(running_max - row_max), axis=0)))
    if SKETCH:
        tl.store(smallest_B + row, tl.min(running_min, axis=0))


@triton.jit
def select_kernel(
    logits_BV, row_stride, group_max_BG, largest_B, log_sum_B, target_B, groups_BK, scratch_BS, values_BW, ids_BK,
    kth_B, V, G, W,
    K: tl.constexpr, C: tl.constexpr, GP: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The exact top K of one row, sorted, equal values by ascending word; and its gold log-probability."""
    row = tl.program_id(0).to(tl.int64)
    source = logits_BV + row * row_stride
    largest, log_sum = tl.load(largest_B + row), tl.load(log_sum_B + row)
    groups, scratch = groups_BK + row * K, scratch_BS + row * (C + K)
    group = tl.arange(0, GP)
    maxima = tl.load(group_max_BG + row * G + group, mask=group < G, other=float("-inf"))
    keys = tl.where(group < G, _sort_key(maxima), -(2 ** (BITS - 1)))
    # Fewer groups than ranks (a small vocabulary): take them all.
    wanted = tl.minimum(K, G)
    threshold = _kth_largest(keys, wanted, BITS)
    above = keys > threshold
    equal = (keys == threshold) & (group < G)
    spare = wanted - tl.sum(above.to(tl.int32))
    # In ascending order, and of equal maxima the lowest: so that of equal words the lowest come first.
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= spare))
    tl.store(groups + tl.cumsum(chosen.to(tl.int32), 0) - 1, group, mask=chosen)
    tl.debug_barrier()

    # The groups' threshold is a lower bound of the K-th largest value, and in nearly all rows a close one.
    above_count = _collect(source, groups, scratch, wanted, threshold, V, K, C, GROUP, CHUNK, BITS)
    if (above_count > C) | (wanted < K):
        threshold = _kth_candidate(source, groups, wanted, V, K, GROUP, CHUNK, BITS)
        tl.debug_barrier()
        above_count = _collect(source, groups, scratch, wanted, threshold, V, K, C, GROUP, CHUNK, BITS)
    tl.debug_barrier()

    rank = tl.arange(0, C)
    is_above = rank < above_count
    real = is_above | (rank < K)
    word = tl.load(scratch + tl.where(is_above, rank, C + rank - above_count), mask=real, other=0)
    head_keys = _sort_key(tl.load(source + word, mask=real, other=float("-inf")))
    # Largest first: sort (key, place) packed into one integer; places that do not exist go last.
    packed = tl.where(real, head_keys.to(tl.int64) * C + (C - 1 - rank), -(2**62))
    place = (C - 1 - (tl.sort(packed, descending=True) & (C - 1))).to(tl.int32)
    kept = rank < K
    word = tl.load(scratch + tl.where(place < above_count, place, C + place - above_count), mask=kept, other=0)
    values = tl.load(source + word, mask=kept, other=float("inf")).to(tl.float32)
    tl.store(values_BW + row * W + 1 + rank, values - largest - log_sum, mask=kept)
    tl.store(ids_BK + row * K + rank, word, mask=kept)
    tl.store(kth_B + row, tl.min(values, 0))
    gold = tl.load(source + tl.load(target_B + row)).to(tl.float32)
    tl.store(values_BW + row * W, gold - largest - log_sum)


@triton.jit
def _span(kth, smallest, longest):
    """Nats below the K-th value that the histogram covers."""
    return tl.minimum(tl.maximum(kth - tl.load(smallest), 1e-6), longest)


@triton.jit
def _clear(step):
    """Declares the histogram in shared memory (once per kernel: this is a declaration) and clears its steps."""
    tl.inline_asm_elementwise(
        ".shared .align 16 .b32 histogram[1024]; mov.b32 $0, $1;", "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.inline_asm_elementwise(
        "{ .reg .b32 place; mov.b32 place, histogram; mad.lo.u32 place, $1, 4, place;"
        " st.shared.u32 [place], 0; mov.b32 $0, 0; }",
        "=r,r", [step], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _count(step):
    """One more word in each of these steps."""
    tl.inline_asm_elementwise(
        "{ .reg .b32 place; mov.b32 place, histogram; mad.lo.u32 place, $1, 4, place;"
        " red.shared.add.u32 [place], 1; mov.b32 $0, 0; }",
        "=r,r", [step], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _counted(step):
    return tl.inline_asm_elementwise(
        "{ .reg .b32 place; mov.b32 place, histogram; mad.lo.u32 place, $1, 4, place; ld.shared.u32 $0, [place]; }",
        "=r,r", [step], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def histogram_kernel(
    logits_BV, row_stride, kth_B, smallest_B, counts_BS, V, longest,
    S: tl.constexpr, TILE: tl.constexpr, ATOMICS: tl.constexpr,
):  # fmt: skip
    """How many words of a row lie how deep below its K-th value, in steps that widen as the square root of the depth.

    Fine where single words have mass. The last step holds what can never come, and what lies beyond the vocabulary.
    """
    row = tl.program_id(0).to(tl.int64)
    source = logits_BV + row * row_stride
    kth = tl.load(kth_B + row)
    scale = 1.0 / _span(kth, smallest_B + row, longest)
    lane, step = tl.arange(0, TILE), tl.arange(0, S)
    counts = tl.zeros((S,), tl.int32)
    if ATOMICS:
        _clear(step)
        tl.debug_barrier()
    for start in range(0, V, TILE):
        values = tl.load(source + start + lane, mask=start + lane < V, other=float("-inf")).to(tl.float32)
        reached = tl.sqrt(tl.maximum((kth - values) * scale, 0.0)) * (S - 2)
        reached_step = tl.minimum(reached, S - 1.0).to(tl.int32)
        if ATOMICS:
            _count(reached_step)
        else:
            counts += tl.histogram(reached_step, S)
    if ATOMICS:
        tl.debug_barrier()
        counts = _counted(step)
    tl.store(counts_BS + row * S + step, counts)


@triton.jit
def bins_kernel(
    counts_BS, largest_B, log_sum_B, kth_B, smallest_B, edges_J1, values_BW, V, W, longest,
    K: tl.constexpr, C: tl.constexpr, J: tl.constexpr, JP: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Mass of one row's sorted tail from the K-th value to each rank edge; the words of a step lie evenly in it."""
    row = tl.program_id(0).to(tl.int64)
    lse, kth = tl.load(largest_B + row) + tl.load(log_sum_B + row), tl.load(kth_B + row)
    span = _span(kth, smallest_B + row, longest)
    step = tl.arange(0, S)
    counts = tl.load(counts_BS + row * S + step)
    counts = tl.where(step == 0, counts - K, counts)  # without the head
    below = tl.cumsum(counts, 0)
    upper, lower = step * (1.0 / (S - 2)), (step + 1) * (1.0 / (S - 2))
    each = tl.exp(kth - lse - span * 0.5 * (upper * upper + lower * lower))
    each = tl.where(step < S - 1, each, 0.0)
    mass = tl.cumsum(counts.to(tl.float32) * each, 0)
    bin = tl.arange(0, JP)
    edge = tl.load(edges_J1 + 1 + bin, mask=bin < J, other=V) - K
    whole = below[None, :] <= edge[:, None]
    owner = tl.sum(whole.to(tl.int32), 1)
    rest = edge - tl.max(tl.where(whole, below[None, :], 0), 1)
    of_owner = tl.sum(tl.where(step[None, :] == owner[:, None], each[None, :], 0.0), 1)
    reached = tl.max(tl.where(whole, mass[None, :], 0.0), 1) + rest.to(tl.float32) * of_owner
    # The masses are estimates, their sum is known.
    rank = tl.arange(0, C)
    head = tl.load(values_BW + row * W + 1 + rank, mask=rank < K, other=float("-inf"))
    tail = tl.maximum(1.0 - tl.sum(tl.exp(head), 0), 0.0)
    total = tl.max(mass, 0)
    reached *= tl.where(total > 0, tail / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(values_BW + row * W + 1 + K + bin, reached, mask=bin < J)


@lru_cache(maxsize=8)
def _on_device(rank_edges: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Copied once: a copy from ordinary memory waits for everything that the device has yet to do."""
    return torch.tensor(rank_edges, dtype=torch.int32, device=device)


def reduce_rows_triton(
    logits_BV: torch.Tensor, target_B: torch.Tensor, k: int, rank_edges: tuple[int, ...] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reduction.reduce_rows`. Rows of `logits_BV` may have any stride, words must lie side by side."""
    rows, vocabulary = logits_BV.shape
    group = group_size(vocabulary, k)
    groups, candidates = triton.cdiv(vocabulary, group), 2 * triton.next_power_of_2(k)
    bins = 0 if rank_edges is None else len(rank_edges) - 1
    width = 1 + k + bins
    new = logits_BV.new_empty
    values_BW, ids_BK = new((rows, width), dtype=torch.float32), new((rows, k), dtype=torch.int32)
    group_max_BG = new((rows, groups))
    # Each a tensor of its own: Triton compiles a kernel anew for pointers that are not multiples of 16 bytes.
    largest_B, log_sum_B, smallest_B, kth_B = (new(rows, dtype=torch.float32) for _ in range(4))
    groups_BK, scratch_BS = new((rows, k), dtype=torch.int32), new((rows, candidates + k), dtype=torch.int32)
    bits = 8 * logits_BV.element_size()
    scan_kernel[(rows,)](
        logits_BV, logits_BV.stride(0), group_max_BG, largest_B, log_sum_B, smallest_B, vocabulary, groups,
        GROUP=group, TILE_GROUPS=max(1, 4096 // group), SKETCH=bins > 0, num_warps=8,
    )  # fmt: skip
    select_kernel[(rows,)](
        logits_BV, logits_BV.stride(0), group_max_BG, largest_B, log_sum_B, target_B, groups_BK, scratch_BS, values_BW,
        ids_BK, kth_B, vocabulary, groups, width,
        K=k, C=candidates, GP=triton.next_power_of_2(groups), GROUP=group, CHUNK=max(1, 2048 // group), BITS=bits,
        num_warps=4,
    )  # fmt: skip
    if bins:
        edges_J1 = _on_device(rank_edges, logits_BV.device)
        counts_BS = new((rows, STEPS), dtype=torch.int32)
        histogram_kernel[(rows,)](
            logits_BV, logits_BV.stride(0), kth_B, smallest_B, counts_BS, vocabulary, LONGEST_TAIL,
            S=STEPS, TILE=8192, ATOMICS=logits_BV.is_cuda and torch.version.hip is None, num_warps=8,
        )  # fmt: skip
        bins_kernel[(rows,)](
            counts_BS, largest_B, log_sum_B, kth_B, smallest_B, edges_J1, values_BW, vocabulary, width, LONGEST_TAIL,
            K=k, C=candidates, J=bins, JP=triton.next_power_of_2(bins), S=STEPS, num_warps=8,
        )  # fmt: skip
        reached_BJ = values_BW[:, 1 + k :]
        reached_BJ[:, 1:] = (reached_BJ[:, 1:] - reached_BJ[:, :-1]).clamp(min=0)
    return values_BW, ids_BK
