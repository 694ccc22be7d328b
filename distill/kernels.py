"""Triton kernels of the fused losses: CE, ULD and `mapped` in one pass over the logits (`gradient_kernels`: and back).

One program per row of logits:

    scan    reads the row once: log-sum-exp, and the maximum of every group of words
    select  takes the K groups with the largest maxima (a value outside them is smaller than K group maxima, so
            it cannot be among the top K), finds the exact top K inside, and computes the row's losses; words
            that have a gradient of their own (top K, mapped, label) are left in a short list
    tail    only with a sketch: a histogram of the logits below the K-th, compared with the teacher's tail

Import this module only where triton is installed. Legend: N rows, V student words, G groups of words, K ranks, I mapped
words, M = K + I + 1 listed words, C candidates (a power of two above K), J tail bins, B steps of the tail's histogram;
IP, GP, JP: the same rounded up to a power of two.
"""

import triton
import triton.language as tl

# ruff: noqa: E741, SIM108 (I is a shape suffix; the compiler wants statements, not expressions)

SMALLEST_COMPLEMENT = tl.constexpr(1e-6)


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
def _candidate_keys(source, groups, start, wanted, V, GROUP: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr):
    """Words and sort keys of CHUNK of the chosen groups; places that do not exist have the smallest key."""
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
        word, keys, real = _candidate_keys(source, groups, start, wanted, V, GROUP, CHUNK, BITS)
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
def _kth_candidate(source, groups, wanted, available, V, GROUP: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr):
    """The key of the K-th largest candidate, bit by bit with the candidates read again for each (rarely needed)."""
    threshold = tl.full((), -(2 ** (BITS - 1)), tl.int32)
    for step in range(BITS):
        if step == 0:
            trial = tl.zeros((), tl.int32)
        else:
            trial = threshold + (tl.full((), 1, tl.int32) << (BITS - 1 - step))
        count = tl.zeros((), tl.int32)
        for start in range(0, wanted, CHUNK):
            _, keys, real = _candidate_keys(source, groups, start, wanted, V, GROUP, CHUNK, BITS)
            count += tl.sum((real & (keys >= trial)).to(tl.int32))
        threshold = tl.where(count >= available, trial, threshold)
    return threshold


