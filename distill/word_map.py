"""Which student word a teacher id says: its bytes, as the student would write them inside running text.

An id maps to the FIRST token of the student's encoding of its bytes: where the teacher says " Zürich" and the student
writes " Z", "ürich", the student is taught " Z" there. Special tokens map by role (bos, eos, end of turn). Bytes that
are not UTF-8 (parts of a character) map to the student's token of the same bytes, or to nothing. The teacher's
tokenizer is not needed: the cache holds its vocabulary as bytes.

`equal_bytes` keeps of this only the ids of which the first token is all: " Zürich" is then nobody's word. It says
nothing wrong and finds less (on the real pair 88.7 % of the teacher's mass instead of 91.5 %); a student that drops
bytes (WordPiece's spaces) needs `first_token`. `same_words` is for a student with the teacher's own tokenizer.

Legend: U teacher vocabulary, N rows, I ranks whose ids are cached.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from storage_specs.errors import ConfigError
from storage_specs.token_alphabet import backend_of
from storage_specs.vocabulary import special_roles, token_bytes, token_with_role, tokenizer_digest

WordMapping = Literal["first_token", "equal_bytes"]
MAPPINGS: tuple[WordMapping, ...] = get_args(WordMapping)
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
    teacher_bytes: Sequence[bytes | None],
    teacher_roles: Mapping[int, str],
    student_tokenizer: Any,
    mapping: WordMapping = "first_token",
) -> WordMap:
    """Map a teacher's vocabulary (the cache's `vocabulary`) to a student's words; 262,144 ids take a few seconds.

    teacher_bytes: the bytes of every id, None for holes. teacher_roles: {id: "bos" | "eos" | "end_of_turn" | "other"}
    of special tokens; where the student lacks one of eos and end_of_turn the other stands in, "other" maps to nothing.
    Raises TokenizerError for a student tokenizer without a fast backend, ConfigError for an unknown mapping.
    """
    if mapping not in MAPPINGS:
        raise ConfigError(f"mapping is {mapping!r}: must be one of {', '.join(MAPPINGS)}")
    words_U = np.full(len(teacher_bytes), NO_WORD, dtype=np.int64)
    student_roles = special_roles(student_tokenizer)
    student_bytes = token_bytes(student_tokenizer)
    same_bytes = {
        spelled: token_id for token_id, spelled in enumerate(student_bytes) if spelled and token_id not in student_roles
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
    first = _first_tokens(student_tokenizer, texts, forbidden=student_roles)
    if mapping == "equal_bytes":
        for number, (word, text) in enumerate(zip(first, texts, strict=True)):
            if word != NO_WORD and student_bytes[word] != text.encode():
                first[number] = NO_WORD
    words_U[ids] = first
    return WordMap(words_U)


def same_words(
    teacher_digest: str | None, teacher_bytes: Sequence[bytes | None], student_tokenizer: Any
) -> WordMap | None:
    """Every id as itself, for a student with the teacher's tokenizer; None for any other.

    The same tokenizer: its digest is the cache's (`tokenizer_digest`), or all ids that both know stand for the same
    bytes and one of the two vocabularies is only longer by ids without any. Ids unknown to the student map to nothing.
    """
    student_bytes = token_bytes(student_tokenizer)
    if tokenizer_digest(student_tokenizer) != teacher_digest:
        shared = min(len(teacher_bytes), len(student_bytes))
        beyond = [*teacher_bytes[shared:], *student_bytes[shared:]]
        if list(teacher_bytes[:shared]) != list(student_bytes[:shared]) or any(beyond):
            return None
    ids_U = np.arange(len(teacher_bytes))
    return WordMap(np.where(ids_U < len(student_bytes), ids_U, NO_WORD))


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
