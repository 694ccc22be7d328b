"""The ids of a row's first ranks, as ranks among the shard's own words: the most frequent words get the smallest codes.

    id_codes    uint32 (N, I)   0: the id of the row's first rank again; else 1 + the word's place in `id_words`
    id_words    uint32 (W,)     a table of the shard: its words, most frequent first, equally frequent ones by id

Ranks whose stored probability is 0 carry nothing, so their ids are not kept: they read as the row's first id, which no
loss can tell from the truth. Small codes leave most bytes zero, and the byte shuffle and the entropy coder of the store
do the rest.

Legend: N rows, I ranks whose ids are kept, W distinct ids of a shard.
"""

from collections.abc import Mapping

import numpy as np

from storage_specs.codecs.base import ArraySpec

WORDS = "id_words"


def arrays(k_ids: int) -> tuple[ArraySpec, ...]:
    return (ArraySpec(name="id_codes", dtype=np.dtype(np.uint32), width=k_ids, rank_major=False),)


def encode(token_ids_NI: np.ndarray, probs_NI: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays and the table `id_words` of ids whose stored probabilities are `probs_NI`."""
    kept_NI = probs_NI > 0
    kept_NI[:, :1] = True
    words_W, word_of, count_W = np.unique(token_ids_NI[kept_NI], return_inverse=True, return_counts=True)
    order_W = np.argsort(-count_W, kind="stable")
    code_W = np.empty(len(words_W), np.uint32)
    code_W[order_W] = np.arange(1, len(words_W) + 1)
    codes_NI = np.zeros(token_ids_NI.shape, np.uint32)
    codes_NI[kept_NI] = code_W[word_of]
    return {"id_codes": codes_NI}, words_W[order_W].astype(np.uint32)


def problem_of(arrays: Mapping[str, np.ndarray], words_W: np.ndarray, vocab_size: int) -> str | None:
    """What is wrong with stored ids, if anything."""
    codes_NI = arrays["id_codes"]
    if codes_NI.max(initial=0) > len(words_W) or not codes_NI[:, :1].all():
        return f"a code of an id is {codes_NI.max()} among {len(words_W)} words, or a row has no first id"
    if len(words_W) and words_W.max() >= vocab_size:
        return f"token id {words_W.max()} in a vocabulary of {vocab_size}"
    return None


def decode(arrays: Mapping[str, np.ndarray], words_W: np.ndarray) -> np.ndarray:
    """(N, I) int64 ids of codes without a problem."""
    codes_NI = arrays["id_codes"]
    ids_NI = np.concatenate([[0], words_W]).astype(np.int64)[codes_NI]
    return np.where(codes_NI == 0, ids_NI[:, :1], ids_NI)