@triton.jit
def scan_kernel(
    logits_NV, row_stride, group_max_NG, lse_N, V, G,
    GROUP: tl.constexpr, TILE_GROUPS: tl.constexpr, WITH_MAXIMA: tl.constexpr,
):  # fmt: skip
    """log-sum-exp of a row, and the maxima of its groups. Slots of a tile keep their own running maximum and sum."""
    row = tl.program_id(0).to(tl.int64)
    source = logits_NV + row * row_stride
    slot = tl.arange(0, TILE_GROUPS)
    inside = slot[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    running_max = tl.full((TILE_GROUPS,), float("-inf"), tl.float32)
    running_sum = tl.zeros((TILE_GROUPS,), tl.float32)
    for start in range(0, G, TILE_GROUPS):
        word = start * GROUP + inside
        values = tl.load(source + word, mask=word < V, other=float("-inf")).to(tl.float32)
        tile_max = tl.max(values, axis=1)
        if WITH_MAXIMA:
            stored = tile_max.to(group_max_NG.dtype.element_ty)
            tl.store(group_max_NG + row * G + start + slot, stored, mask=start + slot < G)
        new_max = tl.maximum(running_max, tile_max)
        # -inf - -inf is NaN: a slot that has seen nothing finite subtracts 0 instead.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        running_sum = running_sum * tl.exp(running_max - shift) + tl.sum(tl.exp(values - shift[:, None]), axis=1)
        running_max = new_max
    row_max = tl.max(running_max, axis=0)
    total = tl.sum(running_sum * tl.exp(running_max - row_max), axis=0)
    tl.store(lse_N + row, row_max + tl.log(total))


@triton.jit
def select_kernel(
    logits_NV, row_stride, group_max_NG, lse_N, probs_NK, tail_N, words_NI, word_probs_NI, labels_N,
    groups_NK, scratch_NS, listed_NM, listed_z_NM, listed_own_NM,
    ce_N, uld_N, mapped_N, floor_N, gap_N, dense_uld_N, kth_N, outside_N, dense_mapped_N, V, G,
    K: tl.constexpr, C: tl.constexpr, GP: tl.constexpr, I: tl.constexpr, IP: tl.constexpr,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr, WITH_LABELS: tl.constexpr, SKETCH: tl.constexpr,
):  # fmt: skip
    """Losses of one row and the list of its words with a gradient of their own."""
    row = tl.program_id(0).to(tl.int64)
    source = logits_NV + row * row_stride
    lse = tl.load(lse_N + row)
    M: tl.constexpr = K + I + 1
    listed, listed_z, listed_own = listed_NM + row * M, listed_z_NM + row * M, listed_own_NM + row * M

    if K > 0:
        groups, scratch = groups_NK + row * K, scratch_NS + row * (C + K)
        group = tl.arange(0, GP)
        maxima = tl.load(group_max_NG + row * G + group, mask=group < G, other=float("-inf"))
        keys = tl.where(group < G, _sort_key(maxima), -(2 ** (BITS - 1)))
        # Fewer groups than ranks (a small vocabulary): take them all.
        wanted = tl.minimum(K, G)
        threshold = _kth_largest(keys, wanted, BITS)
        above = keys > threshold
        above_count = tl.sum(above.to(tl.int32))
        equal = (keys == threshold) & (group < G)
        places = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
        place = tl.where(above, (places & 0xFFFF) - 1, above_count + (places >> 16) - 1)
        tl.store(groups + place, group, mask=(above | equal) & (place < wanted))
        tl.debug_barrier()

        # The groups' threshold is a lower bound of the K-th largest value, and in nearly all rows a close one.
        available = tl.minimum(K, V)
        above_count = _collect(source, groups, scratch, wanted, threshold, V, K, C, GROUP, CHUNK, BITS)
        if (above_count > C) | (wanted < available):
            threshold = _kth_candidate(source, groups, wanted, available, V, GROUP, CHUNK, BITS)
            tl.debug_barrier()
            above_count = _collect(source, groups, scratch, wanted, threshold, V, K, C, GROUP, CHUNK, BITS)
        tl.debug_barrier()

        rank = tl.arange(0, C)
        is_above = rank < above_count
        real = is_above | (rank < available)
        word = tl.load(scratch + tl.where(is_above, rank, C + rank - above_count), mask=real, other=0)
        head_keys = _sort_key(tl.load(source + word, mask=real, other=float("-inf")))
        # Largest first: sort (key, place) packed into one integer; places that do not exist go last.
        if BITS == 32:
            packed = tl.where(real, head_keys.to(tl.int64) * C + (C - 1 - rank), -(2**62))
        else:
            packed = tl.where(real, head_keys * C + (C - 1 - rank), -(2**30))
        place = (C - 1 - (tl.sort(packed, descending=True) & (C - 1))).to(tl.int32)
        real = rank < available
        word = tl.load(scratch + tl.where(place < above_count, place, C + place - above_count), mask=real, other=0)
        z_C = tl.load(source + word, mask=real, other=float("-inf")).to(tl.float32)
        q_C = tl.exp(z_C - lse)
        p_C = tl.load(probs_NK + row * K + rank, mask=rank < K, other=0.0)
        tail = tl.load(tail_N + row)
        student_tail = tl.where(K >= V, 0.0, tl.maximum(1.0 - tl.sum(q_C, 0), 0.0))
        sign_C = tl.where(q_C > p_C, 1.0, tl.where(q_C < p_C, -1.0, 0.0))
        tail_sign = tl.where(student_tail > tail, 1.0, tl.where(student_tail < tail, -1.0, 0.0))
        head_loss = tl.sum(tl.abs(q_C - p_C), 0)
        tl.store(floor_N + row, head_loss + tl.abs(student_tail - tail))
        tl.store(gap_N + row, 2.0 * tl.minimum(student_tail, tail))
        if SKETCH:
            # The tail is added by `tail_kernel`, which knows the sign of every step of it.
            tail_sign = 0.0
            tl.store(uld_N + row, head_loss)
            tl.store(kth_N + row, tl.min(tl.where(real, z_C, float("inf")), 0))
            tl.store(outside_N + row, student_tail)
        else:
            tl.store(uld_N + row, head_loss + tl.abs(student_tail - tail))
        tl.store(dense_uld_N + row, tail_sign - tl.sum(q_C * sign_C, 0) - student_tail * tail_sign)
        tl.store(listed + rank, tl.where(real, word, -1), mask=rank < K)
        tl.store(listed_z + rank, z_C, mask=rank < K)
        tl.store(listed_own + rank, q_C * (sign_C - tail_sign), mask=rank < K)

    if I > 0:
        mapped = tl.arange(0, IP)
        words = tl.load(words_NI + row * I + mapped, mask=mapped < I, other=-1)
        mass = tl.load(word_probs_NI + row * I + mapped, mask=mapped < I, other=0.0)
        found = words >= 0
        same = (words[:, None] == words[None, :]) & found[:, None] & found[None, :]
        # Several teacher words may become one student word: the first of them carries the sum.
        first = found & (tl.sum((same & (mapped[None, :] < mapped[:, None])).to(tl.int32), 1) == 0)
        p_I = tl.where(first, tl.sum(tl.where(same, mass[None, :], 0.0), 1), 0.0)
        z_I = tl.load(source + words, mask=first, other=float("-inf")).to(tl.float32)
        q_I = tl.exp(z_I - lse)
        rest = tl.maximum(1.0 - tl.sum(p_I, 0), 0.0)
        complement = 1.0 - tl.sum(q_I, 0)
        clamped = complement < SMALLEST_COMPLEMENT
        complement = tl.maximum(complement, SMALLEST_COMPLEMENT)
        log_ratio = tl.log(tl.where(p_I > 0, p_I, 1.0)) - tl.where(p_I > 0, z_I - lse, 0.0)
        rest_term = tl.where(rest > 0, rest * (tl.log(tl.where(rest > 0, rest, 1.0)) - tl.log(complement)), 0.0)
        tl.store(mapped_N + row, tl.sum(p_I * log_ratio, 0) + rest_term)
        ratio = tl.where(clamped, 0.0, rest / complement)
        tl.store(dense_mapped_N + row, tl.where(clamped, 1.0 - rest, 1.0 - ratio))
        tl.store(listed + K + mapped, tl.where(first, words, -1), mask=mapped < I)
        tl.store(listed_z + K + mapped, z_I, mask=mapped < I)
        tl.store(listed_own + K + mapped, ratio * q_I - p_I, mask=mapped < I)

    if WITH_LABELS:
        label = tl.load(labels_N + row)
        z_label = tl.load(source + label, mask=label >= 0, other=0.0).to(tl.float32)
        tl.store(ce_N + row, tl.where(label >= 0, lse - z_label, 0.0))
        tl.store(listed + K + I, label.to(tl.int32))
        tl.store(listed_z + K + I, z_label)
    else:
        tl.store(listed + K + I, -1)


@triton.jit
def tail_kernel(
    logits_NV, row_stride, lse_N, kth_N, outside_N, slopes_NJ, log_starts_NJ, edges_J1, uld_N, dense_uld_N,
    tail_signs_NB, V, K, step_nats, step_mean, J: tl.constexpr, JP: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The tail of one row against the teacher's sketch, without sorting.

    For two descending sequences sum |p_(i) - q_(i)| is the area between their counting functions (how many values
    exceed t): a histogram over log q gives the student's, the bins' power laws give the teacher's. Exact where one
    of them lies above the other throughout a step of the histogram. step_mean: the mean of values spread evenly in log
    over one step, as a share of the step's upper end.
    """
    row = tl.program_id(0).to(tl.int64)
    source = logits_NV + row * row_stride
    lse = tl.load(lse_N + row)
    kth = tl.load(kth_N + row)
    lane = tl.arange(0, TILE)
    step = tl.arange(0, B)
    counts = tl.zeros((B,), tl.int32)
    for start in range(0, V, TILE):
        values = tl.load(source + start + lane, mask=start + lane < V, other=float("-inf")).to(tl.float32)
        below = tl.minimum((kth - values) / step_nats, B - 1.0)
        counts += tl.histogram(tl.maximum(below, 0.0).to(tl.int32), B)
    # All of the head lies in step 0; the last step is the bottomless rest, without mass (masked lanes are there too).
    counts = tl.where(step == 0, counts - tl.minimum(K, V), counts)
    counts = tl.where(step == B - 1, 0, counts).to(tl.float32)
    above = tl.cumsum(counts, 0) - counts

    top = kth - lse
    upper = tl.exp(top - step * step_nats)
    lower = tl.exp(top - (step + 1) * step_nats)
    mass = counts * upper * step_mean
    # The steps' masses add up to what the head leaves, as far as values inside a step can lie off their middle.
    estimated = tl.sum(mass, 0)
    scale = tl.load(outside_N + row) / tl.where(estimated > 0, estimated, 1.0)
    mass *= tl.minimum(tl.maximum(scale, tl.exp(tl.zeros((), tl.float32) - step_nats) / step_mean), 1.0 / step_mean)
    student_area = above * (upper - lower) + mass - counts * lower

    bin = tl.arange(0, JP)
    real = bin < J
    slope = tl.load(slopes_NJ + row * J + bin, mask=real, other=-2.0)[None, :]
    log_start = tl.load(log_starts_NJ + row * J + bin, mask=real, other=-100.0)[None, :]
    first = tl.load(edges_J1 + bin, mask=real, other=0.5)[None, :]
    log_width = tl.log(tl.load(edges_J1 + bin + 1, mask=real, other=0.5))[None, :] - tl.log(first)
    power = slope + 1.0
    scale = tl.exp(log_start) * first / power
    # Teacher's area above t, at the upper and at the lower end of every step: mass above t minus t times the count.
    reach = tl.minimum(tl.maximum((top - step[:, None] * step_nats - log_start) / slope, 0.0), log_width)
    teacher_upper = tl.sum(scale * (tl.exp(power * reach) - 1.0) - upper[:, None] * first * (tl.exp(reach) - 1.0), 1)
    reach = tl.minimum(tl.maximum((top - (step[:, None] + 1) * step_nats - log_start) / slope, 0.0), log_width)
    teacher_lower = tl.sum(scale * (tl.exp(power * reach) - 1.0) - lower[:, None] * first * (tl.exp(reach) - 1.0), 1)
    difference = student_area - (teacher_lower - teacher_upper)
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
    over_the_top = tl.sum(tl.where(step == 0, teacher_upper, 0.0), 0)
    tl.store(uld_N + row, tl.load(uld_N + row) + tl.sum(tl.abs(difference), 0) + over_the_top)
    tl.store(dense_uld_N + row, tl.load(dense_uld_N + row) - tl.sum(sign * mass, 0))
    tl.store(tail_signs_NB + row * B + step, sign.to(tl.int8))
