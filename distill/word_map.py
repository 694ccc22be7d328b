"""Which student word a teacher id says: its bytes, as the student would write them inside running text.

An id maps to the FIRST token of the student's encoding of its bytes: where the teacher says " Zürich" and the student
writes " Z", "ürich", the student is taught " Z" there. Special tokens map by role (bos, eos, end of turn). Bytes that
are not UTF-8 (parts of a character) map to the student's token of the same bytes, or to nothing. The teacher's
tokenizer is not needed: the cache holds its vocabulary as bytes.

Legend: U teacher vocabulary, N rows, I ranks whose ids are cached.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage_specs.token_alphabet import backend_of
from storage_specs.vocabulary import special_roles, token_bytes, token_with_role

NO_WORD = -1
# Text in front of the bytes, so that no tokenizer invents a prefix space or takes them for the start of a text. The
# first that remains a token of its own counts; which one does depends on whether a merge reaches over the seam.
CARRIERS = ("\n", "a", ".", "1")
BATCH = 32_768


@dataclass(frozen=True)
class WordMap:
    """The student word of every teacher id. words_U: (U,) int64, `NO_WORD` (-1) where there is none."""

    words_U: np.ndarray

    @property
    def mapped_ids(self) -> float:
        """The share of teacher ids that have a student word."""
        return float((self.words_U != NO_WORD).mean()) if len(self.words_U) else 0.0

    def mapped_mass(self, ids_NI: np.ndarray, probs_NK: np.ndarray) -> float:
        """The share of the teacher's probability (all of it, 1 per row) that finds a student word; 0 without rows."""
        if not len(ids_NI):
            return 0.0
        mapped_NI = self.words_U[ids_NI] != NO_WORD
        return float((probs_NK[:, : ids_NI.shape[1]] * mapped_NI).sum() / len(ids_NI))


def map_words(
    teacher_bytes: Sequence[bytes | None], teacher_roles: Mapping[int, str], student_tokenizer: Any
) -> WordMap:
    """Map a teacher's vocabulary (the cache's `vocabulary`) to a student's words; 262,144 ids take a few seconds.

    teacher_bytes: the bytes of every id, None for holes. teacher_roles: {id: "bos" | "eos" | "end_of_turn" | "other"}
    of special tokens; where the student lacks one of eos and end_of_turn the other stands in, "other" maps to nothing.
    Raises TokenizerError for a student tokenizer without a fast backend.
    """
    words_U = np.full(len(teacher_bytes), NO_WORD, dtype=np.int64)
    student_roles = special_roles(student_tokenizer)
    same_bytes = {
        spelled: token_id
        for token_id, spelled in enumerate(token_bytes(student_tokenizer))
        if spelled and token_id not in student_roles
    }
    ids, texts = [], []
    for token_id, spelled in enumerate(teacher_bytes):
        if token_id in teacher_roles:
            word = token_with_role(student_roles, teacher_roles[token_id])
            words_U[token_id] = NO_WORD if word is None else word
        elif spelled:
            try:
                texts.append(spelled.decode())
                ids.append(token_id)
            except UnicodeDecodeError:
                words_U[token_id] = same_bytes.get(spelled, NO_WORD)
    words_U[ids] = _first_tokens(student_tokenizer, texts, forbidden=student_roles)
    return WordMap(words_U)


def _first_tokens(tokenizer: Any, texts: list[str], forbidden: Mapping[int, str]) -> np.ndarray:
    """The student's first token of every text inside running text; a text that spells out a special token has none."""
    backend = backend_of(tokenizer)
    words = np.full(len(texts), NO_WORD, dtype=np.int64)
    open_texts = list(range(len(texts)))
    for carrier in CARRIERS:
        carrier_ids = backend.encode(carrier, add_special_tokens=False).ids
        if not carrier_ids:  # dropped by the tokenizer: it would carry nothing
            continue
        size, still_open = len(carrier_ids), []
        for first in range(0, len(open_texts), BATCH):
            numbers = open_texts[first : first + BATCH]
            batch = [carrier + texts[number] for number in numbers]
            for number, encoded in zip(
                numbers, backend.encode_batch_fast(batch, add_special_tokens=False), strict=True
            ):
                ids = encoded.ids
                if len(ids) > size and ids[:size] == carrier_ids:
                    words[number] = NO_WORD if ids[size] in forbidden else ids[size]
                else:
                    still_open.append(number)
        open_texts = still_open
    return words
