"""What reducing a block of logits takes: its groups of words, its histogram's steps, and the bytes of all that.

Legend: V vocabulary, K top-k ranks.
"""

GROUP = 128
HISTOGRAM_STEPS = 1024


def bytes_per_row(vocab_size: int, k: int, bins: int) -> int:
    """Bytes on a CUDA device while a block is reduced, per row of it: its float32 logits, the kernels' buffers, and
    the rows that come out. The torch edition takes several times that (it sorts); it is for the CPU."""
    groups = -(-vocab_size // group_size(vocab_size, k))
    candidates = 2 * (1 << (k - 1).bit_length())
    logits, kernels = vocab_size, groups + 4 + k + candidates + k + (HISTOGRAM_STEPS if bins else 0)
    return 4 * (logits + kernels + (1 + k + bins) + k)


def group_size(vocab_size: int, k: int) -> int:
    """Words of a group of which the maximum is kept: fewer where 4 k groups would not fit the vocabulary."""
    group = GROUP
    while group > 16 and vocab_size < 4 * k * group:
        group //= 2
    return group
