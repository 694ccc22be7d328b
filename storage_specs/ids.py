"""The ids of a row's first ranks, as codes among the shard's own words: the most frequent words get the smallest codes.

    id_low          uint8 (N, I)     the code's lowest byte, and
    id_high         uint16 (N, I)    the rest of it. Code 0: the id of the row's first rank again; else 1 + the word's
                                     place in the shard's list of words
    id_word_steps   uint32 (W,)      that list, a table of the shard: each id less the one before it, modulo 2^32

The list is cut into classes by the floor of log2 of how often a word occurs, frequent ones first, ids ascending in
each: within a class their order is worth little, and ascending ids are cheap. Ranks whose stored probability is 0
carry nothing, so their ids are not kept: they read as the row's first id, which no loss can tell from the truth.

On 14,244 real Gemma-3 rows, I = 16, bits an id: 18 as others store them; order-0 entropy 10.7; here 10.7 + 0.8 for the
list. Telling words by their predecessor in the row would save 0.2, by the text that followed 0.4 (and tie ids to text);
both would need tables of their own, and were left.

Legend: N rows, B rows of one block, I ranks whose ids are kept, W distinct ids of a shard.
"""

from collections.abc import Mapping

import numpy as np

from storage_specs.codecs.base import ArraySpec, row_blocks

TABLE = "id_word_steps"
MOST_WORDS = 2**24 - 1
DECODED_AT_ONCE = 1 << 16  # ids; what decoding works on stays in the second-level cache


def arrays(k_ids: int) -> tuple[ArraySpec, ...]:
    return (
        ArraySpec(name="id_low", dtype=np.dtype(np.uint8), width=k_ids, rank_major=False, shuffle="noshuffle"),
        ArraySpec(name="id_high", dtype=np.dtype(np.uint16), width=k_ids, rank_major=False),
    )


def encode(token_ids_NI: np.ndarray, probs_NI: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays and the table of ids whose stored probabilities are `probs_NI`. Raises ValueError: too many words."""
    kept_NI = probs_NI > 0
    kept_NI[:, :1] = True
    words_W, word_of, count_W = np.unique(token_ids_NI[kept_NI], return_inverse=True, return_counts=True)
    if len(words_W) > MOST_WORDS:
        raise ValueError(f"{len(words_W)} different ids in one shard, more than {MOST_WORDS}; use smaller shards")
    order_W = np.argsort(-np.frexp(count_W)[1], kind="stable")
    code_W = np.empty(len(words_W), np.uint32)
    code_W[order_W] = np.arange(1, len(words_W) + 1)
    codes_NI = np.zeros(token_ids_NI.shape, np.uint32)
    codes_NI[kept_NI] = code_W[word_of]
    steps_W = np.diff(words_W[order_W].astype(np.uint32), prepend=np.uint32(0))
    return {"id_low": codes_NI.astype(np.uint8), "id_high": (codes_NI >> 8).astype(np.uint16)}, steps_W


def decode(arrays: Mapping[str, np.ndarray], steps_W: np.ndarray, vocab_size: int) -> np.ndarray:
    """(N, I) int64 ids. Raises ValueError for arrays that name no word, or a word that the vocabulary has not."""
    words_W = np.cumsum(steps_W, dtype=np.uint32)
    if len(words_W) and words_W.max() >= vocab_size:
        raise ValueError(f"token id {words_W.max()} in a vocabulary of {vocab_size}")
    ids_of_code = np.concatenate([[0], words_W]).astype(np.int64)
    ids_NI = np.empty(arrays["id_low"].shape, np.int64)
    for rows in row_blocks(*ids_NI.shape, DECODED_AT_ONCE):
        codes_BI = arrays["id_high"][rows].astype(np.intp) << 8
        codes_BI |= arrays["id_low"][rows]
        if codes_BI.max(initial=0) > len(steps_W) or not codes_BI[:, :1].all():
            raise ValueError(f"an id has the code {codes_BI.max()} of {len(steps_W)} words, or a row has no first id")
        np.take(ids_of_code, codes_BI, out=ids_NI[rows], mode="clip")
        np.copyto(ids_NI[rows], ids_NI[rows, :1], where=codes_BI == 0)
    return ids_NI
